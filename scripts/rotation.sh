#!/usr/bin/env bash
# Rotates the wrapping key three times while clients release user keys at a fixed rate, with SoftHSM and each engine on its
# own server. All files are in a temporary folder. Fails if a call fails, is refused or is late.
#
# Usage: rotation.sh [--engine sqlite|postgres|mariadb]… [--rate CALLS] [--seconds COUNT] [PROGRAM]
#
#   rotation.sh                                all three engines, 500 calls per second: about three minutes
#   rotation.sh --engine sqlite --rate 100
set -euo pipefail
umask 077
cd "$(dirname "$0")/.."
# shellcheck source=scripts/database-servers.sh
. scripts/database-servers.sh
# shellcheck source=scripts/bench-site.sh
. scripts/bench-site.sh

ENGINES=()
RATE=500
SECONDS_EACH=30
ROTATIONS=3
READY_SECONDS=60

PROGRAM=
WORK=
BROKER=

fail() {
  printf 'rotation: %s\n' "$1" >&2
  exit 1
}

stop_broker() {
  [[ -n $BROKER ]] || return 0
  kill "$BROKER" 2>/dev/null || true
  wait "$BROKER" || true
  BROKER=
}

clean_up() {
  local status=$?
  trap - EXIT INT TERM
  stop_broker
  stop_server
  [[ -z $WORK ]] || rm -rf "$WORK"
  exit "$status"
}

url_of() {
  case $1 in
    sqlite) printf 'sqlite:%s/sqlite/keybroker.db' "$WORK" ;;
    postgres) printf 'postgres://keybroker@/rotation?socket=%s' "$SERVER" ;;
    mariadb) printf 'mariadb://keybroker@/rotation?socket=%s/socket' "$SERVER" ;;
  esac
}

start_engine() {
  case $1 in
    sqlite) ;;
    postgres) postgres_server -c max_wal_size=1GB; createdb rotation ;;
    mariadb)
      mariadb_server --innodb-buffer-pool-size=256M
      mariadb_sql --execute='CREATE DATABASE rotation; GRANT ALL ON rotation.* TO keybroker@localhost'
      ;;
  esac
}

# Starts a broker with the admin API on the site $1, and sets ENDPOINT.
start_broker() {
  sed -i 's/^apis = .*/apis = ["grpc", "admin"]/' "$WORK/$1/keybroker.toml"
  cat >>"$WORK/$1/keybroker.toml" <<CONF
[[principal]]
san = "URI:spiffe://dev.example/admin"
roles = ["admin"]
CONF
  "$PROGRAM" --config "$WORK/$1/keybroker.toml" serve --ready-file "$WORK/$1/ready" >"$WORK/broker.log" 2>&1 &
  BROKER=$!
  local deadline=$((SECONDS + READY_SECONDS))
  until [[ -s $WORK/$1/ready ]]; do
    kill -0 "$BROKER" 2>/dev/null || fail "the broker did not start: $(tail -n 5 "$WORK/broker.log")"
    ((SECONDS < deadline)) || fail 'the broker did not become ready'
    sleep 0.1
  done
  ENDPOINT=https://$(grep -oE '127\.0\.0\.1:[0-9]+' "$WORK/$1/ready" | head -n 1)
}

with_certificate() {
  "$PROGRAM" --config "$WORK/$1/keybroker.toml" "${@:3}" --endpoint "$ENDPOINT" --ca "$WORK/pki/ca.pem" \
    --cert "$WORK/pki/$2.pem" --key "$WORK/pki/$2.key"
}

engine() {
  local engine=$1 bench status=0 rotation
  start_engine "$engine"
  site rotation "$engine" "$(url_of "$engine")"
  start_broker "$engine"
  with_certificate "$engine" load bench --attach "$BROKER" --scenario open --rate "$RATE" --warm-up 2 \
    --seconds "$SECONDS_EACH" --json "$WORK/$engine.json" >"$WORK/bench.log" 2>&1 &
  bench=$!
  for rotation in $(seq "$ROTATIONS"); do
    sleep $((SECONDS_EACH / (ROTATIONS + 1)))
    with_certificate "$engine" admin key rotate --single >"$WORK/said" 2>&1 || fail "rotation $rotation: $(cat "$WORK/said")"
  done
  kill -0 "$bench" 2>/dev/null || fail "the calls ended before the last rotation: $(cat "$WORK/bench.log")"
  wait "$bench" || status=$?
  [[ $status -eq 0 || $status -eq 12 ]] || fail "bench: $(cat "$WORK/bench.log")"
  jq --raw-output --arg engine "$engine" --arg rotations "$ROTATIONS" '.rows[0]
    | "\($engine): \($rotations) rotations, \(.in_time) calls in time, \(.late) late, \(.refused) refused, \(.failed) failed, p99 \(.p99_ms) ms"' \
    "$WORK/$engine.json"
  [[ $(jq '.rows[0] | .late + .refused + .failed + .unsent' "$WORK/$engine.json") -eq 0 ]] || fail "$engine: calls failed"
  stop_broker
  stop_server
}

main() {
  while [[ $# -gt 0 ]]; do
    case $1 in
      --engine) ENGINES+=("${2:-}"); shift 2 ;;
      --rate) RATE=${2:-}; shift 2 ;;
      --seconds) SECONDS_EACH=${2:-}; shift 2 ;;
      -*) fail "unknown argument $1" ;;
      *) PROGRAM=$(realpath "$1"); shift ;;
    esac
  done
  [[ ${#ENGINES[@]} -gt 0 ]] || ENGINES=(sqlite postgres mariadb)
  check_engines "${ENGINES[@]}"
  local engine
  command -v jq >/dev/null || fail 'jq is not installed: apt-get install jq'
  trap clean_up EXIT
  trap 'exit 130' INT TERM
  release_program
  WORK=$(mktemp -d "${TMPDIR:-/tmp}/keybroker-rotation.XXXXXX")
  token
  scripts/dev-ca.sh "$WORK/pki" admin
  for engine in "${ENGINES[@]}"; do engine "$engine"; done
  printf 'rotation: ok\n'
}

main "$@"
