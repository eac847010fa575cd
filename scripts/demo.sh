#!/usr/bin/env bash
# Demonstrates the broker with real parts: a SoftHSM token, SQLite, TLS and a gRPC client. All files are in a temporary
# folder that is removed at the end.
#
# Usage: demo.sh [--keep]                        --keep leaves the broker running and prints commands to try
#        demo.sh --bitwarden                     replaces the master password of a password manager account with a key
#                                                from the broker
#        demo.sh --against URL PKI USERS         runs only the client's part, against a running broker. PKI is a folder
#                                                that dev-ca.sh wrote. USERS is a folder for the users' keys; if it has
#                                                keys, the script does not enrol them again
set -euo pipefail
umask 077
cd "$(dirname "$0")/.."

USERS=100
RSA_BITS=3072
READY_SECONDS=30
BENCH_SECONDS=5
PROGRESS_SECONDS=15

KEEP=no
WORK=
BUILD_PID=
BROKER_PID=
IDENTITY_PID=
STARTED=$SECONDS

# --- output ----------------------------------------------------------------------------------------------------------

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

stop_identity() {
  [[ -n $IDENTITY_PID ]] || return 0
  kill -TERM "$IDENTITY_PID" 2>/dev/null || true
  wait "$IDENTITY_PID" 2>/dev/null || true
  IDENTITY_PID=
}

clean_up() {
  local status=$?
  trap - EXIT INT TERM HUP
  [[ -z $BUILD_PID ]] || kill -TERM "$BUILD_PID" 2>/dev/null || true
  stop_broker || true
  stop_identity
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
  fail 'SoftHSM is installed, but its module libsofthsm2.so is in none of the known directories'
}

# On a terminal, Cargo shows its own progress. Without a terminal, this function prints a line every few seconds.
build_with_progress() {
  if [[ -t 2 ]]; then
    cargo build "$@"
    return
  fi
  local log started=$SECONDS shown=$SECONDS status=0
  log=$(mktemp "${TMPDIR:-/tmp}/keybroker-demo-build.XXXXXX")
  cargo build "$@" >"$log" 2>&1 &
  BUILD_PID=$!
  while kill -0 "$BUILD_PID" 2>/dev/null; do
    sleep 0.5
    ((SECONDS - shown < PROGRESS_SECONDS)) && continue
    shown=$SECONDS
    note "building: $(grep -c ' Compiling ' "$log" || true) crates started after $((SECONDS - started)) s"
  done
  wait "$BUILD_PID" || status=$?
  BUILD_PID=
  [[ $status -eq 0 ]] || tail -n 40 "$log" >&2
  rm -f "$log"
  [[ $status -eq 0 ]] || fail 'the build failed'
}

