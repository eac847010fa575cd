#!/usr/bin/env bash
# Shows where the processor time of an unwrap goes. Runs `keybroker bench` with SoftHSM, RSA-2048 and SQLite in a temporary
# folder, samples the front and the workers with `perf`, and prints the microseconds per unwrap for each part of the code. A sample
# belongs to the innermost function of its call chain that matches a part. The binary needs its symbols, which `strip = "debuginfo"`
# keeps.
#
# Usage: profile.sh [--sealed] [--seconds COUNT] [--connections COUNT] PROGRAM
#
#   profile.sh target/release/keybroker
#   profile.sh --sealed target/release/keybroker    each unwrap is a sealed release
set -euo pipefail
umask 077
cd "$(dirname "$0")/.."
# shellcheck source=scripts/bench-site.sh
. scripts/bench-site.sh

SECONDS_EACH=10
CONNECTIONS=64
PURPOSE=
RECORDS=1000
# Bytes of the stack in each sample. The polls of nested futures need much.
STACK_BYTES=32768
SAMPLES_PER_S=2999

PROGRAM=
WORK=
BENCH=

# A part of the front and an extended regular expression of its functions, in the order of precedence.
PARTS='logging and spans:tracing|sharded_slab
policy:cedar_policy|keybroker_policy
allocation:_rjem|malloc|_int_free
audit thread:keybroker_audit::writer
audit entry:keybroker_audit
SQLite:sqlite3|rusqlite
database driver:sqlx|flume
store:keybroker_store
token queue and worker protocol:keybroker_hsm|keybroker_worker_protocol
broker:keybroker_broker
metrics:metrics
API:keybroker_api
TLS:rustls|aws_lc
HTTP/2:h2::|hyper
gRPC and routing:tonic|tower|axum|keybroker_proto
listener:keybroker::
runtime, waiting for sockets:tokio::runtime::io
runtime, timers and other:tokio'
WORKER_PARTS='C_Verify (row MAC):C_Verify|operation::verify
C_UnwrapKey (user key):C_UnwrapKey
C_WrapKey (to the recipient):C_WrapKey
C_DestroyObject (user key):C_DestroyObject
C_Decrypt (user key):C_Decrypt|operation::decrypt|cryptoki
receiving jobs:Inbox|recv|lock_contended
sending replies:Replies|__send'

fail() {
  printf 'profile: %s\n' "$1" >&2
  exit 1
}

clean_up() {
  local status=$?
  trap - EXIT INT TERM
  [[ -z $BENCH ]] || kill "$BENCH" 2>/dev/null || true
  [[ -z $BENCH ]] || wait "$BENCH" || true
  [[ -z $WORK ]] || rm -rf "$WORK"
  exit "$status"
}

# Samples processes (a list of ids with commas) into a file.
sample() {
  perf record --quiet --freq "$SAMPLES_PER_S" --call-graph "dwarf,$STACK_BYTES" --output "$WORK/$2" --pid "$1" \
    -- sleep "$3" >/dev/null 2>&1 || fail 'perf record failed (see the sysctl kernel.perf_event_paranoid)'
}

# Prints a line for each part. $1 is the file with samples, $2 the parts, $3 the milliseconds per unwrap of all samples together.
parts() {
  perf script --input "$WORK/$1" --fields comm,tid,ip,sym --no-inline 2>/dev/null | awk -v "parts=$2" -v "total_ms=$3" '
    function count_sample(  at, part) {
      if (depth == 0) return
      samples++
      for (at = 1; at <= depth; at++)
        for (part = 1; part <= number; part++)
          if (stack[at] ~ pattern[part]) { counted[part]++; return }
      others++
    }
    BEGIN {
      number = split(parts, lines, "\n")
      for (at = 1; at <= number; at++) { split(lines[at], half, ":"); name[at] = half[1]; pattern[at] = substr(lines[at], length(half[1]) + 2) }
    }
    /^[^ \t]/ { count_sample(); depth = 0; next }
    NF > 1 { $1 = ""; stack[++depth] = $0 }
    END {
      count_sample()
      if (samples == 0) exit 1
      for (part = 1; part <= number; part++) printf "%-34s %8.1f us\n", name[part], counted[part] / samples * total_ms * 1000
      printf "%-34s %8.1f us\n", "other", others / samples * total_ms * 1000
      printf "%-34s %8.1f us\n", "total", total_ms * 1000
    }'
}

main() {
  local front='' workers='' figures
  while [[ $# -gt 0 ]]; do
    case $1 in
      --sealed) PURPOSE=sealed; shift ;;
      --seconds) SECONDS_EACH=${2:-}; shift 2 ;;
      --connections) CONNECTIONS=${2:-}; shift 2 ;;
      -*) fail "unknown argument $1" ;;
      *) [[ -z $PROGRAM ]] || fail 'more than one program'; PROGRAM=$(realpath "$1"); shift ;;
    esac
  done
  [[ -x $PROGRAM ]] || fail 'a program is needed
usage: profile.sh [--sealed] [--seconds COUNT] [--connections COUNT] PROGRAM'
  command -v perf >/dev/null || fail 'perf is not installed: apt-get install linux-perf'
  command -v jq >/dev/null || fail 'jq is not installed: apt-get install jq'
  trap clean_up EXIT
  trap 'exit 130' INT TERM
  WORK=$(mktemp -d "${TMPDIR:-/tmp}/keybroker-profile.XXXXXX")
  token
  site profile site "sqlite:$WORK/site/keybroker.db" 2048 "$PURPOSE"
  # The measurement is longer than both samplings together.
  "$PROGRAM" --config "$WORK/site/keybroker.toml" bench --seed "$RECORDS" --connections "$CONNECTIONS" --warm-up 2 \
    --seconds "$((2 * SECONDS_EACH + 8))" --json "$WORK/figures.json" \
    --ca "$WORK/pki/ca.pem" --cert "$WORK/pki/load.pem" --key "$WORK/pki/load.key" >"$WORK/said" 2>&1 &
  BENCH=$!
  for _ in $(seq 600); do
    front=$(pgrep --parent "$BENCH" --full ' serve( |$)' || true)
    [[ -z $front ]] || break
    kill -0 "$BENCH" 2>/dev/null || fail "$(cat "$WORK/said")"
    sleep 0.2
  done
  [[ -n $front ]] || fail 'the broker did not start'
  sleep 5
  workers=$(pgrep --parent "$front" --delimiter ,)
  sample "$front" front "$SECONDS_EACH"
  sample "$workers" worker "$SECONDS_EACH"
  wait "$BENCH" || fail "$(cat "$WORK/said")"
  BENCH=
  figures=$WORK/figures.json
  printf '%s connections, %.0f unwraps/s, beyond the token %.3f ms per unwrap\n' "$CONNECTIONS" \
    "$(jq .broker_ops_per_s "$figures")" "$(jq .broker_cpu_ms_per_op_beyond_token "$figures")"
  printf '\nFront\n'
  parts front "$PARTS" "$(jq .front_cpu_ms_per_op "$figures")"
  printf '\nWorkers (the token alone: %.0f us)\n' "$(jq '.token_cpu_ms_per_op * 1000' "$figures")"
  parts worker "$WORKER_PARTS" "$(jq .worker_cpu_ms_per_op "$figures")"
}

main "$@"
