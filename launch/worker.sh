#!/usr/bin/env bash
# Started by launch/tpu_vm.sh on every worker: the run goes on when whoever watches leaves; who watches to its end gets its exit code.
# Usage: worker.sh LOGS ARGUMENT ...     arguments of launch/run.sh; the log is LOGS/rank-N.log, N the number of the worker
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

logs="$1" host="$(hostname)"
log="$logs/rank-${host##*-w-}.log" # a worker is named such as t1v-n-01234567-w-3
mkdir -p "$logs"
: > "$log" # here, so that it is there to be followed
setsid nohup bash "$PWD/launch/run.sh" "${@:2}" >> "$log" 2>&1 < /dev/null &
run=$!
exec 9>&- # the lock of launch/tpu_vm.sh goes with the run, not with who watches
echo "$run" > "$HOME/medvlp_jax.pid"
tail -n +1 -f --pid="$run" "$log" || true
wait "$run"
