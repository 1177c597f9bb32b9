#!/usr/bin/env bash
# Sourced by launch/run.sh: fill in launch/jobset.yaml, show it, apply it.
# Reads: command, workdir, jobset, image, claim, selector, nodes, gpus, restarts, sent, unsent, dry_run.
# shellcheck disable=SC2154  # set by launch/run.sh

[[ -n "$image" ]] || refuse "--jobset needs --image=IMAGE, a container with this checkout as its working directory."
[[ -n "$claim" ]] || refuse "--jobset needs --claim=PVC, a volume claim that all pods can write; it is mounted at /shared."
[[ "$image" =~ ^[A-Za-z0-9]([-._:/@A-Za-z0-9]*[A-Za-z0-9])?$ ]] || refuse "--image=$image is no name of an image."
[[ "$claim" =~ ^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$ ]] || refuse "--claim=$claim must be lower-case letters, digits, dots and hyphens."
[[ "$jobset" =~ ^[a-z]([-a-z0-9]{0,30}[a-z0-9])?$ ]] || refuse "--jobset=$jobset must be lower-case letters, digits and hyphens."
case "$workdir" in /shared/*) ;; *) refuse "--jobset needs --workdir=/shared/..., the volume of --claim, got '$workdir'." ;; esac

accelerator="${MEDVLP_ACCELERATOR:-cuda13}"
resource=nvidia.com/gpu
if [[ "$accelerator" == tpu ]]; then resource=google.com/tpu; fi
data="${MEDVLP_DATA_DIR:-/shared/data}"
case "$data/" in /shared/*) ;; *) refuse "--jobset needs MEDVLP_DATA_DIR in /shared, the volume of --claim, got '$data'." ;; esac
# Sets `string` to $1 as YAML in double quotes, where both signs that mean something are escaped; Kubernetes reads $$ as $, $(NAME) as
# the variable.
quote() {
  [[ ! "$1" =~ [[:cntrl:]] ]] || refuse "--jobset takes no line break nor other control character, got '$1'."
  string="${1//\\/\\\\}"
  string="${string//\"/\\\"}"
  string="\"${string//\$/"\$\$"}\""
}
words=""
for word in bash launch/run.sh "${command[@]:3}"; do
  quote "$word"
  words+="$string, "
done
settings="" shown=""
for name in ${sent[@]+"${sent[@]}"}; do
  quote "${!name}"
  settings+="                    - {name: $name, value: $string}"$'\n'
  shown+=" $name=$(printf '%q' "${!name}")"
done
quote "$data"
text="$(< launch/jobset.yaml)"
if [[ -n "$selector" ]]; then
  text="${text//$'\n'                @SELECTOR@/"$selector"}"
else
  text="${text//              nodeSelector:$'\n'                @SELECTOR@$'\n'/}"
fi
text="${text//@NAME@/"$jobset"}"
text="${text//@IMAGE@/"$image"}"
text="${text//@CLAIM@/"$claim"}"
text="${text//@NODES@/"$nodes"}"
text="${text//@GPUS@/"$gpus"}"
text="${text//@RESOURCE@/"$resource"}"
text="${text//@ACCELERATOR@/"$accelerator"}"
text="${text//@DATA@/"$string"}"
text="${text//@RESTARTS@/"${restarts:-3}"}"
text="${text//@COMMAND@/"[${words%, }]"}"
text="${text//                    @SETTINGS@$'\n'/"$settings"}"

echo "$text"
if [[ -n "$unsent" ]]; then echo "# Not sent: $unsent. Pods get them by kubectl create secret generic medvlp --from-literal=NAME=VALUE ..."; fi
if $dry_run; then
  for ((rank = 0; rank < nodes; rank++)); do
    echo "# rank $rank, pod $jobset-rank-0-$rank"
    echo "# MEDVLP_ACCELERATOR=$accelerator MEDVLP_DATA_DIR=$data JAX_COORDINATOR_ADDRESS=$jobset-rank-0-0.$jobset:8476" \
      "JAX_NUM_PROCESSES=$nodes JAX_PROCESS_ID=$rank$shown bash launch/run.sh$(printf ' %q' "${command[@]:3}")"
  done
  exit 0
fi
command -v kubectl > /dev/null || refuse "--jobset needs kubectl on this machine; --dry-run shows the manifest without it."
kubectl apply -f - <<< "$text"
