# The story of demo.sh --devices: Ada's devices get access to her user key, a thief does not, and the memory of the broker
# is searched for the user keys.
# shellcheck shell=bash

# Each device and person has a folder, in which its commands run: laptop, phone, tablet and new-phone are devices of Ada,
# carol is an administrator, and mallory has stolen an access token of Ada.
PLACES=(laptop phone tablet new-phone carol mallory)
SEARCHES=3
WAIT_SECONDS=20
REPOSITORY=$PWD

# --- commands at a prompt --------------------------------------------------------------------------------------------

# The app on the device in whose folder the command runs. Mallory names her device like a device of Ada.
app() {
  local name
  name=$(basename "$PWD")
  [[ $name != mallory ]] || name="Ada's new phone"
  "$REPOSITORY/examples/python/run.sh" device-app --user ada --keys keys.json --name "$name" "$@"
}

# Shows a command at a prompt, and runs it. Its output is in the file `output`.
attempt() {
  local place=$1
  shift
  printf '   %s%s$ %s%s\n' "$DIM" "$place" "$*" "$PLAIN"
  (cd "$WORK/$place" && "$@") >"$WORK/output" 2>&1
}

# The command must succeed.
at() {
  attempt "$@" || { indented <"$WORK/output"; fail 'this command failed'; }
  indented <"$WORK/output"
}

# The same, but shows only the lines that begin with one of the names in the first argument, separated by |.
summary_at() {
  local names=$1
  shift
  attempt "$@" || { indented <"$WORK/output"; fail 'this command failed'; }
  { grep -E "^($names) " "$WORK/output"; printf '…\n'; } | indented
}

# The command must be refused with the reason in the first argument.
refused_at() {
  local reason=$1 status=0
  shift
  attempt "$@" || status=$?
  indented <"$WORK/output"
  [[ $status -ne 0 ]] || fail 'this command must be refused'
  grep -qwF "$reason" "$WORK/output" || fail "this command was refused for another reason than $reason"
}

# Opens the user key on a device, and requires that it is the user key whose fingerprint is in USER_KEY.
opens() {
  at "$1" app open
  grep -qF "$USER_KEY" "$WORK/output" || fail "$1 opened another user key"
}

field() { sed -nE "s/^$1:? +//p" "$WORK/output" | head -n 1; }

# --- the parts -------------------------------------------------------------------------------------------------------

devices_configuration() {
  mkdir "$WORK/policies"
  cp docs/policies/devices-only.cedar "$WORK/policies"
  cat >>"$WORK/keybroker.toml" <<CONF
[release]
sealed_only = true

[policy]
directory = "$WORK/policies"

[[listener]]
address = "127.0.0.1:0"
apis = ["grpc"]
client_certificates = "none"

[listener.tls]
certificate_file = "$WORK/pki/server.pem"
key_file = "$WORK/pki/server.key"

[[issuer]]
name = "sso"
issuer = "$ISSUER"
audience = ["keybroker"]
allow_http = true

[[issuer.mapping]]
name = "helpdesk"
when = [{ claim = "groups", any_of = ["keybroker-approvers"] }]
roles = ["approver"]
users = ["*"]
CONF
}

# Starts the broker, and waits until it knows the keys of the OpenID provider. The commands of members and approvers read
# the broker from the environment.
start_for_members() {
  local deadline=$((SECONDS + READY_SECONDS))
  start_broker
  until grep -q 'key set taken over' "$WORK/broker.log"; do
    ((SECONDS < deadline)) || fail 'the broker did not fetch the keys of the OpenID provider'
    sleep 0.05
  done
  KEYBROKER_ENDPOINT=$(listener 2)
  export KEYBROKER_ENDPOINT
}

sign_in() {
  local place
  for place in "${PLACES[@]}"; do mkdir "$WORK/$place"; done
  export KEYBROKER_CA=$WORK/pki/ca.pem KEYBROKER_TOKEN
  KEYBROKER_TOKEN=$(mint '{"sub": "ada", "aud": "keybroker"}')
  mint '{"sub": "carol", "aud": "keybroker", "groups": ["keybroker-approvers"]}' >"$WORK/carol/token"
  note 'Ada and Carol sign in at the provider. The group of Carol makes her an approver. app is the Python example of an app:'
  note '  examples/python/run.sh device-app'
  (cd "$WORK/laptop" && app --help) >"$WORK/output" 2>&1 \
    || { indented <"$WORK/output"; fail 'the Python example cannot be installed'; }
}

restart() {
  step 'Restarting the broker'
  note "$1"
  stop_broker || fail 'the broker did not stop cleanly'
  start_for_members
  note "The new process has the id $BROKER_PID."
}

# --- the story -------------------------------------------------------------------------------------------------------

first_device() {
  step "The first device: Ada's laptop makes the user key, enrols it and is trusted"
  at laptop app first
  at laptop app open --out user-key
  USER_KEY=$(sed -n 's/^opened the user key //p' "$WORK/output")
}

