#!/usr/bin/env bash
# Sourced by launch/run.sh: fill in launch/slurm.sbatch, show it, submit it.
# Reads: command, workdir, nodes, gpus, restarts, sbatch, dry_run.
# shellcheck disable=SC2154  # set by launch/run.sh

# sbatch reads its own lines of the script, not the shell: it ends a line at its end, and splits it at blanks.
[[ "$sbatch" != *$'\n'* ]] || refuse "--sbatch must be one line, got '$sbatch'."
[[ ! "$workdir" =~ [[:space:]\"\'\\#%] ]] || refuse "--slurm needs a --workdir without blanks, quotes, \\, # and %, got '$workdir'."
accelerator="${MEDVLP_ACCELERATOR:-cuda13}"
quoted="$(printf ' %q' "${command[@]}")"
text="$(< launch/slurm.sbatch)"
extra="#SBATCH --cpus-per-task=8"$'\n' # one of --sbatch comes after it and holds
if [[ "$sbatch" == *--cpus-per-gpu* ]]; then extra=""; fi # SLURM takes only one of them
read -ra options <<< "$sbatch" # as words alone, * stays *
for option in ${options[@]+"${options[@]}"}; do extra+="#SBATCH $option"$'\n'; done
text="${text//@SBATCH@$'\n'/"$extra"}"
text="${text//@NODES@/"$nodes"}"
text="${text//@GPUS@/"$gpus"}"
text="${text//@WORKDIR@/"$workdir"}"
text="${text//@LOGS@/"$(printf '%q' "$workdir/logs")"}"
text="${text//@ROOT@/"$(printf '%q' "$PWD")"}"
text="${text//@ACCELERATOR@/"$accelerator"}"
text="${text//@DATA@/"$(printf '%q' "$MEDVLP_DATA_DIR")"}"
text="${text//@RESTARTS@/"${restarts:-3}"}"
text="${text//@COMMAND@/"${quoted# }"}"

echo "# $workdir/job.sbatch"
echo "$text"
echo
echo "# then: sbatch $workdir/job.sbatch"
if $dry_run; then
  for ((rank = 0; rank < nodes * gpus; rank++)); do
    echo "# rank $rank, GPU $((rank % gpus)) of node $((rank / gpus))"
    echo "MEDVLP_ACCELERATOR=$accelerator MEDVLP_DATA_DIR=$MEDVLP_DATA_DIR JAX_COORDINATOR_ADDRESS=NODE0:PORT" \
      "JAX_NUM_PROCESSES=$((nodes * gpus)) JAX_PROCESS_ID=$rank JAX_LOCAL_DEVICE_IDS=$((rank % gpus)) ${quoted# }"
  done
  exit 0
fi
command -v sbatch > /dev/null || refuse "--slurm needs sbatch on this machine; --dry-run shows the job without it."
mkdir -p "$workdir/logs"
echo "$text" > "$workdir/.job.sbatch.$$"
mv "$workdir/.job.sbatch.$$" "$workdir/job.sbatch"
exec sbatch "$workdir/job.sbatch"
