#!/usr/bin/env bash
# Sourced by launch/run.sh: the ranks of a run on this host. A rank that dies takes the others down, and its log is shown.
# Reads: command, workdir, processes, restarts, dry_run, mode.
# shellcheck disable=SC2154  # set by launch/run.sh

# XLA asks for the memory of each step anew. glibc would give it back to the system in between, which then has to clear it again: up to a
# quarter of a step's time on a CPU (docs/performance.md). One arena, because only the first can keep blocks of this size.
if [[ -z "$MEDVLP_ACCELERATOR" ]]; then
  export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776:glibc.malloc.arena_max=1}"
fi

# Prints the environment of rank $1; a single process without --processes needs none.
rank_environment() {
  [[ -n "$mode" ]] || return 0
  echo "JAX_COORDINATOR_ADDRESS=localhost:$port JAX_NUM_PROCESSES=$processes JAX_PROCESS_ID=$1"
  # Not CUDA_VISIBLE_DEVICES: NCCL copies between GPUs directly only where a process can see both.
  if [[ "$MEDVLP_ACCELERATOR" == cuda13 ]]; then echo "JAX_LOCAL_DEVICE_IDS=$1"; fi
}

if $dry_run; then
  port="${MEDVLP_PORT:-PORT}" # PORT: a free one, found when the ranks start
  for ((rank = 0; rank < processes; rank++)); do
    echo "# rank $rank"
    # shellcheck disable=SC2046  # one word a setting
    printf '%s ' "MEDVLP_ACCELERATOR=$MEDVLP_ACCELERATOR" "MEDVLP_DATA_DIR=$MEDVLP_DATA_DIR" ${GLIBC_TUNABLES:+"GLIBC_TUNABLES=$GLIBC_TUNABLES"} \
      $(rank_environment "$rank")
    quoted="$(printf ' %q' "${command[@]}")"
    if ((rank > 0)); then quoted+=" > $(printf '%q' "$workdir/logs/rank-$rank.log") 2>&1"; fi
    echo "${quoted# }"
  done
  exit 0
fi
source launch/setup.sh "" # "": not the arguments of this script
if [[ -z "$mode" && "${restarts:-0}" == 0 ]]; then exec "${command[@]}"; fi

pids=() codes=() asked=false
signal_all() { for pid in "${pids[@]}"; do kill "-$1" "$pid" 2> /dev/null || true; done; }
trap 'asked=true; signal_all TERM' TERM INT

# Starts all ranks and sets `code` to how they ended: 0, 75 if they were stopped, or the code of the rank that failed.
run_ranks() {
  port="${MEDVLP_PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}"
  mkdir -p "$workdir/logs"
  pids=() codes=() code=0
  local rank out failed="" deadline=0 left="$processes"
  for ((rank = 0; rank < processes; rank++)); do
    # Rank 0 speaks for all, through our own descriptor: opening /dev/stderr anew would write over a file.
    if ((rank == 0)); then exec {out}>&2; else exec {out}> "$workdir/logs/rank-$rank.log"; fi
    # shellcheck disable=SC2046
    env $(rank_environment "$rank") "${command[@]}" >&"$out" 2>&1 &
    exec {out}>&-
    pids+=("$!") codes+=("")
  done
  while ((left > 0)); do
    sleep 0.1 || true
    for ((rank = 0; rank < processes; rank++)); do
      if [[ -n "${codes[rank]}" ]] || kill -0 "${pids[rank]}" 2> /dev/null; then continue; fi
      wait "${pids[rank]}" && codes[rank]=0 || codes[rank]=$?
      left=$((left - 1))
      # 134 is how JAX ends a rank whose peer is gone: the cause lies elsewhere, unless nothing else is found.
      case "${codes[rank]}" in
        0) ;;
        75) if [[ -z "$failed" ]]; then code=75; fi ;;
        134) failed="${failed:-$rank}" ;;
        *) if [[ -z "$failed" || "${codes[failed]}" == 134 ]]; then failed="$rank"; fi ;;
      esac
    done
    if [[ -n "$failed" ]] && ((deadline == 0)); then
      signal_all TERM
      deadline=$((SECONDS + 5))
    fi
    if ((deadline > 0 && SECONDS >= deadline)); then signal_all KILL; fi
  done
  if [[ -n "$failed" ]]; then
    code="${codes[failed]}"
    echo "medvlp: rank $failed of $processes ended with code $code, so the others were stopped." >&2
    if ((failed > 0)); then
      echo "medvlp: the end of $workdir/logs/rank-$failed.log:" >&2
      tail -n 20 "$workdir/logs/rank-$failed.log" >&2
    fi
  fi
}

for ((attempt = 0; ; attempt++)); do
  run_ranks
  case "$code" in 0 | 2 | 75 | 130) exit "$code" ;; esac
  if $asked || ((attempt >= ${restarts:-0})); then exit "$code"; fi
  echo "medvlp: restart $((attempt + 1)) of $restarts, from the newest checkpoint." >&2
done