second_device() {
  step "The second device: Ada's phone is approved by the laptop"
  at phone app ask device
  local shown words
  shown=$(field phrase)
  at laptop app requests
  [[ $(field phrase) == "$shown" ]] || fail 'the devices show different phrases'
  note 'Both devices computed the phrase themselves. Ada compares the phrases, and they are equal.'
  read -ra words <<<"$shown"
  at laptop app approve "${words[@]}"
  at phone app finish
  opens phone
}

# A device asks for an administrator, and Carol asks Ada for the two words that the broker does not show to Carol.
approved_by_carol() {
  local device=$1 words shown spoken=() id place
  at "$device" app ask administrator
  read -ra words <<<"$(field phrase)"
  summary_at 'id|phrase|user|device_name|requested_by|peer' carol keybroker device requests --token-file token
  id=$(field id)
  read -ra shown <<<"$(field phrase)"
  for place in "${!words[@]}"; do
    if [[ ${shown[place]} == ____ ]]; then spoken+=("${words[place]}")
    else [[ ${shown[place]} == "${words[place]}" ]] || fail 'Carol and Ada see different phrases'; fi
  done
  note "Carol calls Ada. The words that Carol sees are those on the $device. Ada reads the two other words from the $device:"
  note "  ${spoken[*]}"
  summary_at 'state|decided_by' carol keybroker device approve "$id" --words "${spoken[@]}" --token-file token
  note "The token encrypted the user key to the $device. Neither Carol nor the broker had the user key."
  at "$device" app finish
  opens "$device"
}

third_device() {
  step "The third device: Ada's tablet is approved by Carol, an administrator"
  approved_by_carol tablet
}

thief() {
  step "A thief: Mallory has an access token of Ada, and no device of hers"
  printf '%s' "$KEYBROKER_TOKEN" >"$WORK/mallory/stolen-token"
  openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out "$WORK/mallory/key.pem" 2>/dev/null
  note 'Mallory asks for the user key, encrypted to a key pair of hers. The policy devices-only forbids it:'
  refused_at POLICY mallory keybroker client unwrap --user ada --key-name vault --recipient key.pem --out stolen-key \
    --token-file stolen-token
  note 'Mallory tries to end the trust of the laptop. Only a trusted device can sign this change:'
  refused_at DEVICE_SIGNATURE mallory app untrust laptop
  note 'Mallory asks an administrator for access. The request looks like a request of Ada:'
  at mallory app ask administrator
  local id
  summary_at 'id|phrase|user|device_name|requested_by|peer' carol keybroker device requests --token-file token
  id=$(field id)
  note 'Carol calls Ada, who did not ask: none of her devices shows a phrase, so Ada cannot know the words. With any other words,'
  note 'the broker refuses the approval:'
  refused_at phrase_words carol keybroker device approve "$id" --words correct horse --token-file token
  note 'Carol denies the request:'
  summary_at 'state|decided_by' carol keybroker device deny "$id" --token-file token
  refused_at DEVICE_STATE mallory app finish
  [[ ! -s $WORK/mallory/stolen-key ]] || fail 'the thief got the user key'
}

lost_device() {
  step 'A lost device: Ada ends the trust of her phone with her laptop'
  at laptop app untrust phone
  note 'The broker removed the encrypted keys of the phone. The person who found the phone cannot open the user key:'
  refused_at DEVICE_STATE phone app open
  at laptop app list
}

new_user_key() {
  step 'A new user key: Ada rotates it, because an app on the phone may still have it in memory'
  at laptop app rotate
  at laptop app open --out new-user-key
  USER_KEY=$(sed -n 's/^opened the user key //p' "$WORK/output")
  opens tablet
  refused_at DEVICE_STATE phone app open
}

new_phone() {
  step 'A new phone: Carol approves it, so the token seals the new user key as well'
  approved_by_carol new-phone
}

# --- the memory ------------------------------------------------------------------------------------------------------

# The processes of the broker are not dumpable, so that only root can read their memory.
memory() {
  if [[ $(id -u) -eq 0 ]]; then python3 scripts/demo/memory.py "$@"; else sudo python3 scripts/demo/memory.py "$@"; fi
}

# Searches processes, NAME=PID, for the user keys and for a value that each process has. The front must have neither the
# first user key nor, unless the first argument restricts the claim, the new one.
search_for_keys() {
  local claim=$1 expected='none +none'
  shift
  [[ $claim != 'first user key' ]] || expected='none +[a-z0-9, ]+'
  memory search "--key=first user key=$WORK/laptop/user-key" "--key=new user key=$WORK/laptop/new-user-key" \
    "--control=id of the wrapping key=$(sql 'SELECT lower(hex(wrapping_key_id)) FROM revisions LIMIT 1')" \
    "${@/#/--process=}" "--rounds=$ROUNDS" >"$WORK/output" || { indented <"$WORK/output"; fail 'a control of the search failed'; }
  indented <"$WORK/output"
  grep -qE "^front .* $expected\$" "$WORK/output" || fail 'a user key is in the memory of the front'
}

processes() {
  local pid number=0
  printf 'front=%s\n' "$BROKER_PID"
  for pid in $(pgrep -P "$BROKER_PID"); do printf 'worker %d=%d\n' $((number += 1)) "$pid"; done
}

