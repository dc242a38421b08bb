#!/usr/bin/env bash
# Runs a study on this machine, and starts it again when it was told to stop (exit code 75).
#
#   launch/local.sh [--dry_run] [--processes=N] [--restarts=N] [--port=N] -- --config=FILE --workdir=FOLDER [FLAG...]
#
#   --processes=N  processes, told of each other by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID
#   --restarts=N   starts after the first, at most (default 100); a process that was killed counts as told to stop
#   --port=N       of the coordinator (default 12355)
#
# In the environment: PYTHON (default python3), DAPT_JAX_ALLOCATOR=off, GRACE_S (default 30): seconds
# that the other processes have to save when one has ended.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

PYTHON=${PYTHON:-python3}
GRACE_S=${GRACE_S:-30}
PROCESSES=1 RESTARTS=100 PORT=12355
while (($#)); do
  case $1 in
    --dry_run) DRY_RUN=1 ;;
    --processes=*) PROCESSES=${1#*=} ;;
    --restarts=*) RESTARTS=${1#*=} ;;
    --port=*) PORT=${1#*=} ;;
    --)
      shift
      break
      ;;
    *) fail "unknown flag $1; expected --dry_run, --processes=N, --restarts=N, --port=N, then -- and the study's flags" 2 ;;
  esac
  shift
done
(($#)) || fail "no flags of a study; expected -- --config=FILE --workdir=FOLDER" 2
whole --processes "$PROCESSES" 1
whole --restarts "$RESTARTS" 0
whole --port "$PORT" 1
whole GRACE_S "$GRACE_S" 0

# glibc reads its settings when a process starts: given here, the command does not have to start itself again.
if [[ ${DAPT_JAX_ALLOCATOR:-} != off && $(uname -s) == Linux ]]; then
  export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
  export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-4294967296} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-4294967296}
  export DAPT_JAX_ALLOCATOR=set
fi

if [[ -n ${DRY_RUN:-} ]]; then
  for name in GLIBC_TUNABLES MALLOC_MMAP_THRESHOLD_ MALLOC_TRIM_THRESHOLD_ DAPT_JAX_ALLOCATOR; do
    [[ -n ${!name:-} ]] && printf 'export %s=%q\n' "$name" "${!name}"
  done
  for ((rank = 0; rank < PROCESSES; rank++)); do
    ((PROCESSES > 1)) && printf 'JAX_COORDINATOR_ADDRESS=localhost:%s JAX_NUM_PROCESSES=%s JAX_PROCESS_ID=%s ' "$PORT" "$PROCESSES" "$rank"
    run "$PYTHON" -m dapt_jax.main "$@"
  done
  exit 0
fi

children=()
asked=""
pass_on() {
  asked=$1
  for child in "${children[@]}"; do kill "-$1" "$child" 2>/dev/null || true; done
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

# start FLAG...: one start of the study; sets `code`: that of the process that ended first with an error, else 0.
start() {
  local rank child one still deadline=0
  children=() code=0
  for ((rank = 0; rank < PROCESSES; rank++)); do
    if ((PROCESSES > 1)); then
      JAX_COORDINATOR_ADDRESS=localhost:$PORT JAX_NUM_PROCESSES=$PROCESSES JAX_PROCESS_ID=$rank "$PYTHON" -m dapt_jax.main "$@" &
    else
      "$PYTHON" -m dapt_jax.main "$@" &
    fi
    children+=($!)
  done
  while ((${#children[@]})); do
    sleep 0.2
    still=()
    for child in "${children[@]}"; do
      if kill -0 "$child" 2>/dev/null; then
        still+=("$child")
        continue
      fi
      one=0
      wait "$child" || one=$?
      ((code)) || code=$one
    done
    children=(${still[@]+"${still[@]}"})
    ((code && ${#children[@]})) || continue
    # Those that are left wait for the one that is gone, and may not come to a step at which to save.
    if ((!deadline)); then
      say "a process has ended (exit $code): the other ${#children[@]} are told to save and stop"
      for child in "${children[@]}"; do kill -TERM "$child" 2>/dev/null || true; done
      deadline=$((SECONDS + GRACE_S))
    elif ((SECONDS > deadline)); then
      for child in "${children[@]}"; do kill -KILL "$child" 2>/dev/null || true; done
    fi
  done
}

for ((number = 0; ; number++)); do
  start "$@"
  ((code)) || exit 0
  [[ -n $asked ]] && exit "$code"
  # 128 + SIGKILL and 128 + SIGTERM: by the kernel for want of memory, or by someone who did not wait; 128 + SIGABRT: by JAX, when
  # another process is gone.
  ((code == RESTART_CODE || code == 134 || code == 137 || code == 143)) || exit "$code"
  ((number < RESTARTS)) || fail "exit code $code after $number restarts: no more of them" "$code"
  say "exit code $code: starting again ($((number + 1)) of $RESTARTS)"
done
