#!/usr/bin/env bash
# Runs a study on a Cloud TPU VM or pod slice, and goes on after a preemption.
#
#   launch/tpu_vm.sh ACTION --name=NAME --zone=ZONE [--dry_run] [--project=P] [--type=v5litepod-8]
#     [--version=v2-alpha-tpuv5-lite] [--spot] [--restarts=N] [-- --config=FILE --workdir=FOLDER [FLAG...]]
#
#   create  asks for the TPU as a queued resource, and waits until it is there
#   setup   copies this checkout to every worker and installs it there
#   run     create and setup where they are missing, then the study on all workers; whenever it was told to stop (exit code 75),
#           was killed, or the TPU was taken away, it is started again, on a new TPU if need be; give a --workdir that outlives
#           the TPU
#   tail    follows the log of worker 0
#   delete  gives the TPU back
#
# In the environment: POLL_S (default 30) seconds between looks, WAIT_S (default 86400) for a TPU, TRIES (default 5) of a command
# before it is given up.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

POLL_S=${POLL_S:-30} WAIT_S=${WAIT_S:-86400} TRIES=${TRIES:-5}
ACTION="" NAME="" ZONE="" PROJECT="" TYPE=v5litepod-8 VERSION=v2-alpha-tpuv5-lite SPOT="" RESTARTS=100
while (($#)); do
  case $1 in
    create | setup | run | tail | delete) ACTION=$1 ;;
    --dry_run) DRY_RUN=1 ;;
    --name=*) NAME=${1#*=} ;;
    --zone=*) ZONE=${1#*=} ;;
    --project=*) PROJECT=${1#*=} ;;
    --type=*) TYPE=${1#*=} ;;
    --version=*) VERSION=${1#*=} ;;
    --spot) SPOT=1 ;;
    --restarts=*) RESTARTS=${1#*=} ;;
    --)
      shift
      break
      ;;
    *) fail "unknown argument $1; expected create, setup, run, tail or delete, and --name=, --zone=, --type=, --spot ..." 2 ;;
  esac
  shift
