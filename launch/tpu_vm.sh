#!/usr/bin/env bash
# Sourced by launch/run.sh: copy the checkout to every worker of a Cloud TPU VM and train there, by launch/worker.sh.
# Reads: command, workdir, tpu, zone, restarts, sent, unsent, dry_run.
# shellcheck disable=SC2154  # set by launch/run.sh

[[ -n "$zone" ]] || refuse "--tpu=$tpu needs --zone=ZONE."
case "$workdir" in /*) ;; *) refuse "--tpu needs --workdir=DIR as an absolute path on a file system that all workers share, got '$workdir'." ;; esac
[[ -z "$restarts" ]] || refuse "--restarts does not go with --tpu: start the same command again, all workers go on from the newest checkpoint."
for folder in "$workdir" "$MEDVLP_DATA_DIR"; do
  [[ "$folder/" != */medvlp_jax_checkout/* ]] || refuse "--tpu empties medvlp_jax_checkout before each start, '$folder' must not lie in it."
done
$dry_run || command -v gcloud > /dev/null || refuse "--tpu needs gcloud on this machine; --dry-run shows the commands without it."

ssh=(gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone")
scp=(gcloud compute tpus tpu-vm scp "--zone=$zone" --worker=all)
# The run takes over this lock: another start would take its files away.
# shellcheck disable=SC2016  # filled in there
remote='exec 9> medvlp_jax.lock && { flock -n 9 || { echo "medvlp: a run is going on on $(hostname): stop it first." >&2; exit 2; }; }'
# What was installed by an earlier start stays; files that are gone from the checkout go.
remote+=" && mkdir -p medvlp_jax_checkout && find medvlp_jax_checkout -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +"
remote+=" && tar -xzf medvlp-checkout.tgz -C medvlp_jax_checkout && cd medvlp_jax_checkout"
# JAX asks the machine which worker this is and where the others are.
remote+=" && exec env MEDVLP_ACCELERATOR=tpu MEDVLP_CLUSTER=auto"
for name in MEDVLP_DATA_DIR ${sent[@]+"${sent[@]}"}; do remote+=" $name=$(printf '%q' "${!name}")"; done
remote+=" bash launch/worker.sh$(printf ' %q' "$workdir/logs" "${command[@]:3}")"

look="tail -n 100 -f --pid=\$(cat medvlp_jax.pid) $(printf '%q' "$workdir/logs/rank-0.log")"
echo "# The run goes on when this display ends, by Ctrl-C too. To look again, and to stop it with everything saved:"
echo "${ssh[*]} --worker=0 --command=$(printf '%q' "$look")"
echo "${ssh[*]} --worker=all --command=$(printf '%q' "pkill -TERM -F medvlp_jax.pid -f medvlp_jax")"
if [[ -n "$unsent" ]]; then echo "# Not sent: $unsent. Log in there, by wandb login and hf auth login."; fi
ssh+=(--worker=all)

# Into a folder of this user's own: under a fixed name in /tmp anybody may have put a link, or another checkout.
# shellcheck disable=SC2016  # filled in when it runs
pack='git ls-files -z | tar --null --files-from=- -czf "$folder/checkout.tgz"'
if $dry_run; then
  echo "# here"
  # shellcheck disable=SC2016
  echo 'folder="$(mktemp -d)"'
  echo "$pack"
  echo "${scp[*]} \"\$folder/checkout.tgz\" $tpu:medvlp-checkout.tgz"
  echo "${ssh[*]} --command=$(printf '%q' "$remote")"
  echo "# on every worker, rank = its number"
  echo "$remote"
  exit 0
fi
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
eval "$pack"
"${scp[@]}" "$folder/checkout.tgz" "$tpu:medvlp-checkout.tgz"
rm -rf "$folder" # exec runs no trap
exec "${ssh[@]}" "--command=$remote"
