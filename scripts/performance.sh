#!/usr/bin/env bash
# Repeats all measurements of docs/performance.md: every scenario of `keybroker bench` with SoftHSM and SQLite in a temporary
# folder, plain and sealed releases with SoftHSM and Kryoptic, overload on a token that takes 20 ms longer for each unwrap, and
# three simulated devices. Writes the JSON documents and the charts to docs/performance, and the tables to docs/performance.md.
# Takes about twenty minutes, without the build.
#
# Usage: performance.sh [--seconds COUNT] [--members COUNT] [--largest COUNT] [--storm-seconds COUNT] [--idle COUNT] [--only NAME]…
#                       [--commit ID] [PROGRAM]
#        performance.sh --tables [PROGRAM]
#
#   performance.sh                    everything, with a release build of this commit
#   performance.sh --seconds 30       the same with longer measurements, about half an hour
#   performance.sh --only steady-2048-long    ten minutes of steady load, which is measured only on request
#   performance.sh --only storm --members 4000 --storm-seconds 20
#   performance.sh --commit 1a2b3c4 ~/keybroker-1a2b3c4    without --commit, no commit is recorded for another program
#   performance.sh --tables           only draws the charts and writes the tables, from the existing documents
set -euo pipefail
umask 077
cd "$(dirname "$0")/.."
# shellcheck source=scripts/bench-site.sh
. scripts/bench-site.sh

PAGE=docs/performance.md
RESULTS=docs/performance
# Duration of the long measurement.
LONG_SECONDS=600
# Duration of each other measurement. Below 30 s, the tables mark a run as short.
SECONDS_EACH=8
MEMBERS=20000
# The load generator needs a file descriptor for each member that may wait: half of the members.
LARGEST=39800
STORM_SECONDS=60
# Idle connections of each API. The configuration of this script permits that many.
IDLE=4000
SLOW_MS=20
NAMES=(steady-2048 steady-2048-long steady-3072 steady-4096 release-softhsm-{plain,sealed} release-kryoptic-{plain,sealed} open overload
  overload-4096 overload-slow fairness-slow connections storm storm-largest restart device-lanes device-lanes-load device-busy
  device-busy-load device-sessions-load)

PROGRAM=
SCRIPTABLE_MODULE=
COMMIT=
WORK=
ONLY=()

fail() {
  printf 'performance: %s\n' "$1" >&2
  exit 1
}

clean_up() {
  local status=$?
  trap - EXIT INT TERM
  [[ -z $WORK ]] || rm -rf "$WORK"
  exit "$status"
}

