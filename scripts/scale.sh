#!/usr/bin/env bash
# Measures the cost of a large database. Runs `keybroker bench` alternately on a database of a thousand records and on one
# of a million, with SoftHSM and each engine on its own server. All files are in a temporary folder. The table at the end
# shows the medians of the rounds, and the median of the rounds' ratios.
#
# Usage: scale.sh [--engine sqlite|postgres|mariadb]… [--records COUNT] [--rounds COUNT] [--seconds COUNT] [PROGRAM]
#
#   scale.sh                                        all three engines, a million records: about an hour, 4 GB
#   scale.sh --engine sqlite --records 10000 --rounds 1 --seconds 2
set -euo pipefail
umask 077
cd "$(dirname "$0")/.."
# shellcheck source=scripts/database-servers.sh
. scripts/database-servers.sh
# shellcheck source=scripts/bench-site.sh
. scripts/bench-site.sh

ENGINES=()
FEW=1000
MANY=1000000
ROUNDS=9
SECONDS_EACH=6
CONNECTIONS=32
READY_SECONDS=60
# The server's own page cache. MariaDB bypasses the kernel's cache, so with a smaller cache than the database most calls
# would read from the disk.
PAGES=2G

PROGRAM=
WORK=

step() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

fail() {
  printf 'scale: %s\n' "$1" >&2
  exit 1
}

clean_up() {
  local status=$?
  trap - EXIT INT TERM
  stop_server
  [[ -z $WORK ]] || rm -rf "$WORK"
  exit "$status"
}

# --- the databases ---------------------------------------------------------------------------------------------------

sqlite_start() { :; }
sqlite_url() { printf 'sqlite:%s/%s/keybroker.db' "$WORK" "$1"; }
sqlite_settle() { sqlite3 "$WORK/$1/keybroker.db" 'PRAGMA wal_checkpoint(TRUNCATE)' >/dev/null; }

postgres_start() {
  local name
  postgres_server -c shared_buffers="${PAGES}B" -c max_wal_size=4GB
  for name in few many; do createdb "$name"; done
}
postgres_url() { printf 'postgres://keybroker@/%s?socket=%s' "$1" "$SERVER"; }
# Do the server's background work now and not during the measurement.
postgres_settle() { psql --quiet --dbname="$1" --command='VACUUM ANALYZE' --command='CHECKPOINT'; }

mariadb_start() {
  local name
  mariadb_server --innodb-buffer-pool-size="$PAGES"
  for name in few many; do mariadb_sql --execute="CREATE DATABASE $name; GRANT ALL ON $name.* TO keybroker@localhost"; done
}
mariadb_url() { printf 'mariadb://keybroker@/%s?socket=%s/socket' "$1" "$SERVER"; }
mariadb_settle() { mariadb_sql "$1" --execute='ANALYZE TABLE records, revisions' >/dev/null; }

# --- the measurements ------------------------------------------------------------------------------------------------

# Runs the benchmark once, and writes its figures to a separate file.
measure() {
  local name=$1 count=$2 seconds=$3 file=$4
  broker "$name" bench --seed "$count" --seconds "$seconds" --warm-up 3 --connections "$CONNECTIONS" --json "$file" \
    --ca "$WORK/pki/ca.pem" --cert "$WORK/pki/load.pem" --key "$WORK/pki/load.key"
}

median() { jq --slurp "$MEDIAN map(.$1) | median" "$WORK"/figures/"$2"-"$3"-*.json; }

# The median of the rounds' ratios. The two runs of a round follow each other, so other load of the machine affects both.
ratio() {
  jq --null-input "$MEDIAN"' [$few, $many | map(.[$field])] | transpose | map(.[1] / .[0]) | median' --arg field "$1" \
    --slurpfile few <(cat "$WORK"/figures/"$2"-few-*.json) --slurpfile many <(cat "$WORK"/figures/"$2"-many-*.json)
}

engine() {
  local engine=$1 round began name order
  step "$engine: writing $FEW and $MANY records"
  "${engine}_start"
  site "$engine" few "$("${engine}_url" few)"
  site "$engine" many "$("${engine}_url" many)"
  measure few "$FEW" 1 "$WORK/said.json"
  began=$SECONDS
  measure many "$MANY" 1 "$WORK/said.json"
  printf '%d records after %d s\n' "$MANY" $((SECONDS - began))
  for name in few many; do "${engine}_settle" "$name"; done
  for round in $(seq "$ROUNDS"); do
    # Alternate the order in each round.
    if ((round % 2)); then order=(few many); else order=(many few); fi
    for name in "${order[@]}"; do
      local -n count=${name^^}
      measure "$name" "$count" "$SECONDS_EACH" "$WORK/figures/$engine-$name-$(printf %03d "$round").json"
    done
    printf 'round %d: %s /s and %s /s\n' "$round" "$(jq .broker_ops_per_s "$WORK/figures/$engine-few-$(printf %03d "$round").json")" \
      "$(jq .broker_ops_per_s "$WORK/figures/$engine-many-$(printf %03d "$round").json")"
  done
  stop_server
}

table() {
  local engine field few many
  printf '\n%-10s %-22s %12s %12s %8s\n' engine figure "$FEW" "$MANY" ratio
  for engine in "${ENGINES[@]}"; do
    for field in broker_ops_per_s share front_cpu_ms_per_op p50_ms p99_ms; do
      few=$(median "$field" "$engine" few)
      many=$(median "$field" "$engine" many)
      printf '%-10s %-22s %12.3f %12.3f %8.3f\n' "$engine" "$field" "$few" "$many" "$(ratio "$field" "$engine")"
    done
  done
}

main() {
  while [[ $# -gt 0 ]]; do
    case $1 in
      --engine) ENGINES+=("${2:-}"); shift 2 ;;
      --records) MANY=${2:-}; shift 2 ;;
      --rounds) ROUNDS=${2:-}; shift 2 ;;
      --seconds) SECONDS_EACH=${2:-}; shift 2 ;;
      *) PROGRAM=$1; shift ;;
    esac
  done
  [[ ${#ENGINES[@]} -gt 0 ]] || ENGINES=(sqlite postgres mariadb)
  check_engines "${ENGINES[@]}"
  local engine
  command -v jq >/dev/null || fail 'jq is not installed: apt-get install jq'
  trap clean_up EXIT
  trap 'exit 130' INT TERM
  release_program
  WORK=$(mktemp -d "${TMPDIR:-/tmp}/keybroker-scale.XXXXXX")
  mkdir "$WORK/figures"
  token
  for engine in "${ENGINES[@]}"; do engine "$engine"; done
  table
  printf 'scale: ok\n'
}

main "$@"
