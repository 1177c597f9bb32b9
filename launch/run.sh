#!/usr/bin/env bash
# Train, evaluate and export. On a fresh machine this also makes .venv and installs.
#
#   bash launch/run.sh                                the embedded demo, about ten minutes on two cores
#   bash launch/run.sh --config=configs/imitate.py    another config: configs/NAME.py or configs/NAME.py:VARIANT
#       [--config.optim.lr=3e-4 ...]                  any setting of it; python -m medvlp_jax.train --help lists configs
#       [--workdir=DIR]                               run folder; the same command again resumes an interrupted run
#       [--restarts=N]                                start again after a crash, from the newest checkpoint (default 0, of --slurm and --jobset 3; not with --tpu)
#       [--dry-run]                                   print command and environment of every rank, start nothing
#
# The same training on more devices; the run folder and MEDVLP_DATA_DIR must be seen by all of them:
#   --processes=N                  N processes on this host: one CPU process each, or one GPU each with MEDVLP_ACCELERATOR=cuda13
#   --slurm --nodes=N --gpus=K     one task a GPU, N nodes of K GPUs; writes DIR/job.sbatch, shows it and submits it
#       [--sbatch="--partition=P --time=24:00:00 --account=A"]
#   --tpu=NAME --zone=ZONE         every worker of a Cloud TPU VM, by gcloud ssh
#   --jobset=NAME --image=IMAGE --nodes=N --gpus=K --claim=PVC     a GKE JobSet: shows the manifest and applies it
#       [--selector=KEY=VALUE ...] node labels; MEDVLP_ACCELERATOR=tpu asks for TPU chips instead of GPUs
#
# Exit codes: 0 finished, 2 bad input, 74 disk full or file system failing, 75 stopped by SIGTERM or Ctrl-C with everything saved: start the same command again.
# Environment: MEDVLP_ACCELERATOR=cuda13|tpu, MEDVLP_DATA_DIR (prepared datasets), MEDVLP_PORT (of process 0), PYTHON,
# MEDVLP_VENV (another folder than .venv; none: the python on PATH, nothing is installed). --tpu and --jobset send JAX_*, XLA_FLAGS
# and LIBTPU_INIT_ARGS along, never WANDB_API_KEY nor HF_TOKEN.
# shellcheck disable=SC2034  # the parts sourced below read these variables
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

refuse() { echo "medvlp: ${1//$'\n'/ }" >&2; exit 2; }
number() { [[ "$2" =~ ^[1-9][0-9]*$ ]] || refuse "--$1 must be a whole number from 1 on, got '$2'."; }

mode=host dry_run=false processes=1 nodes=1 gpus=8 restarts="" sbatch="" tpu="" zone="" jobset="" image="" claim="" selector=""
config=configs/imitate.py:demo workdir="" arguments=()
label='[A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?' # of Kubernetes
for argument in "$@"; do
  value="${argument#*=}"
  case "$argument" in
    --help | -h) sed -n '2,/^set /{/^set /d;/^# shellcheck/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
    --dry-run) dry_run=true ;;
    --processes=*) mode="${mode}processes" processes="$value"; number processes "$value" ;;
    --slurm) mode="${mode}slurm" ;;
    --tpu=*) mode="${mode}tpu" tpu="$value" ;;
    --jobset=*) mode="${mode}jobset" jobset="$value" ;;
    --nodes=*) nodes="$value"; number nodes "$value" ;;
    --gpus=*) gpus="$value"; number gpus "$value" ;;
    --restarts=*) restarts="$value"; [[ "$value" == 0 ]] || number restarts "$value" ;;
    --sbatch=*) sbatch="$value" ;;
    --zone=*) zone="$value" ;;
    --image=*) image="$value" ;;
    --claim=*) claim="$value" ;;
    --selector=*)
      [[ "$value" =~ ^([a-z0-9][-.a-z0-9]*/)?$label=($label)?$ ]] || refuse "--selector must be KEY=VALUE, a label of nodes, got '$value'."
      selector+=$'\n'"                ${value%%=*}: \"${value#*=}\"" # a line of the manifest
      ;;
    --config=*) config="$value" ;;
    --workdir=*) workdir="$value" ;;
    *) arguments+=("$argument") ;;
  esac
done
case "$mode" in
  host | hostprocesses | hostslurm | hosttpu | hostjobset) mode="${mode#host}" ;;
  *) refuse "choose one of --processes, --slurm, --tpu and --jobset." ;;
esac

# What is not one of these would stand in a job script as code.
case "${MEDVLP_ACCELERATOR:-}" in
  "" | cuda13 | tpu) ;;
  *) refuse "MEDVLP_ACCELERATOR must be cuda13 or tpu, got '$MEDVLP_ACCELERATOR'." ;;
esac

# All ranks need the same run folder, so it is named here and not by each of them.
stem="${config##*/}"
workdir="${workdir:-runs/$(sed 's/\.py:/-/; s/\.py$//' <<< "$stem")-$(date +%Y%m%d-%H%M%S)}"
command=(python -m medvlp_jax.train "--config=$config" "--workdir=$workdir" ${arguments[@]+"${arguments[@]}"})
export MEDVLP_ACCELERATOR="${MEDVLP_ACCELERATOR:-}" MEDVLP_DATA_DIR="${MEDVLP_DATA_DIR:-}"

# --tpu and --jobset send settings of libraries along, not which process this is nor what devices are here, and no secrets.
sent=() unsent=""
for name in $(compgen -e | sort); do
  case "$name" in
    JAX_COORDINATOR_* | JAX_NUM_* | JAX_PROCESS_ID | JAX_LOCAL_DEVICE_IDS | JAX_PLATFORM* | JAX_*VISIBLE_DEVICES) ;;
    JAX_* | XLA_FLAGS | LIBTPU_INIT_ARGS) sent+=("$name") ;;
    WANDB_API_KEY | HF_TOKEN) unsent+="${unsent:+, }$name" ;;
  esac
done

case "$mode" in
  "" | processes) source launch/processes.sh ;;
  slurm) source launch/slurm.sh ;;
  tpu) source launch/tpu_vm.sh ;;
  jobset) source launch/jobset.sh ;;
esac
