#!/usr/bin/env bash
# What the launchers share. Exit codes of a study: 0 done, 2 a mistake to mend, 75 told to stop (a restart goes on), 130 stopped
# by a person.
# shellcheck disable=SC2034 # for those who source this file
RESTART_CODE=75

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
fail() {
  say "$1"
  exit "${2:-1}"
}

# whole NAME VALUE LEAST: refuses a flag or variable that is not a whole number from LEAST on: as arithmetic, a word would end the
# script where it is first read, which may be hours later, and 0 processes would do nothing and succeed.
whole() {
  if [[ ! $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < $3)); then fail "$1 is '$2'; expected a whole number from $3" 2; fi
}

# run CMD...: runs a command, or prints it where DRY_RUN is set, quoted so that it can be pasted.
run() {
  if [[ -n "${DRY_RUN:-}" ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# retry TIMES SECONDS CMD...: calls a command or a function again after a pause while it fails.
retry() {
  local times=$1 pause=$2 try code=0
  shift 2
  for ((try = 1; try <= times; try++)); do
    code=0
    "$@" || code=$?
    ((code == 0)) && return 0
    ((try == times)) || {
      say "a command failed (exit $code), try $try of $times; again in $pause s"
      sleep "$pause"
    }
  done
  return "$code"
}

# quoted WORD...: the words as one line that a shell reads back as the same words.
quoted() {
  local line
  printf -v line '%q ' "$@"
  printf '%s' "${line% }"
}
