#!/usr/bin/env bash
# Sourced by launch/run.sh: copy the checkout to every worker of a Cloud TPU VM and train there.
# Reads: command, workdir, tpu, zone, restarts, dry_run.
# To stop with everything saved: kill -TERM the process that DIR/lock names, on worker 0. Ctrl-C here only ends the display.
# shellcheck disable=SC2154  # set by launch/run.sh

[[ -n "$zone" ]] || refuse "--tpu=$tpu needs --zone=ZONE."
case "$workdir" in /*) ;; *) refuse "--tpu needs --workdir=DIR as an absolute path on a file system that all workers share, got '$workdir'." ;; esac
[[ -z "$restarts" ]] || refuse "--restarts does not go with --tpu: start the same command again, all workers go on from the newest checkpoint."

ssh=(gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone" --worker=all)
scp=(gcloud compute tpus tpu-vm scp "--zone=$zone" --worker=all)
# JAX asks the machine which worker this is and where the others are.
# What was installed by an earlier start stays; files that are gone from the checkout go.
remote="mkdir -p medvlp_jax_checkout && find medvlp_jax_checkout -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +"
remote+=" && tar -xzf medvlp-checkout.tgz -C medvlp_jax_checkout && cd medvlp_jax_checkout"
remote+=" && MEDVLP_ACCELERATOR=tpu MEDVLP_CLUSTER=auto MEDVLP_DATA_DIR=$(printf '%q' "$MEDVLP_DATA_DIR")"
remote+=" bash launch/run.sh$(printf ' %q' "${command[@]:3}")"

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
command -v gcloud > /dev/null || refuse "--tpu needs gcloud on this machine; --dry-run shows the commands without it."
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
eval "$pack"
"${scp[@]}" "$folder/checkout.tgz" "$tpu:medvlp-checkout.tgz"
rm -rf "$folder" # exec runs no trap
exec "${ssh[@]}" "--command=$remote"