# The front of the time before the restart sealed the first user key to the tablet, and then received the new user key.
search_before_restart() {
  step 'The memory: does this front have the first user key, which the token sealed to the tablet?'
  local list
  mapfile -t list < <(processes)
  ROUNDS=1 search_for_keys 'first user key' "${list[@]}"
  note 'The new user key passed this front in plain text, because a rotation enrols it. The front overwrites memory that it frees.'
}

# The front has a key while an enrolment is in progress. The search must find it there.
search_control() {
  step 'The control: does the search find a key in the front?'
  note 'An enrolment passes the front in plain text. The script sends an enrolment of another key without its end, so that the'
  note 'front waits for the end:'
  openssl rand 32 >"$WORK/control-key"
  printf '%s' "$KEYBROKER_TOKEN" >"$WORK/token"
  python3 scripts/demo/memory.py half-call "$KEYBROKER_ENDPOINT" "$KEYBROKER_CA" "$WORK/token" ada "$WORK/control-key" \
    >"$WORK/half" &
  HELPER_PID=$!
  local deadline=$((SECONDS + WAIT_SECONDS))
  until in_front found; do
    ((SECONDS < deadline)) || fail 'the search does not find a key that is in the memory of the front'
    sleep 0.2
  done
  stop "$HELPER_PID"
  HELPER_PID=
  note 'The script closes the connection:'
  until in_front none; do
    ((SECONDS < deadline)) || fail 'the key of a call that has ended is in the memory of the front'
    sleep 0.2
  done
}

# Whether the control key is in the memory of the front as expected, `found` or `none`. Shows the result if it is.
in_front() {
  local result=found
  memory search "--key=control key=$WORK/control-key" \
    "--control=id of the wrapping key=$(sql 'SELECT lower(hex(wrapping_key_id)) FROM revisions LIMIT 1')" \
    "--process=front=$BROKER_PID" >"$WORK/output" || fail 'a control of the search failed'
  grep -qE '^front .* none$' "$WORK/output" && result=none
  [[ $result == "$1" ]] || return 1
  indented <"$WORK/output"
}

# Releases the user key of Ada to a service again and again, sealed to the key pair of the service.
releases() {
  while client releaser unwrap --user ada --key-name vault --recipient "$WORK/service.pem" >/dev/null 2>&1; do
    printf '.' >>"$WORK/releases"
  done
}

search_memory() {
  step 'The memory: are the user keys in the front or in the workers?'
  note 'The script searches the memory of the running processes for each window of 16 bytes of both user keys, raw, in'
  note "hexadecimal and in base64, $SEARCHES times, while a service with the role release fetches Ada's user key, sealed:"
  openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048 2>/dev/null | openssl pkey -pubout -out "$WORK/service.pem"
  local list
  mapfile -t list < <(processes)
  : >"$WORK/releases"
  releases &
  HELPER_PID=$!
  ROUNDS=$SEARCHES search_for_keys 'both user keys' "${list[@]}"
  stop "$HELPER_PID"
  HELPER_PID=
  [[ -s $WORK/releases ]] || fail 'no key was released during the search'
  note "During the search, the token released the user key $(wc -c <"$WORK/releases") times. The front had no form of a user key."
  if in_workers; then
    note 'A worker has the key for the moment of a release: SoftHSM keeps the objects of the token in the memory of its process.'
    note 'With a hardware token, the object is in the device.'
  else
    note 'In the workers, the search found no key either. SoftHSM has the key in the memory of the worker for the moment of a'
    note 'release, which a search can miss. With a hardware token, the key is only in the device.'
  fi
  note 'The same search after the last release:'
  ROUNDS=1 search_for_keys 'both user keys' "${list[@]}"
  if in_workers; then note 'The memory of a worker still has the key. A hardware token does not have this weakness.'
  else note 'Neither the front nor a worker has a user key.'; fi
}

# Whether the last search found a user key in a worker.
in_workers() { grep '^worker' "$WORK/output" | grep -qvE ' none +none$'; }

devices_audit() {
  step 'The audit log: each decision, with the person who asked and the person who decided'
  local action
  for action in access_request.approve access_request.approve_for_member access_request.deny device.untrust device.rotate; do
    command_line "keybroker audit show --action $action --outcome ok --last 1"
    broker audit show --action "$action" --outcome ok --last 1 >"$WORK/output" 2>&1 || true
    indented <"$WORK/output"
    grep -qF "$action" "$WORK/output" || fail "the audit log has no entry of $action"
  done
}

devices_story() {
  build --package keybroker-test-support --example identity
  work_folder
  prepare --purpose sealed
  step 'Starting an OpenID provider and the broker, which releases user keys only sealed'
  start_identity
  devices_configuration
  start_for_members
  sign_in
  first_device
  restart 'At the enrolment, the user key passed the front in plain text. The search at the end is about the time after that.'
  second_device
  third_device
  thief
  lost_device
  new_user_key
  search_before_restart
  restart 'In the new process, the token has to seal the new user key.'
  new_phone
  search_control
  search_memory
  devices_audit
  finish
  ended 'devices ok'
}
