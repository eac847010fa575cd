#!/usr/bin/env bash
# Shows the broker at work, with real parts: a SoftHSM token, SQLite, TLS, a gRPC client. Everything lives in a throwaway
# folder and is gone afterwards.
#
# Usage: demo.sh [--keep]                        --keep leaves the broker running and prints commands to try
#        demo.sh --against URL PKI USERS         only the client's part, against a broker that runs already: PKI is a folder
#                                                of dev-ca.sh, USERS one for their keys; a second run finds them enrolled
set -euo pipefail
umask 077
cd "$(dirname "$0")/.."

USERS=100
RSA_BITS=3072
READY_SECONDS=30
BENCH_SECONDS=5

KEEP=no
WORK=
BROKER_PID=
STARTED=$SECONDS

# --- how it looks ----------------------------------------------------------------------------------------------------

if [[ -t 1 ]]; then BOLD=$'\e[1m' DIM=$'\e[2m' PLAIN=$'\e[0m'; else BOLD='' DIM='' PLAIN=''; fi

step() { printf '\n%s== %s%s\n' "$BOLD" "$1" "$PLAIN"; }
note() { printf '   %s\n' "$1"; }
indented() { sed 's/^/   | /'; }
command_line() { printf '   %s$ %s%s\n' "$DIM" "$1" "$PLAIN"; }

fail() {
  printf '\ndemo: %s\n' "$1" >&2
  if [[ -n $WORK && -s $WORK/broker.log ]]; then
    printf 'demo: the end of the broker'\''s log:\n' >&2
    tail -n 20 "$WORK/broker.log" >&2
  fi
  exit 1
}

# --- clean up --------------------------------------------------------------------------------------------------------

stop_broker() {
  [[ -n $BROKER_PID ]] || return 0
  kill -TERM "$BROKER_PID" 2>/dev/null || true
  local status=0
  wait "$BROKER_PID" || status=$?
  BROKER_PID=
  return "$status"
}

clean_up() {
  local status=$?
  trap - EXIT INT TERM HUP
  stop_broker || true
  [[ -z $WORK ]] || rm -rf "$WORK"
  exit "$status"
}

interrupted() {
  printf '\ndemo: interrupted; cleaning up\n' >&2
  exit 130
}

# --- the parts -------------------------------------------------------------------------------------------------------

