# The story of demo.sh --bitwarden: an account with a master password moves to a key from the broker.
# shellcheck shell=bash

# An account as a Bitwarden client creates it. The values are the published end-to-end vector of Bitwarden's SDK, PBKDF2 with
# 600,000 iterations. The item was encrypted with OpenSSL under the account's user key.
ADA_EMAIL=test@bitwarden.com
ADA_PASSWORD=asdfasdfasdf
ADA_LOGIN_HASH='8HT+qrqqhBaGEIHp9mwuv1ivoW9r6yaauAkOCYbe+SM='
ADA_PROTECTED_KEY='2.Q/2PhzcC7GdeiMHhWguYAQ==|GpqzVdr0go0ug5cZh1n+uixeBC3oC90CIe0hd/HWA/pTRDZ8ane4fmsEIcuc8eMKUt55Y2q/fbNzsYu41YTZzzsJUSeqVjT8/iTQtgnNdpo=|dwI+uyvZ1h/iZ03VQ+/wrGEFYVewBUUl/syYgjsNMbE='
ADA_ITEM_TEXT='the diary of ada'
ADA=7d444840-9dc0-41d1-b245-5ffdce74fad2
BOB=c1a0fd0c-3bd3-4a59-8a55-5f3b0c9a3d11

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

bitwarden_story() {
  build --package keybroker-test-support --example identity
  work_folder
  prepare
  step 'Starting an identity service and the broker, with a listener for Bitwarden clients'
  start_identity
  bitwarden_configuration
  start_broker
  CONNECTOR=$(listener 2)
  note "access tokens from $ISSUER, keys at $CONNECTOR/user-keys"
  account
  migrate
  unlock_with_broker
  bitwarden_refused
  bitwarden_row
  finish
  ended 'bitwarden ok'
}