done
[[ -n $ACTION ]] || fail "no action; expected create, setup, run, tail or delete" 2
[[ -n $NAME && -n $ZONE ]] || fail "no --name or no --zone; expected both, such as --name=dapt --zone=us-west4-a" 2
[[ $ACTION != run || $# -gt 0 ]] || fail "no flags of a study; expected -- --config=FILE --workdir=FOLDER" 2
whole --restarts "$RESTARTS" 0
whole POLL_S "$POLL_S" 0
whole WAIT_S "$WAIT_S" 0
whole TRIES "$TRIES" 1

WHERE=(--zone="$ZONE")
[[ -z $PROJECT ]] || WHERE+=(--project="$PROJECT")
CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# state: of the queued resource, MISSING where there is none; UNKNOWN where gcloud does not answer.
state() {
  local answer errors
  if [[ -n ${DRY_RUN:-} ]]; then
    run gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" "--format=value(state.state)" >&2
    echo ACTIVE
    return
  fi
  errors=$(mktemp)
  if answer=$(gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" "--format=value(state.state)" 2>"$errors"); then
    echo "${answer:-UNKNOWN}"
  elif grep -qi "not.found" "$errors"; then
    echo MISSING
  else
    echo UNKNOWN
  fi
  rm -f "$errors"
}

create() {
  local answer code=0 waited
  local ask=(gcloud compute tpus queued-resources create "$NAME" "--node-id=$NAME" "${WHERE[@]}"
    "--accelerator-type=$TYPE" "--runtime-version=$VERSION")
  [[ -z $SPOT ]] || ask+=(--spot)
  if [[ -n ${DRY_RUN:-} ]]; then
    run "${ask[@]}"
    state >/dev/null
    return
  fi
  for ((try = 1; ; try++)); do
    code=0
    answer=$("${ask[@]}" 2>&1) || code=$?
    ((code)) || break
    if grep -qiE "quota|permission|invalid|not found" <<<"$answer"; then
      fail "no TPU $TYPE in $ZONE: $(grep -iE "quota|permission|invalid|not found" <<<"$answer" | head -n 1)"
    fi
    ((try < TRIES)) || fail "no TPU $TYPE in $ZONE after $TRIES tries: $(tail -n 1 <<<"$answer")"
    say "gcloud failed (exit $code), try $try of $TRIES; again in $POLL_S s"
    sleep "$POLL_S"
  done
  for ((waited = 0; ; waited += POLL_S)); do
    case $(state) in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING) fail "the request for $NAME is $(state): delete it, then ask for another --type or --zone" ;;
    esac
    ((waited < WAIT_S)) || fail "no TPU $TYPE in $ZONE within $WAIT_S s; the request $NAME stays in the queue"
    sleep "$POLL_S"
  done
}

# on WORKER COMMAND: runs a shell command there.
on() {
  run gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" "--worker=$1" "--command=$2"
}

# copy: the checkout to a folder that is not there yet: into one that is, scp would put a second checkout, which would never run.
copy() {
  on all 'rm -rf ~/dapt_jax.new' &&
    run gcloud compute tpus tpu-vm scp --recurse "$CHECKOUT" "$NAME:dapt_jax.new" "${WHERE[@]}" --worker=all
}

# setup: replaces the package, and leaves what studies have written beside it.
setup() {
  local install='mkdir -p ~/dapt_jax && rm -rf ~/dapt_jax/dapt_jax && cp -a ~/dapt_jax.new/. ~/dapt_jax/'
  install+=' && python3 -m venv ~/venv && ~/venv/bin/pip install -q -e ~/dapt_jax "jax[tpu]"'
  retry "$TRIES" "$POLL_S" copy || fail "the checkout could not be copied to $NAME"
  retry "$TRIES" "$POLL_S" on all "$install" || fail "the checkout could not be installed on $NAME"
}

delete() {
  retry "$TRIES" "$POLL_S" run gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet ||
    fail "$NAME could not be deleted: it may still cost money"
}

# The study outlives the connection that started it, in a process group of its own; how it ended is in a file.
start() {
  local study end_last
  end_last="{ [ ! -f ~/group ] || kill -KILL -- -\$(cat ~/group) 2>/dev/null || true; }"
  study="echo \$\$ > ~/group; ~/venv/bin/python -m dapt_jax.main --config.runtime.multi_process=on $(quoted "$@"); echo \$? > ~/ended"
  study="cd ~/dapt_jax && rm -f ~/ended && $end_last && setsid nohup bash -c $(quoted "$study") >> ~/study.log 2>&1 < /dev/null &"
  retry "$TRIES" "$POLL_S" on all "$study"
}

# follow: waits for the end of the study; sets `code`: 0, that of a worker that failed, or 75 where it is to be started again.
follow() {
  local answer lost=0
  while :; do
    if [[ -n ${DRY_RUN:-} ]]; then
      on all 'cat ~/ended 2>/dev/null || echo running'
      code=0
      return
    fi
    if answer=$(on all 'cat ~/ended 2>/dev/null || echo running' 2>/dev/null); then
      lost=0
      code=$(grep -xE '[0-9]+' <<<"$answer" | grep -vx 0 | head -n 1 || true)
      [[ -z $code ]] || return 0
      if ! grep -qx running <<<"$answer"; then
        code=0
        return
      fi
    else
      case $(state) in
        ACTIVE | UNKNOWN)
          lost=$((lost + 1))
          say "no answer from $NAME, try $lost of $TRIES: the study goes on without this connection"
          ((lost < TRIES)) || fail "no answer from $NAME: look with '$0 tail', or go on with '$0 run'"
          ;;
        *)
          say "$NAME was taken away"
          code=75
          return
          ;;
      esac
    fi
    sleep "$POLL_S"
  done
}

# ready: a TPU with the study installed, a new one where the last was taken away.
ready() {
  local found
  found=$(state)
  case $found in
    ACTIVE) [[ -n ${DRY_RUN:-} || $1 == again ]] || setup ;;
    MISSING)
      create
      setup
      ;;
    UNKNOWN) fail "gcloud does not say what $NAME is; is it logged in, and is the --project right?" ;;
    WAITING_FOR_RESOURCES | ACCEPTED | PROVISIONING | CREATING) fail "$NAME is $found: it was asked for already; wait, or delete it" ;;
    *)
      say "$NAME is $found: deleting it and asking for another"
      delete
      create
      setup
      ;;
  esac
}

study() {
  local number
  if [[ -n ${DRY_RUN:-} ]]; then
    create
    setup
  else
    ready first
  fi
  for ((number = 0; ; number++)); do
    code=75
    if start "$@"; then follow; else say "the study could not be started on $NAME"; fi
    case $code in
      0)
        say "done"
        return
        ;;
      75 | 134 | 137 | 143 | 255) ;;
      *) fail "the study ended with exit code $code; see '$0 tail'" "$code" ;;
    esac
    ((number < RESTARTS)) || fail "exit code $code after $number restarts: no more of them" "$code"
    say "starting again ($((number + 1)) of $RESTARTS)"
    ready again
  done
}

case $ACTION in
  create) create ;;
  setup) setup ;;
  run) study "$@" ;;
  tail) on 0 'tail -n 100 -F ~/study.log' ;;
  delete) delete ;;
esac