module() {
  local path
  for path in /usr/lib/softhsm/libsofthsm2.so /usr/lib/*/softhsm/libsofthsm2.so /usr/local/lib/softhsm/libsofthsm2.so; do
    [[ -e $path ]] && { printf '%s' "$path"; return; }
  done
  fail 'SoftHSM is installed but its module libsofthsm2.so is in none of the known places'
}

build() {
  step 'Building in release (minutes the first time)'
  cargo build --release --locked --quiet
  PATH=$(cargo metadata --format-version 1 --no-deps --offline | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/release:$PATH
  note "$(keybroker --version)"
}

token_folder() {
  mkdir "$WORK/tokens"
  cat >"$WORK/softhsm2.conf" <<CONF
directories.tokendir = $WORK/tokens
objectstore.backend = file
log.level = ERROR
slots.removable = false
CONF
  export SOFTHSM2_CONF=$WORK/softhsm2.conf
  openssl rand -hex 12 >"$WORK/pin"
  openssl rand -hex 12 >"$WORK/so-pin"
}

configuration() {
  cat >"$WORK/keybroker.toml" <<CONF
[token]
module = "$(module)"
label = "demo"
pin_file = "$WORK/pin"
# SoftHSM can do RSA-OAEP with SHA-1 only.
allow_oaep_sha1 = true

[token.environment]
SOFTHSM2_CONF = "$WORK/softhsm2.conf"

[store]
url = "sqlite:$WORK/keybroker.db"

[audit]
directory = "$WORK/audit"

[status]
address = "127.0.0.1:0"

[[listener]]
address = "127.0.0.1:0"
doors = ["grpc", "admin"]

[listener.tls]
certificate_file = "$WORK/pki/server.pem"
key_file = "$WORK/pki/server.key"
client_ca_file = "$WORK/pki/ca.pem"

CONF
  local role
  for role in releaser:release enroller:enrol lifecycle:lifecycle admin:admin auditor:auditor 'load:release", "enrol'; do
    printf '[[principal]]\nsan = "URI:spiffe://dev.example/%s"\nroles = ["%s"]\nkey_names = ["*"]\n\n' "${role%%:*}" "${role##*:}" \
      >>"$WORK/keybroker.toml"
  done
}

broker() { keybroker --config "$WORK/keybroker.toml" "$@"; }

# The real gRPC client, with the certificate of the given role.
client() {
  local role=$1
  shift
  keybroker client --endpoint "$ENDPOINT" --ca "$WORK/pki/ca.pem" \
    --cert "$WORK/pki/$role.pem" --key "$WORK/pki/$role.key" "$@"
}

start_broker() {
  # Not through a function: a shell between would take the signals meant for the broker.
  keybroker --config "$WORK/keybroker.toml" serve --ready-file "$WORK/ready" >"$WORK/broker.log" 2>&1 &
  BROKER_PID=$!
  local deadline=$((SECONDS + READY_SECONDS))
  until [[ -s $WORK/ready ]]; do
    kill -0 "$BROKER_PID" 2>/dev/null || fail 'the broker did not start'
    ((SECONDS < deadline)) || fail "the broker was not ready after $READY_SECONDS s"
    sleep 0.05
  done
  ENDPOINT=https://$(grep -oE '127\.0\.0\.1:[0-9]+' "$WORK/ready" | head -n 1)
  STATUS=$(grep -oE '"status":"[0-9.:]+"' "$WORK/ready" | cut -d '"' -f 4)
}

# --- what it shows ---------------------------------------------------------------------------------------------------

prepare() {
  step 'A token, a wrapping key on it, certificates'
  token_folder
  scripts/dev-ca.sh "$WORK/pki" releaser enroller lifecycle admin auditor load
  configuration
  command_line 'keybroker token init'
  broker token init --label demo --pin-file "$WORK/pin" --so-pin-file "$WORK/so-pin" 2>&1 | indented
  command_line 'keybroker store migrate'
  broker store migrate 2>&1 | indented
  command_line "keybroker key generate --bits $RSA_BITS"
  broker key generate --bits "$RSA_BITS" 2>&1 | indented
}

gate() {
  step 'The attribute gate: is the key on the token really one that nobody can copy?'
  command_line 'keybroker token check'
  broker token check 2>&1 | indented
}

enrol() {
  step "Enrolling the keys of $USERS users over mTLS"
  local user started=$SECONDS
  mkdir -p "$WORK/users"
  for user in $(seq -f 'user-%03g' "$USERS"); do
    openssl rand 32 >"$WORK/users/$user.key"
    client enroller create --user "$user" --key-name vault --material-file "$WORK/users/$user.key" >/dev/null \
      || fail "$user could not be enrolled"
  done
  note "$USERS keys wrapped and stored, one client process and one TLS connection each, in $((SECONDS - started)) s"
}

compare() {
  step "Unwrapping each on the token, and comparing"
  local user started=$SECONDS same=0
  for user in $(seq -f 'user-%03g' "$USERS"); do
    rm -f "$WORK/users/$user.back"
    client releaser unwrap --user "$user" --key-name vault --out "$WORK/users/$user.back" >/dev/null \
      || fail "the key of $user was not released"
    cmp --silent "$WORK/users/$user.key" "$WORK/users/$user.back" || fail "the key of $user came back changed"
    same=$((same + 1))
  done
  [[ $same -eq $USERS ]] || fail "only $same of $USERS keys were compared"
  note "$same of $USERS came back as they were, in $((SECONDS - started)) s"
}

sql() { sqlite3 -cmd '.timeout 5000' "$WORK/keybroker.db" "$1"; }

thief() {
  step 'One row as a thief of the database would see it'
  sql "SELECT 'user ' || user || ', key ' || key_name || ', revision ' || revision || ', wrapping key '
         || lower(hex(wrapping_key_id)) || x'0a' || lower(hex(envelope))
       FROM records JOIN revisions USING (record_id, revision) WHERE user = 'user-001'" | fold -w 96 | indented
  note 'The key itself is RSA-OAEP under a private key that never leaves the token.'
}

swap_rows() {
  sql "CREATE TEMP TABLE pair AS SELECT record_id, revision, envelope, user FROM records JOIN revisions USING (record_id, revision)
         WHERE user IN ('user-001', 'user-002');
       UPDATE revisions SET envelope = (SELECT envelope FROM pair WHERE pair.record_id <> revisions.record_id)
         WHERE record_id IN (SELECT record_id FROM pair)"
}

swapped() {
  step 'A thief who can write gives user-001 the row of user-002'
  swap_rows
  local status=0
  client releaser unwrap --user user-001 --key-name vault --out "$WORK/stolen" >"$WORK/said" 2>&1 || status=$?
  indented <"$WORK/said"
  [[ $status -ne 0 && ! -s $WORK/stolen ]] || fail 'the swapped row was released'
  grep -q RECORD_DAMAGED "$WORK/said" || fail 'the swapped row was refused for another reason than RECORD_DAMAGED'
  note 'Refused by the MAC that the token checks before it uses the RSA key.'
  swap_rows
  client releaser unwrap --user user-001 --key-name vault --out "$WORK/again" >/dev/null
  cmp --silent "$WORK/users/user-001.key" "$WORK/again" || fail 'user-001 did not get its key back'
  note 'Swapped back, user-001 gets its key again.'
}

denied() {
  step 'An administrator asks for a user'\''s key'
  local status=0
  client admin unwrap --user user-001 --key-name vault --out "$WORK/stolen" >"$WORK/said" 2>&1 || status=$?
  indented <"$WORK/said"
  [[ $status -ne 0 && ! -s $WORK/stolen ]] || fail 'an administrator was given a key'
  grep -q POLICY "$WORK/said" || fail 'the administrator was refused for another reason than POLICY'
}

audit() {
  step 'What the audit log says of these'
  local lines=$WORK/lines
  cat "$WORK"/audit/serve/* >"$lines"
  local pattern
  for pattern in '"action":"user_key.unwrap".*"outcome":"ok".*"user":"user-001"' '"reason":"RECORD_DAMAGED"' '"outcome":"denied"'; do
    grep -E "$pattern" "$lines" | head -n 1 | indented
    grep -qE "$pattern" "$lines" || fail "the audit log has no line like $pattern"
  done
  note "$(wc -l <"$lines") lines in all; each was on disk before its answer left."
}

bench() {
  step 'Five seconds of load'
  command_line "keybroker bench --seconds $BENCH_SECONDS"
  broker bench --seconds "$BENCH_SECONDS" --warm-up 1 --users 50 --connections 16 \
    --attach "$BROKER_PID" --endpoint "$ENDPOINT" --status "$STATUS" --ca "$WORK/pki/ca.pem" \
    --cert "$WORK/pki/load.pem" --key "$WORK/pki/load.key" 2>&1 | indented
}

finish() {
  step 'Stopping the broker'
  stop_broker || fail 'the broker did not stop cleanly'
  command_line 'keybroker audit verify'
  broker audit verify 2>&1 | indented
}

keep() {
  local folder=$WORK pid=$BROKER_PID binary
  binary=$(command -v keybroker)
  WORK=
  BROKER_PID=
  disown "$pid"
  cat <<TRY

The broker is still running. Commands to try:

  as() { local role=\$1; shift; $binary client --endpoint $ENDPOINT --ca $folder/pki/ca.pem \\
    --cert $folder/pki/\$role.pem --key $folder/pki/\$role.key "\$@"; }
  as releaser unwrap --user user-001 --key-name vault | base64
  as releaser list
  as lifecycle delete --user user-001 --key-name vault --expected-revision 1
  as lifecycle undelete --user user-001 --key-name vault
  as admin unwrap --user user-002 --key-name vault | cat
  as auditor audit-tail --limit 5

Log: $folder/broker.log    Stop and remove: kill $pid; rm -r $folder

TRY
}

# The client's part alone: what an image, a package or a cluster is proved with.
against() {
  [[ $# -eq 3 ]] || fail 'usage: demo.sh --against URL PKI USERS'
  ENDPOINT=$1
  WORK=$(mktemp -d "${TMPDIR:-/tmp}/keybroker-demo.XXXXXX")
  mkdir -p "$3"
  ln -s "$(realpath "$2")" "$WORK/pki"
  ln -s "$(realpath "$3")" "$WORK/users"
  trap clean_up EXIT
  trap interrupted INT TERM HUP
  [[ -e $3/user-001.key ]] || enrol
  compare
  denied
  printf '\ndemo: the client part is ok\n'
}

main() {
  case ${1:-} in
    '') ;;
    --keep) KEEP=yes ;;
    --against) shift; against "$@"; return ;;
    *) fail "unknown argument $1; usage: demo.sh [--keep | --against URL PKI USERS]" ;;
  esac
  trap clean_up EXIT
  trap interrupted INT TERM HUP
  scripts/install.sh
  build
  WORK=$(mktemp -d "${TMPDIR:-/tmp}/keybroker-demo.XXXXXX")
  prepare
  gate
  step 'Starting the broker'
  start_broker
  note "serving on $ENDPOINT"
  enrol
  compare
  thief
  swapped
  denied
  audit
  bench
  if [[ $KEEP == yes ]]; then keep; else finish; fi
  printf '\n%s\n' "took $((SECONDS - STARTED)) s"
  printf 'demo: ok\n'
}

main "$@"