# Whether one of these measurements was requested.
wanted() {
  local name
  [[ ${#ONLY[@]} -gt 0 ]] || return 0
  for name in "$@"; do [[ " ${ONLY[*]} " != *" $name "* ]] || return 0; done
  return 1
}

# Adds a second principal to a site, and raises the limits for the idle connections.
extend() {
  cat >>"$WORK/$1/keybroker.toml" <<CONF
[[principal]]
san = "URI:spiffe://dev.example/light"
roles = ["release"]
key_names = ["*"]
[limits]
connections_max = $((4 * IDLE + 1024))
connections_per_principal_max = $((IDLE + 1024))
CONF
}

# Puts the scriptable module in front of SoftHSM for the site $1. The script is on standard input.
script() {
  mkdir "$WORK/$1/script"
  { printf 'module = "%s"\n' "$MODULE"; cat; } >"$WORK/$1/script/script.toml"
  sed -i -e "s|^module = .*|module = \"$SCRIPTABLE_MODULE\"|" \
    -e "s|^\[token.environment\]|&\nSCRIPTABLE_PKCS11_SCRIPT = \"$WORK/$1/script\"|" "$WORK/$1/keybroker.toml"
}

# Measures a simulated device with the name $1, with $2 sessions in each of two workers. One measurement compares the
# throughput with that of $3 threads on the token alone (not with 0 threads), and the other measures the latency over load.
# Further arguments are passed to both measurements. The script of the device is on standard input.
device() {
  local name=$1 sessions=$2 threads=$3
  shift 3
  wanted "device-$name" "device-$name-load" || return 0
  site performance "$name" "sqlite:$WORK/$name/keybroker.db"
  extend "$name"
  sed -i "s|^\[token\]|&\nworkers = 2\nsessions_per_worker = $sessions|" "$WORK/$name/keybroker.toml"
  script "$name"
  [[ $threads -eq 0 ]] || measure "device-$name" "$name" steady --connections 64 --token-threads "$threads" "$@"
  measure "device-$name-load" "$name" open "$@"
}

# Measures the scenario $3 on the site $2 and writes the document $1. Further arguments are passed to `keybroker
# bench`. Exit code 12 means that some calls failed; the document contains their number.
measure() {
  local name=$1 site=$2 scenario=$3 status=0
  shift 3
  wanted "$name" || return 0
  printf '\n== %s (%d s)\n' "$name" "$SECONDS"
  "$PROGRAM" --config "$WORK/$site/keybroker.toml" bench --scenario "$scenario" --warm-up 2 --seconds "$SECONDS_EACH" \
    --json "$WORK/result.json" ${COMMIT:+--commit "$COMMIT"} \
    --ca "$WORK/pki/ca.pem" --cert "$WORK/pki/load.pem" --key "$WORK/pki/load.key" "$@" || status=$?
  [[ $status -eq 0 || $status -eq 12 ]] || fail "$name: exit code $status"
  install -m 644 "$WORK/result.json" "$RESULTS/$name.json"
}

# Measures plain or sealed releases ($1) with SoftHSM and with Kryoptic. Threads of one process use Kryoptic one after another,
# so each worker has one session.
release_form() {
  local form=$1
  if wanted "release-softhsm-$form"; then
    site performance "softhsm-$form" "sqlite:$WORK/softhsm-$form/keybroker.db" 2048 "$form"
    extend "softhsm-$form"
    measure "release-softhsm-$form" "softhsm-$form" steady
  fi
  if wanted "release-kryoptic-$form"; then
    # The module is beside its token, because the folder of the build can be writable for others.
    local MODULE=$WORK/kryoptic.so ENVIRONMENT="KRYOPTIC_CONF = \"$WORK/kryoptic-$form.sql\""
    install -m 700 "$(scripts/kryoptic.sh)" "$MODULE"
    site performance "kryoptic-$form" "sqlite:$WORK/kryoptic-$form/keybroker.db" 2048 "$form"
    extend "kryoptic-$form"
    sed -i "s|^\[token\]|&\nworkers = 2\nsessions_per_worker = 1|" "$WORK/kryoptic-$form/keybroker.toml"
    measure "release-kryoptic-$form" "kryoptic-$form" steady
  fi
}

measure_all() {
  local bits form seconds=$SECONDS_EACH
  token
  scripts/dev-ca.sh "$WORK/pki" light
  for bits in 2048 3072 4096; do
    [[ $bits -eq 2048 ]] || wanted "steady-$bits" "overload-$bits" || continue
    site performance "rsa-$bits" "sqlite:$WORK/rsa-$bits/keybroker.db" "$bits"
    extend "rsa-$bits"
    measure "steady-$bits" "rsa-$bits" steady
  done
  if [[ " ${ONLY[*]} " == *" steady-2048-long "* ]]; then
    SECONDS_EACH=$LONG_SECONDS
    measure steady-2048-long rsa-2048 steady
    SECONDS_EACH=$seconds
  fi
  for form in plain sealed; do release_form "$form"; done
  measure open rsa-2048 open
  measure overload rsa-2048 overload
  measure overload-4096 rsa-4096 overload
  measure connections rsa-2048 connections --idle "$IDLE"
  measure restart rsa-2048 restart --restarts 2
  SECONDS_EACH=$STORM_SECONDS
  measure storm rsa-2048 storm --members "$MEMBERS"
  measure storm-largest rsa-2048 storm --members "$LARGEST"
  SECONDS_EACH=$seconds
  device lanes 15 30 --note "each operation takes 50 ms longer; at most 30 operations run at the same time" <<'SCRIPT'
[limits]
parallel_calls = 30
latency_ms = 50
SCRIPT
  device busy 2 4 --note "each operation takes 3 ms longer; the seventh operation at the same time is refused" <<'SCRIPT'
[limits]
parallel_calls = 6
latency_ms = 3
refuse = "CKR_FUNCTION_FAILED"
SCRIPT
  device sessions 7 0 --note "16 sessions; each decryption takes 140 ms longer; all sessions of a worker are closed again and again" \
    <<'SCRIPT'
[sessions]
max = 16
[[rule]]
name = "slow"
function = "C_Decrypt"
do = { delay_ms = 140 }
[[rule]]
name = "closed"
function = "C_Decrypt"
on = { every = 200 }
do = { close_sessions = true }
SCRIPT
  wanted overload-slow fairness-slow || return 0
  site performance slow "sqlite:$WORK/slow/keybroker.db"
  extend slow
  script slow <<SCRIPT
[[rule]]
name = "slow"
function = "C_Decrypt"
do = { delay_ms = $SLOW_MS }
SCRIPT
  measure overload-slow slow overload --note "each unwrap takes $SLOW_MS ms longer"
  measure fairness-slow slow fairness --note "each unwrap takes $SLOW_MS ms longer" \
    --light-cert "$WORK/pki/light.pem" --light-key "$WORK/pki/light.key"
}

# Draws the charts, and replaces the tables between the marks of the page.
draw() {
  local name
  "$PROGRAM" bench-report "$RESULTS"/*.json --out "$WORK" >/dev/null
  find "$WORK" -maxdepth 1 -name '*.svg' -exec install -m 644 -t "$RESULTS" {} +
  for name in "${NAMES[@]}"; do
    [[ -e $WORK/$name.md ]] || continue
    grep -qxF -- "<!-- table: $name -->" "$PAGE" || fail "$PAGE has no place for the table $name"
    awk -v name="$name" -v table="$WORK/$name.md" '
      $0 == "<!-- table: " name " -->" { print; while ((getline line < table) > 0) print line; inside = 1; next }
      $0 == "<!-- end of table -->" { inside = 0 }
      !inside { print }' "$PAGE" >"$WORK/page"
    install -m 644 "$WORK/page" "$PAGE"
  done
}

main() {
  local tables=false target known name
  while [[ $# -gt 0 ]]; do
    case $1 in
      --seconds) SECONDS_EACH=${2:-}; shift 2 ;;
      --members) MEMBERS=${2:-}; shift 2 ;;
      --largest) LARGEST=${2:-}; shift 2 ;;
      --storm-seconds) STORM_SECONDS=${2:-}; shift 2 ;;
      --idle) IDLE=${2:-}; shift 2 ;;
      --only) ONLY+=("${2:-}"); shift 2 ;;
      --commit) COMMIT=${2:-}; shift 2 ;;
      --tables) tables=true; shift ;;
      -*) fail "unknown argument $1" ;;
      *) PROGRAM=$(realpath "$1"); shift ;;
    esac
  done
  known=" ${NAMES[*]} "
  for name in "${ONLY[@]}"; do [[ $known == *" $name "* ]] || fail "there is no measurement $name; the measurements are:$known"; done
  trap clean_up EXIT
  trap 'exit 130' INT TERM
  WORK=$(mktemp -d "${TMPDIR:-/tmp}/keybroker-performance.XXXXXX")
  target=$(cargo metadata --format-version 1 --no-deps --offline | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
  if [[ -z $PROGRAM ]]; then
    # Read before the build. Results are written to the tree, so only changes of other files count.
    if ! $tables && [[ -z $COMMIT ]]; then
      COMMIT=$(git rev-parse --short HEAD)
      git diff --quiet HEAD -- . ":!$RESULTS" ":!$PAGE" || COMMIT+=' with changes'
    fi
    cargo build --release --locked --quiet --package keybroker
    PROGRAM=$target/release/keybroker
  fi
  [[ -x $PROGRAM ]] || fail "$PROGRAM is not a program"
  if ! $tables; then
    if wanted device-{lanes,busy}{,-load} device-sessions-load overload-slow fairness-slow; then
      cargo build --locked --quiet --package keybroker-scriptable-pkcs11
    fi
    SCRIPTABLE_MODULE=$target/debug/libkeybroker_scriptable_pkcs11.so
    mkdir -p "$RESULTS"
    SECONDS=0
    measure_all
  fi
  draw
  printf '\nperformance: ok (%d s)\n' "$SECONDS"
}

main "$@"
