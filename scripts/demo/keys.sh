# The story without options: keys of 100 users, attacks on the database, a rotation, load, and the loss of a token.
# shellcheck shell=bash

USERS=100
BENCH_SECONDS=5

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
  local status
  status=$(grep -oE '"status":"[0-9.:]+"' "$WORK/ready" | cut -d '"' -f 4)
  broker bench --seconds "$BENCH_SECONDS" --warm-up 1 --users 50 --connections 16 \
    --attach "$BROKER_PID" --endpoint "$ENDPOINT" --status "$status" --ca "$WORK/pki/ca.pem" \
    --cert "$WORK/pki/load.pem" --key "$WORK/pki/load.key" 2>&1 | indented
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

# Runs only the client's part. scripts/image-proof.sh uses this function.
against() {
  [[ $# -eq 3 ]] || fail 'usage: demo.sh --against URL PKI USERS'
  ENDPOINT=$1
  work_folder
  mkdir -p "$3"
  ln -s "$(realpath "$2")" "$WORK/pki"
  ln -s "$(realpath "$3")" "$WORK/users"
  [[ -e $3/user-001.key ]] || enrol
  compare
  denied
  printf '\ndemo: client part ok\n'
}

# The whole story. With `keep`, the broker is left running.
keys_story() {
  build
  work_folder
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
  if [[ ${1:-} == keep ]]; then keep; else finish; fi
  ended ok
}
