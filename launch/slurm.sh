#!/usr/bin/env bash
# Submits a study to Slurm.
#
#   launch/slurm.sh [--dry_run] [--nodes=N] [--gpus=N] [--time=D-HH:MM] [--partition=P] [--account=A] [--name=NAME]
#     -- --config=FILE --workdir=FOLDER [FLAG...]
#
#   --gpus=N  per node, and as many processes: each has one GPU
#
# In the environment: TRIES (default 5), POLL_S (default 30) between them, PYTHON (default python3) on the nodes.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TRIES=${TRIES:-5} POLL_S=${POLL_S:-30}
options=()
while (($#)); do
  case $1 in
    --dry_run) DRY_RUN=1 ;;
    --nodes=* | --time=* | --partition=* | --account=*) options+=("$1") ;;
    --gpus=*) options+=("--gpus-per-node=${1#*=}" "--ntasks-per-node=${1#*=}") ;;
    --name=*) options+=("--job-name=${1#*=}") ;;
    --)
      shift
      break
      ;;
    *) fail "unknown flag $1; expected --nodes=, --gpus=, --time=, --partition=, --account=, --name=, then -- and the study's flags" 2 ;;
  esac
  shift
done
(($#)) || fail "no flags of a study; expected -- --config=FILE --workdir=FOLDER" 2
whole TRIES "$TRIES" 1
whole POLL_S "$POLL_S" 0

script=$(dirname "${BASH_SOURCE[0]}")/slurm.sbatch
submit=(sbatch --parsable ${options[@]+"${options[@]}"} "$script" "$@")
if [[ -n ${DRY_RUN:-} ]]; then
  run "${submit[@]}"
  DRY_RUN=1 "$BASH" "$script" "$@"
  exit 0
fi
for ((try = 1; ; try++)); do
  code=0
  answer=$("${submit[@]}" 2>&1) || code=$?
  ((code)) || break
  # Slurm says so where its controller is busy; everything else would be the same the next time.
  grep -qiE "timed out|temporarily|unable to contact" <<<"$answer" || fail "not submitted: $(tail -n 1 <<<"$answer")"
  ((try < TRIES)) || fail "not submitted after $TRIES tries: $(tail -n 1 <<<"$answer")"
  say "sbatch failed (exit $code), try $try of $TRIES; again in $POLL_S s"
  sleep "$POLL_S"
done
job=${answer%%;*}
say "job $job; its log is dapt_jax-$job.log"