# Builds with the dev profile, so that the demonstration and the tests share their build results. The arguments name further
# packages to build.
build() {
  step 'Building with the dev profile (about 10 minutes of CPU time the first time)'
  build_with_progress --locked --package keybroker --bin keybroker "$@"
  PATH=$(cargo metadata --format-version 1 --no-deps --offline | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/debug:$PATH
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
  openssl rand -hex 12 >"$WORK/pin"
  openssl rand -hex 12 >"$WORK/so-pin"
}

configuration() {
  cat >"$WORK/keybroker.toml" <<CONF
[token]
module = "$(module)"
label = "demo"
pin_file = "$WORK/pin"
# SoftHSM supports RSA-OAEP only with SHA-1.
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
apis = ["grpc", "admin"]

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

# Runs the real gRPC client with the certificate of the given role.
client() {
  local role=$1
  shift
  keybroker client --endpoint "$ENDPOINT" --ca "$WORK/pki/ca.pem" \
    --cert "$WORK/pki/$role.pem" --key "$WORK/pki/$role.key" "$@"
}

# Runs a command that has the running broker change its keys, with the certificate of the administrator.
as_admin() {
  "$@" --endpoint "$ENDPOINT" --ca "$WORK/pki/ca.pem" --cert "$WORK/pki/admin.pem" --key "$WORK/pki/admin.key"
}

start_broker() {
  # Start the broker directly and not through a function, because the shell of a function would receive the signals for the
  # broker.
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

# --- the demonstration -----------------------------------------------------------------------------------------------

prepare() {
  step 'Creating a token, a wrapping key and certificates'
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

attribute_check() {
  step 'Checking the attributes: can the key on the token be read, wrapped or copied?'
  command_line 'keybroker token check'
  broker token check 2>&1 | indented
}

enrol() {
  step "Enrolling the keys of $USERS users over mutual TLS"
  local user started=$SECONDS
  mkdir -p "$WORK/users"
  for user in $(seq -f 'user-%03g' "$USERS"); do
    openssl rand 32 >"$WORK/users/$user.key"
    client enroller create --user "$user" --key-name vault --material-file "$WORK/users/$user.key" >/dev/null \
      || fail "$user could not be enrolled"
  done
  note "Wrapped and stored $USERS keys in $((SECONDS - started)) s, each with a separate client process and TLS connection."
}

compare() {
  step "Unwrapping each key on the token, and comparing it with the original"
  local user started=$SECONDS same=0
  for user in $(seq -f 'user-%03g' "$USERS"); do
    rm -f "$WORK/users/$user.back"
    client releaser unwrap --user "$user" --key-name vault --out "$WORK/users/$user.back" >/dev/null \
      || fail "the key of $user was not released"
    cmp --silent "$WORK/users/$user.key" "$WORK/users/$user.back" || fail "the released key of $user differs from the enrolled key"
    same=$((same + 1))
  done
  [[ $same -eq $USERS ]] || fail "only $same of $USERS keys were compared"
  note "$same of $USERS released keys are equal to the enrolled keys. This took $((SECONDS - started)) s."
}

sql() { sqlite3 -cmd '.timeout 5000' "$WORK/keybroker.db" "$1"; }

stored_row() {
  step 'Showing a stored row, as an attacker who reads the database sees it'
  sql "SELECT 'user ' || user || ', key ' || key_name || ', revision ' || revision || ', wrapping key '
         || lower(hex(wrapping_key_id)) || x'0a' || lower(hex(envelope))
       FROM records JOIN revisions USING (record_id, revision) WHERE user = 'user-001'" | fold -w 96 | indented
  note 'The user key is encrypted with RSA-OAEP. The private key never leaves the token.'
}

swap_rows() {
  sql "CREATE TEMP TABLE pair AS SELECT record_id, revision, envelope, user FROM records JOIN revisions USING (record_id, revision)
         WHERE user IN ('user-001', 'user-002');
       UPDATE revisions SET envelope = (SELECT envelope FROM pair WHERE pair.record_id <> revisions.record_id)
         WHERE record_id IN (SELECT record_id FROM pair)"
}

swapped() {
  step 'Attacking: a writer of the database swaps the rows of user-001 and user-002'
  swap_rows
  local status=0
  client releaser unwrap --user user-001 --key-name vault --out "$WORK/stolen" >"$WORK/output" 2>&1 || status=$?
  indented <"$WORK/output"
  [[ $status -ne 0 && ! -s $WORK/stolen ]] || fail 'the swapped row was released'
  grep -q RECORD_DAMAGED "$WORK/output" || fail 'the swapped row was refused for another reason than RECORD_DAMAGED'
  note 'Refused: the token verifies the MAC of the row before it uses the RSA key.'
  swap_rows
  client releaser unwrap --user user-001 --key-name vault --out "$WORK/again" >/dev/null
  cmp --silent "$WORK/users/user-001.key" "$WORK/again" || fail 'user-001 did not get its key after the rows were swapped back'
  note 'After the rows are swapped back, user-001 gets its key again.'
}

denied() {
  step 'Attacking: an administrator requests the key of a user'
  local status=0
  client admin unwrap --user user-001 --key-name vault --out "$WORK/stolen" >"$WORK/output" 2>&1 || status=$?
  indented <"$WORK/output"
  [[ $status -ne 0 && ! -s $WORK/stolen ]] || fail 'an administrator was given a key'
  grep -q POLICY "$WORK/output" || fail 'the administrator was refused for another reason than POLICY'
  note 'Refused by policy: the role admin does not include the release of keys.'
}

rotate() {
  step 'Rotating the wrapping key and moving every row to the new key, while the broker serves calls'
  command_line 'keybroker key rotate --single'
  as_admin keybroker key rotate --single 2>&1 | indented
  [[ ${PIPESTATUS[0]} -eq 0 ]] || fail 'the rotation failed'
  command_line 'keybroker rewrap start --wait'
  as_admin keybroker -o json rewrap start --wait >"$WORK/output" 2>&1 || fail "the re-wrap failed: $(cat "$WORK/output")"
  grep -oE '"(state|revisions_moved|failed|verified)": ?("[a-z]+"|[0-9]+)' "$WORK/output" | indented
  local keys
  keys=$(sql 'SELECT count(DISTINCT wrapping_key_id) FROM revisions')
  [[ $keys -eq 1 ]] || fail "the rows are under $keys wrapping keys"
  client releaser unwrap --user user-001 --key-name vault --out "$WORK/after-rewrap" >/dev/null
  cmp --silent "$WORK/users/user-001.key" "$WORK/after-rewrap" || fail 'user-001 did not get its key after the re-wrap'
  note 'No user key left the token during the re-wrap, and user-001 still gets the same key.'
}

# Gives the broker a copy of the token, and then removes the first token.
failover() {
  step 'Adding a copy of the token, and removing the first token'
  stop_broker || fail 'the broker did not stop cleanly'
  rm "$WORK/ready"
  cp -a "$WORK/tokens" "$WORK/tokens-b"
  sed "s|$WORK/tokens|$WORK/tokens-b|" "$WORK/softhsm2.conf" >"$WORK/softhsm2-b.conf"
  awk -v conf="$WORK/softhsm2-b.conf" '
    /^\[store\]/ {
      sub(/\[token\]/, "[[token]]\nname = \"b\"\ncopy_of = \"a\"", token)
      sub(/SOFTHSM2_CONF = "[^"]*"/, "SOFTHSM2_CONF = \"" conf "\"", token)
      print token
      inside = 0
    }
    /^\[token\]/ { inside = 1 }
    inside { token = token $0 "\n" }
    { sub(/^\[token\]/, "[[token]]\nname = \"a\""); print }
  ' "$WORK/keybroker.toml" >"$WORK/two.toml"
  mv "$WORK/two.toml" "$WORK/keybroker.toml"
  local id
  for id in $(broker -o json key list | grep -oE '"id": ?"[0-9a-f]{32}"' | cut -d '"' -f 4); do
    command_line "keybroker --token b key register $id"
    broker --token b key register "$id" >"$WORK/output" 2>&1 || fail "the copy was not registered: $(cat "$WORK/output")"
  done
  start_broker
  mv "$WORK/tokens" "$WORK/tokens-removed"
  note 'Token a is removed. Token b serves all calls.'
  compare
  mv "$WORK/tokens-removed" "$WORK/tokens"
}

audit() {
  step 'Showing the audit entries of these calls'
  local lines=$WORK/lines
  cat "$WORK"/audit/serve/* >"$lines"
  local pattern
  for pattern in '"action":"user_key.unwrap".*"outcome":"ok".*"user":"user-001"' '"reason":"RECORD_DAMAGED"' '"outcome":"denied"'; do
    grep -E "$pattern" "$lines" | head -n 1 | indented
    grep -qE "$pattern" "$lines" || fail "no line of the audit log matches $pattern"
  done
  note "The log has $(wc -l <"$lines") lines. The entry of each call was on disk before the broker answered."
}

bench() {
  step "Measuring under load for $BENCH_SECONDS seconds"
  note 'This is a dev build: the figures show that the broker serves the load, but are not a benchmark.'
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
  as admin wrapping-keys
  as admin token-state
  as admin unwrap --user user-002 --key-name vault | cat   # refused: an administrator cannot release keys
  as auditor audit-tail --limit 5

The log of the broker is $folder/broker.log.
To stop the broker and remove its files, run: kill $pid; rm -r $folder

TRY
}

# --- Bitwarden -------------------------------------------------------------------------------------------------------

# An account as a Bitwarden client creates it. The values are the published end-to-end vector of Bitwarden's SDK, PBKDF2 with
# 600,000 iterations. The item was encrypted with OpenSSL under the account's user key.
ADA_EMAIL=test@bitwarden.com
ADA_PASSWORD=asdfasdfasdf
ADA_LOGIN_HASH='8HT+qrqqhBaGEIHp9mwuv1ivoW9r6yaauAkOCYbe+SM='
ADA_PROTECTED_KEY='2.Q/2PhzcC7GdeiMHhWguYAQ==|GpqzVdr0go0ug5cZh1n+uixeBC3oC90CIe0hd/HWA/pTRDZ8ane4fmsEIcuc8eMKUt55Y2q/fbNzsYu41YTZzzsJUSeqVjT8/iTQtgnNdpo=|dwI+uyvZ1h/iZ03VQ+/wrGEFYVewBUUl/syYgjsNMbE='
ADA_ITEM_TEXT='the diary of ada'
ADA=7d444840-9dc0-41d1-b245-5ffdce74fad2
BOB=c1a0fd0c-3bd3-4a59-8a55-5f3b0c9a3d11

start_identity() {
  local deadline=$((SECONDS + READY_SECONDS))
  "$(dirname "$(command -v keybroker)")/examples/identity" --ready-file "$WORK/identity" >"$WORK/identity.log" 2>&1 &
  IDENTITY_PID=$!
  until [[ -s $WORK/identity ]]; do
    kill -0 "$IDENTITY_PID" 2>/dev/null || fail 'the identity service did not start'
    ((SECONDS < deadline)) || fail "the identity service was not ready after $READY_SECONDS s"
    sleep 0.05
  done
  ISSUER=$(<"$WORK/identity")
}

# Requests an access token that is signed like the access tokens of a Bitwarden server's identity service. The claims are JSON.
mint() {
  local claims=$1 address=${ISSUER#http://} peer
  exec {peer}<>"/dev/tcp/${address%:*}/${address##*:}"
  printf 'POST /mint HTTP/1.1\r\nHost: %s\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s' \
    "$address" "${#claims}" "$claims" >&"$peer"
  sed '1,/^\r$/d' <&"$peer"
  exec {peer}>&-
}

bitwarden_configuration() {
  cat >>"$WORK/keybroker.toml" <<CONF
[rest]
allowed_origins = ["https://vault.example.org"]

[[listener]]
address = "127.0.0.1:0"
apis = ["rest"]
client_certificates = "none"

[listener.tls]
certificate_file = "$WORK/pki/server.pem"
key_file = "$WORK/pki/server.key"

[[issuer]]
name = "bitwarden"
profile = "bitwarden"
issuer = "$ISSUER"
allow_http = true
CONF
}

# Shows a command, runs it in the folder of the account, and shows its output.
bitwarden() {
  command_line "keybroker bitwarden $*"
  show_output keybroker bitwarden "$@"
}

# Runs a command against the broker. The options for the broker are not shown.
connector() {
  local command=$1
  shift
  command_line "keybroker bitwarden $command --url … $*"
  show_output keybroker bitwarden "$command" --url "$CONNECTOR" --ca-file "$WORK/pki/ca.pem" "$@"
}

show_output() {
  local status=0
  (cd "$WORK/ada" && "$@") >"$WORK/output" 2>&1 || status=$?
  indented <"$WORK/output"
  return "$status"
}

# Requires that the broker refuses the command with this reason.
refuses() {
  local reason=$1 status=0
  shift
  connector "$@" || status=$?
  [[ $status -eq 10 ]] || fail "the broker did not refuse the command (exit code $status)"
  grep -qF "$reason" "$WORK/output" || fail "the broker refused the command for another reason than $reason"
}

opened() {
  [[ $(<"$WORK/ada/$1") == "$ADA_ITEM_TEXT" ]] || fail 'the item was not decrypted'
  note "Decrypted the item: $ADA_ITEM_TEXT"
}

account() {
  step 'Preparing an account with a master password, a protected user key and an item, as Bitwarden clients make them'
  mkdir "$WORK/ada"
  printf '%s\n' "$ADA_PASSWORD" >"$WORK/ada/password"
  printf '%s\n' "$ADA_PROTECTED_KEY" >"$WORK/ada/protected"
  cp tests/vectors/bitwarden/item.txt "$WORK/ada/item"
  indented <"$WORK/ada/protected" | cut -c 1-100
  bitwarden derive --email "$ADA_EMAIL" --kdf pbkdf2 --iterations 600000 --password-file password --out key
  grep -qF "$ADA_LOGIN_HASH" "$WORK/output" || fail 'the hash is not the one with which the client logs in'
  bitwarden unlock --master-key-file key --protected-key-file protected --item-file item --out with-password
  opened with-password
}

migrate() {
  step 'Migrating: Ada logs in with SSO, and her client stores the master key at the broker'
  mint "{\"sub\": \"$ADA\"}" >"$WORK/ada/token"
  refuses 'KEY_NOT_FOUND' fetch --token-file token
  connector enrol --token-file token --master-key-file key --protected-key-file protected
  mv "$WORK/ada/key" "$WORK/key-before"
  rm "$WORK/ada/password"
  note 'The password and the local copy of the key are deleted. The broker stores the key, wrapped under the key on the token.'
}

unlock_with_broker() {
  step 'Unlocking: her client gets the key from the broker'
  mint "{\"sub\": \"$ADA\"}" >"$WORK/ada/token-later"
  connector fetch --token-file token-later --out fetched
  cmp --silent "$WORK/key-before" "$WORK/ada/fetched" || fail 'the released key differs from the stored key'
  connector unlock --token-file token-later --protected-key-file protected --item-file item --out with-broker
  opened with-broker
}

bitwarden_refused() {
  step 'Trying calls that the broker must refuse'
  note 'The same user enrols again. POST never overwrites a key:'
  refuses 'KEY_EXISTS' enrol --token-file token --master-key-file fetched --protected-key-file protected
  note 'Another user, who has no key:'
  mint "{\"sub\": \"$BOB\"}" >"$WORK/ada/token-of-bob"
  refuses 'KEY_NOT_FOUND' unlock --token-file token-of-bob --protected-key-file protected
  note 'An expired access token:'
  mint "{\"sub\": \"$ADA\", \"exp\": $(($(date +%s) - 3600))}" >"$WORK/ada/token-old"
  refuses 'CREDENTIAL' fetch --token-file token-old
  note 'An administrator, with the gRPC API:'
  local status=0
  client admin unwrap --user "$ADA" --key-name bitwarden --out "$WORK/stolen" >"$WORK/output" 2>&1 || status=$?
  indented <"$WORK/output"
  [[ $status -eq 10 && ! -s $WORK/stolen ]] || fail 'an administrator was given the key'
  grep -q POLICY "$WORK/output" || fail 'the administrator was refused for another reason than POLICY'
}

bitwarden_row() {
  step "Showing Ada's row, as an attacker who reads the database sees it, and the audit entries"
  local key
  key=$(od -An -v -tx1 "$WORK/key-before" | tr -d ' \n')
  sql "SELECT 'user ' || user || ', key ' || key_name || ', revision ' || revision || x'0a' || lower(hex(envelope))
       FROM records JOIN revisions USING (record_id, revision)" >"$WORK/row"
  fold -w 96 <"$WORK/row" | indented
  grep -qF "user $ADA, key bitwarden" "$WORK/row" || fail 'the database has no row of Ada'
  if tr -d '\n' <"$WORK/row" | grep -qF "$key"; then fail 'the row contains the key in plaintext'; fi
  local lines=$WORK/lines pattern
  cat "$WORK"/audit/serve/* >"$lines"
  for pattern in user_key.create user_key.unwrap; do
    pattern="\"action\":\"$pattern\".*\"outcome\":\"ok\".*\"principal\":\"token:bitwarden:$ADA\""
    grep -E "$pattern" "$lines" | head -n 1 | indented
    grep -qE "$pattern" "$lines" || fail "no line of the audit log matches $pattern"
  done
}

bitwarden_part() {
  trap clean_up EXIT
  trap interrupted INT TERM HUP
  scripts/install.sh
  build --package keybroker-test-support --example identity
  WORK=$(mktemp -d "${TMPDIR:-/tmp}/keybroker-demo.XXXXXX")
  prepare
  step 'Starting an identity service and the broker, with a listener for Bitwarden clients'
  start_identity
  bitwarden_configuration
  start_broker
  CONNECTOR=https://$(grep -oE '127\.0\.0\.1:[0-9]+' "$WORK/ready" | sed -n 2p)
  note "access tokens from $ISSUER, keys at $CONNECTOR/user-keys"
  account
  migrate
  unlock_with_broker
  bitwarden_refused
  bitwarden_row
  finish
  printf '\n%s\n' "took $((SECONDS - STARTED)) s"
  printf 'demo: bitwarden ok\n'
}

# --- the client's part -----------------------------------------------------------------------------------------------

# Runs only the client's part. scripts/image-proof.sh uses this function.
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
  printf '\ndemo: client part ok\n'
}

main() {
  case ${1:-} in
    '') ;;
    --keep) KEEP=yes ;;
    --bitwarden) bitwarden_part; return ;;
    --against) shift; against "$@"; return ;;
    *) fail "unknown argument $1; usage: demo.sh [--keep | --bitwarden | --against URL PKI USERS]" ;;
  esac
  trap clean_up EXIT
  trap interrupted INT TERM HUP
  scripts/install.sh
  build
  WORK=$(mktemp -d "${TMPDIR:-/tmp}/keybroker-demo.XXXXXX")
  prepare
  attribute_check
  step 'Starting the broker'
  start_broker
  note "serving on $ENDPOINT"
  enrol
  compare
  stored_row
  swapped
  denied
  rotate
  audit
  bench
  failover
  if [[ $KEEP == yes ]]; then keep; else finish; fi
  printf '\n%s\n' "took $((SECONDS - STARTED)) s"
  printf 'demo: ok\n'
}

main "$@"
