#!/usr/bin/env bash
# Compares the cost of two keybroker binaries, for example of the last release and of a change. Runs `keybroker bench` with
# each binary alternately, with SoftHSM, RSA-2048 and SQLite in a temporary folder. The table at the end shows the medians
# of the rounds, and the median of the rounds' ratios (new divided by old). The two runs of a round follow each other, so
# that other load of the machine affects both.
#
# Usage: compare.sh [--rounds COUNT] [--seconds COUNT] [--connections COUNT] OLD NEW
#
#   compare.sh ~/keybroker-1.0 target/release/keybroker
set -euo pipefail
umask 077
cd "$(dirname "$0")/.."
# shellcheck source=scripts/bench-site.sh
. scripts/bench-site.sh

ROUNDS=9
SECONDS_EACH=6
CONNECTIONS=64
RECORDS=1000

PROGRAM=
WORK=
declare -A PROGRAMS=()

fail() {
  printf 'compare: %s\n' "$1" >&2
  exit 1
}

clean_up() {
  local status=$?
  trap - EXIT INT TERM
  [[ -z $WORK ]] || rm -rf "$WORK"
  exit "$status"
}

# Runs the benchmark once with the binary of this name, and writes its figures to a separate file.
measure() {
  local name=$1 seconds=$2 file=$3
  PROGRAM=${PROGRAMS[$name]}
  broker "$name" bench --seed "$RECORDS" --seconds "$seconds" --warm-up 2 --connections "$CONNECTIONS" --json "$file" \
    --ca "$WORK/pki/ca.pem" --cert "$WORK/pki/load.pem" --key "$WORK/pki/load.key"
}

figures() { cat "$WORK"/figures/"$1"-*.json; }

table() {
  local field
  printf '\n%-36s %12s %12s %8s\n' figure old new ratio
  for field in broker_ops_per_s share front_cpu_ms_per_op worker_cpu_ms_per_op broker_cpu_ms_per_op_beyond_token p50_ms p99_ms; do
    jq --null-input --raw-output "$MEDIAN"'
      [$old, $new | map(.[$field])]
      | [(.[0] | median), (.[1] | median), (transpose | map(.[1] / .[0]) | median)] | @tsv' \
      --arg field "$field" --slurpfile old <(figures old) --slurpfile new <(figures new) \
      | { read -r old new ratio; printf '%-36s %12.3f %12.3f %8.3f\n' "$field" "$old" "$new" "$ratio"; }
  done
}

main() {
  local binaries=() name round order
  while [[ $# -gt 0 ]]; do
    case $1 in
      --rounds) ROUNDS=${2:-}; shift 2 ;;
      --seconds) SECONDS_EACH=${2:-}; shift 2 ;;
      --connections) CONNECTIONS=${2:-}; shift 2 ;;
      -*) fail "unknown argument $1" ;;
      *) binaries+=("$(realpath "$1")"); shift ;;
    esac
  done
  [[ ${#binaries[@]} -eq 2 ]] || fail 'two binaries are needed
usage: compare.sh [--rounds COUNT] [--seconds COUNT] [--connections COUNT] OLD NEW'
  PROGRAMS=([old]=${binaries[0]} [new]=${binaries[1]})
  for name in old new; do [[ -x ${PROGRAMS[$name]} ]] || fail "${PROGRAMS[$name]} is not a program"; done
  command -v jq >/dev/null || fail 'jq is not installed: apt-get install jq'
  trap clean_up EXIT
  trap 'exit 130' INT TERM
  WORK=$(mktemp -d "${TMPDIR:-/tmp}/keybroker-compare.XXXXXX")
  mkdir "$WORK/figures"
  token
  for name in old new; do
    PROGRAM=${PROGRAMS[$name]}
    site compare "$name" "sqlite:$WORK/$name/keybroker.db"
    measure "$name" 1 "$WORK/discarded.json"
  done
  for round in $(seq "$ROUNDS"); do
    if ((round % 2)); then order=(old new); else order=(new old); fi
    for name in "${order[@]}"; do measure "$name" "$SECONDS_EACH" "$WORK/figures/$name-$(printf %03d "$round").json"; done
    printf 'round %d of %d done (%d s)\n' "$round" "$ROUNDS" "$SECONDS"
  done
  table
  printf 'compare: ok\n'
}

main "$@"
