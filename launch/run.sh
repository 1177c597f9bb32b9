#!/usr/bin/env bash
# Train, evaluate and export. On a fresh machine this also makes .venv and installs.
#
#   bash launch/run.sh                                   the embedded demo, about ten minutes on two cores
#   bash launch/run.sh --config=configs/imitate.py       another config: configs/NAME.py or configs/NAME.py:VARIANT
#       [--config.optim.lr=3e-4 ...]                     any setting of it; --help lists the flags
#       [--workdir=DIR]                                  run folder; an interrupted run in it is resumed
#       [--dry-run]                                      print command and environment, start nothing
#
# Environment: MEDVLP_ACCELERATOR=cuda13|tpu, MEDVLP_DATA_DIR (prepared datasets), PYTHON.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

dry_run=false
arguments=()
for argument in "$@"; do
  case "$argument" in
    --dry-run) dry_run=true ;;
    --processes=* | --slurm* | --tpu=* | --zone=*)
      echo "medvlp: ${argument%%=*} is not built yet; this script trains on all devices of one host." >&2; exit 2 ;;
    *) arguments+=("$argument") ;;
  esac
done
if [[ ! " ${arguments[*]-} " =~ [[:space:]]--config= ]]; then
  arguments=(--config=configs/imitate.py:demo ${arguments[@]+"${arguments[@]}"})
fi

if $dry_run; then
  echo "MEDVLP_ACCELERATOR=${MEDVLP_ACCELERATOR:-} MEDVLP_DATA_DIR=${MEDVLP_DATA_DIR:-}"
  printf 'python -m medvlp_jax.train'; printf ' %q' "${arguments[@]}"; echo
  exit 0
fi
source launch/setup.sh
exec python -m medvlp_jax.train "${arguments[@]}"
