#!/usr/bin/env bash
# Runs a study on Kubernetes as a JobSet (https://jobset.sigs.k8s.io has to be installed in the cluster).
#
#   launch/kubernetes/launch.sh ACTION --name=NAME [--dry_run] [--platform=tpu-gke|gpu-gke|gpu] [--image=IMAGE] [--claim=CLAIM]
#     [--hosts=N] [--chips=N] [--accelerator=KIND] [--topology=2x4] [--namespace=NS]
#     [-- --config=FILE --workdir=/study/NAME [FLAG...]]
#
#   run     applies the manifest, then waits for the end
#   tail    follows the log of the first pod
#   delete  removes the JobSet
#
#   --image   holds an installed dapt_jax and the config files
#   --claim   a PersistentVolumeClaim, mounted at /study: the place for --workdir, so that a restart finds it
#   --hosts   pods; --chips TPU chips or GPUs of each
#
# In the environment: POLL_S (default 30) seconds between looks, TRIES (default 5) of a command before it is given up.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

POLL_S=${POLL_S:-30} TRIES=${TRIES:-5}
# shellcheck disable=SC2034 # rendered reads some of them by name
ACTION="" NAME="" PLATFORM=tpu-gke IMAGE="" CLAIM=dapt-jax HOSTS="" CHIPS="" ACCELERATOR="" TOPOLOGY=2x4 NAMESPACE=default
# shellcheck disable=SC2034
while (($#)); do
  case $1 in
    run | tail | delete) ACTION=$1 ;;
    --dry_run) DRY_RUN=1 ;;
    --name=*) NAME=${1#*=} ;;
    --platform=*) PLATFORM=${1#*=} ;;
    --image=*) IMAGE=${1#*=} ;;
    --claim=*) CLAIM=${1#*=} ;;
    --hosts=*) HOSTS=${1#*=} ;;
    --chips=*) CHIPS=${1#*=} ;;
    --accelerator=*) ACCELERATOR=${1#*=} ;;
    --topology=*) TOPOLOGY=${1#*=} ;;
    --namespace=*) NAMESPACE=${1#*=} ;;
    --)
      shift
      break
      ;;
    *) fail "unknown argument $1; expected run, tail or delete, and --name=, --platform=, --image= ..." 2 ;;
  esac
  shift
done
[[ -n $ACTION ]] || fail "no action; expected run, tail or delete" 2
[[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "--name is '$NAME'; expected lower-case letters, digits and -" 2
manifest=$(dirname "${BASH_SOURCE[0]}")/$PLATFORM.yaml
[[ -f $manifest ]] || fail "--platform is '$PLATFORM'; expected tpu-gke, gpu-gke or gpu" 2
case $PLATFORM in
  tpu-gke) : "${HOSTS:=2}" "${CHIPS:=4}" "${ACCELERATOR:=tpu-v5-lite-podslice}" ;;
  gpu-gke) : "${HOSTS:=1}" "${CHIPS:=1}" "${ACCELERATOR:=nvidia-l4}" ;;
  gpu) : "${HOSTS:=1}" "${CHIPS:=1}" ;;
esac
whole --hosts "$HOSTS" 1
whole --chips "$CHIPS" 1
whole POLL_S "$POLL_S" 0
whole TRIES "$TRIES" 1

# rendered FLAG...: the manifest with the settings in their places; the flags as a JSON list, which is YAML.
rendered() {
  local text flags="" flag
  text=$(<"$manifest")
  for flag in "$@"; do
    flag=${flag//\\/\\\\}
    flags+="${flags:+, }\"${flag//\"/\\\"}\""
  done
  for name in NAME IMAGE CLAIM HOSTS CHIPS ACCELERATOR TOPOLOGY; do text=${text//"{$name}"/"${!name}"}; done
  printf '%s\n' "${text//'["{FLAGS}"]'/"[$flags]"}"
}

kube() { run kubectl "--namespace=$NAMESPACE" "$@"; }

# condition TYPE: "True" where the JobSet has come to it.
condition() {
  kubectl "--namespace=$NAMESPACE" get jobset "$NAME" -o "jsonpath={.status.conditions[?(@.type==\"$1\")].status}"
}

study() {
  local file lost=0 failed completed
  [[ -n $IMAGE ]] || fail "no --image; expected one that holds an installed dapt_jax" 2
  (($#)) || fail "no flags of a study; expected -- --config=FILE --workdir=/study/NAME" 2
  file=$(mktemp)
  rendered "$@" >"$file"
  if [[ -n ${DRY_RUN:-} ]]; then
    kube apply -f -
    cat "$file"
    rm -f "$file"
    kube get jobset "$NAME" -o 'jsonpath={.status.conditions[?(@.type=="Completed")].status}'
    return
  fi
  retry "$TRIES" "$POLL_S" kube apply -f "$file" || fail "the manifest was not taken: is JobSet installed, and the quota left?"
  rm -f "$file"
  while :; do
    if completed=$(condition Completed) && failed=$(condition Failed); then
      lost=0
      [[ $completed != True ]] || break
      [[ $failed != True ]] || fail "the study failed; see '$0 tail --name=$NAME'"
    else
      lost=$((lost + 1))
      say "no answer from the cluster, try $lost of $TRIES: the study goes on without this connection"
      ((lost < TRIES)) || fail "no answer from the cluster; the same command goes on watching"
    fi
    sleep "$POLL_S"
  done
  say "done"
}

case $ACTION in
  run) study "$@" ;;
  tail) kube logs --follow "--selector=jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0" ;;
  delete) kube delete jobset "$NAME" ;;
esac
