#!/usr/bin/env bash
# PRIMA from nothing to a table of results: corpus -> inject -> align -> sharpen -> fuse, evaluated on every fold.
#
#   bash launch/prima.sh                                  the demo on generated radiographs, random weights, small encoders
#   bash launch/prima.sh --config=configs/prima.py:pad --risk=pad_ufes_20 --articles=DIR --backend=endpoint --model=NAME
#       [--workdir=DIR]            one folder a stage in it; the same command again goes on where it stopped, one with other
#                                  settings is refused where a stage has ended
#       [--folds=N]                folds to train and test on, of the five the config has (default 5); 0: the corpus' own splits
#       [--config.optim.lr=1e-4 ...]  passes on to every stage
#       [--inject.KEY=VALUE ...]   passes on to one stage as --config.KEY=VALUE; also --align., --sharpen., --fuse.
#       [--processes=N] [--restarts=N]  pass on to launch/run.sh
#       [--dry-run]                print the commands, start nothing
#
# The corpus (medvlp evidence corpus --help says more):
#       [--risk=NAME|FILE]         factors and diseases (default cxr_phantom)
#       [--articles=PATH] [--retriever=bm25|FOLDER] [--backend=template|endpoint|transformers|qwen3] [--model=NAME] [--url=URL]
#       [--max-tokens=N] [--extra-body=JSON]
#       [--allow-remote]           send passages of articles to another machine
#       [--corpus=DIR]             take this one, write none
#       [--allow-unvetted]         train on texts that no physician has approved; without it the run stops before inject, but for
#                                  what the template writes of cxr_phantom, whose risk table is true by construction
#
# A config path is FILE:CORPUS; the stages are its variants inject_CORPUS, align_CORPUS, sharpen_CORPUS and fuse_CORPUS.
# Exit codes and environment are those of launch/run.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

refuse() { echo "medvlp: $1" >&2; exit 2; }

config=configs/prima.py:phantom workdir="" folds=5 count=5 dry_run=false risk=cxr_phantom backend=template corpus="" unvetted=false
passed=() writing=() inject=() align=() sharpen=() fuse=()
for argument in "$@"; do
  value="${argument#*=}"
  case "$argument" in
    --help | -h) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
    --dry-run) dry_run=true ;;
    --config=*) config="$value" ;;
    --workdir=*) workdir="$value" ;;
    --folds=*) folds="$value"; [[ "$value" =~ ^[0-9]+$ ]] || refuse "--folds must be a whole number, got '$value'." ;;
    --risk=*) risk="$value" ;;
    --backend=*) backend="$value" ;;
    --corpus=*) corpus="$value" ;;
    --articles=* | --model=* | --url=* | --retriever=* | --max-tokens=* | --extra-body=*) writing+=("${argument%%=*}" "$value") ;;
    --allow-remote) writing+=("$argument") ;;
    --allow-unvetted) unvetted=true ;;
    --inject.*=*) inject+=("--config.${argument#--inject.}") ;;
    --align.*=*) align+=("--config.${argument#--align.}") ;;
    --sharpen.*=*) sharpen+=("--config.${argument#--sharpen.}") ;;
    --fuse.*=*) fuse+=("--config.${argument#--fuse.}") ;;
    --config.data.folds.count=*) count="$value" passed+=("$argument") ;;
    --config.* | --processes=* | --restarts=*) passed+=("$argument") ;;
    *) refuse "what is '$argument'? bash launch/prima.sh --help lists the flags; stages follow one another on one host." ;;
  esac
done
file="${config%%:*}" name="${config##*:}"
[[ "$config" == *:* && -n "$name" ]] || refuse "--config must be FILE:CORPUS, such as configs/prima.py:phantom, got '$config'."
[[ "$count" =~ ^[0-9]+$ ]] && ((folds <= count)) || refuse "--folds=$folds is more than the $count folds there are."
[[ -f "$file" ]] || refuse "no config file '$file'."
workdir="${workdir:-runs/prima-$name-$(date +%Y%m%d-%H%M%S)}"
if [[ "$backend" == template && "$risk" == cxr_phantom && -z "$corpus" ]]; then unvetted=true; fi
text="${corpus:-$workdir/corpus}"

# Runs a command, or prints it. One that has ended leaves itself in its folder and is passed over the next time; another that
# would go there is refused.
run() { # run FOLDER COMMAND ...; FOLDER "": always
  local folder="$1"
  shift
  if $dry_run; then printf '%q ' "$@" | sed 's/ $//'; echo; return; fi
  local what=() each
  for each in "$@"; do case "$each" in --processes=* | --restarts=*) ;; *) what+=("$each") ;; esac; done
  if [[ -n "$folder" && -e "$folder/finished" ]]; then
    [[ ! -s "$folder/finished" || "$(<"$folder/finished")" == "${what[*]}" ]] && return
    refuse "$folder was finished with other settings: '$(<"$folder/finished")', not '${what[*]}'. Name another --workdir, or \
remove that folder and those of the stages after it."
  fi
  echo "medvlp: $*" >&2
  "$@"
  if [[ -n "$folder" ]]; then echo "${what[*]}" >"$folder/finished.part" && mv "$folder/finished.part" "$folder/finished"; fi
}
stage() { # stage NAME FOLDER SETTING ...
  local stage="$1" folder="$2"
  shift 2
  run "$folder" bash launch/run.sh "--config=$file:${stage}_$name" "--workdir=$folder" "$@" ${passed[@]+"${passed[@]}"}
}
train() { # train FOLDER SETTING: align, sharpen and fuse in the folder, each from the one before
  stage align "$1/align" "--config.init.params=$workdir/inject" "$2" ${align[@]+"${align[@]}"}
  stage sharpen "$1/sharpen" "--config.init.params=$1/align" "$2" ${sharpen[@]+"${sharpen[@]}"}
  stage fuse "$1/fuse" "--config.init.params=$1/sharpen" "$2" ${fuse[@]+"${fuse[@]}"}
  runs+=("$1/fuse")
}

if ! $dry_run; then source launch/setup.sh ""; fi
if [[ -z "$corpus" ]]; then
  run "$text" python -m medvlp_jax.evidence corpus --risk "$risk" --backend "$backend" --out "$text" \
    ${writing[@]+"${writing[@]}"}
fi
knowledge=("--config.data.knowledge.folder=$text")
if $unvetted; then knowledge+=("--config.data.knowledge.allow_unvetted=True"); fi
stage inject "$workdir/inject" "${knowledge[@]}" ${inject[@]+"${inject[@]}"}

runs=()
if ((folds == 0)); then train "$workdir/own" --config.data.folds.count=0; fi
for ((fold = 0; fold < folds; fold++)); do train "$workdir/fold-$fold" "--config.data.folds.index=$fold"; done
run "" python -m medvlp_jax.evaluation.folds "${runs[@]}" --out "$workdir/results.json"
