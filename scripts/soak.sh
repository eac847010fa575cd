#!/usr/bin/env bash
# Runs the release build under load for hours, with a fault or a change every 30 seconds: killed token workers, an absent
# token, return codes, lost sessions, a hanging call, a restarted and a frozen database, new certificates, changed policies,
# a full disk, and a rotation of the wrapping key with a re-wrap that continues during the next faults. Uses SoftHSM behind a
# module that misbehaves on command, and PostgreSQL, in temporary folders. Prints whether the run passed, and writes the
# results as JSON.
#
# The run fails if fewer than 99.9 % of the calls succeed with the retry rule, if a caller receives a wrong key, if an
# acknowledged key is lost, or if memory, descriptors or threads grow (checked from one hour on).
#
# Usage: soak.sh HOURS [--every SECONDS] [--seed NUMBER] [--json FILE]
#
#   soak.sh 8
#   soak.sh 0.1 --every 5 --seed 7
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  printf 'soak: %s\n' "$1" >&2
  exit 2
}

main() {
  local hours='' every=30 seed='' json=$PWD/target/soak.json
  while [[ $# -gt 0 ]]; do
    case $1 in
      --every | --seed | --json) [[ $# -gt 1 ]] || fail "$1 needs a value" ;;&
      --every) every=$2; shift 2 ;;
      --seed) seed=$2; shift 2 ;;
      --json) json=$(realpath --canonicalize-missing "$2"); shift 2 ;;
      -*) fail "unknown option $1" ;;
      *) [[ -z $hours ]] || fail "more than one number of hours: $hours and $1"; hours=$1; shift ;;
    esac
  done
  [[ $hours =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail 'pass the number of hours, for example: scripts/soak.sh 8'
  [[ $every =~ ^[1-9][0-9]*$ ]] || fail '--every must be a number of seconds'
  [[ $seed =~ ^[0-9]*$ ]] || fail '--seed must be a number'
  local seconds
  seconds=$(awk -v hours="$hours" 'BEGIN { printf "%d", hours * 3600 }')
  ((seconds >= every)) || fail "the run must be longer than $every s, the time from one fault to the next"

  scripts/install.sh --tools
  cargo build --release --package keybroker
  export KEYBROKER_TEST_PROGRAM=$PWD/target/release/keybroker
  export KEYBROKER_TEST_SOAK_SECONDS=$seconds KEYBROKER_TEST_SOAK_EVERY_SECONDS=$every KEYBROKER_TEST_SOAK_FILE=$json
  [[ -z $seed ]] || export KEYBROKER_TEST_SOAK_SEED=$seed
  KEYBROKER_TEST_COMMIT=$(git describe --always --dirty 2>/dev/null || true)
  export KEYBROKER_TEST_COMMIT
  mkdir -p "$(dirname "$json")"
  cargo nextest run --profile long --workspace --test it -E 'test(no_fault_of_a_long_run)'
  printf 'soak: the results are in %s\n' "$json"
}

main "$@"
