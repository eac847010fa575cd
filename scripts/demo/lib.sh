# What the stories of demo.sh share: output, clean up, the build, a token with a wrapping key, the broker and an identity
# service. demo.sh sources this file, and then the file of one story.
# shellcheck shell=bash
# shellcheck source=scripts/processes.sh
. scripts/processes.sh

RSA_BITS=3072
READY_SECONDS=30
PROGRESS_SECONDS=15

WORK=
BUILD_PID=
BROKER_PID=
IDENTITY_PID=
# A process of one story that must end with the script, such as a load generator.
HELPER_PID=
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

clean_up() {
  local status=$?
  trap - EXIT INT TERM HUP
  [[ -z $BUILD_PID ]] || kill -TERM "$BUILD_PID" 2>/dev/null || true
  stop "$HELPER_PID"
  stop_broker || true
  stop "$IDENTITY_PID"
  [[ -z $WORK ]] || rm -rf "$WORK"
  exit "$status"
}

work_folder() { WORK=$(mktemp -d "${TMPDIR:-/tmp}/keybroker-demo.XXXXXX"); }

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

# The URL of a listener, by its position in the configuration.
listener() { printf 'https://%s' "$(grep -oE '127\.0\.0\.1:[0-9]+' "$WORK/ready" | sed -n "${1}p")"; }

start_broker() {
  rm -f "$WORK/ready"
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
  ENDPOINT=$(listener 1)
}

# The arguments are passed to `key generate`.
prepare() {
  step 'Creating a token, a wrapping key and certificates'
  token_folder
  scripts/dev-ca.sh "$WORK/pki" releaser enroller lifecycle admin auditor load
  configuration
  command_line 'keybroker token init'
  broker token init --label demo --pin-file "$WORK/pin" --so-pin-file "$WORK/so-pin" 2>&1 | indented
  command_line 'keybroker store migrate'
  broker store migrate 2>&1 | indented
  command_line "keybroker key generate --bits $RSA_BITS${*:+ $*}"
  broker key generate --bits "$RSA_BITS" "$@" 2>&1 | indented
}

sql() { sqlite3 -cmd '.timeout 5000' "$WORK/keybroker.db" "$1"; }

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

# Requests a signed access token from the identity service. The claims are JSON.
mint() {
  local claims=$1 address=${ISSUER#http://} peer
  exec {peer}<>"/dev/tcp/${address%:*}/${address##*:}"
  printf 'POST /mint HTTP/1.1\r\nHost: %s\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s' \
    "$address" "${#claims}" "$claims" >&"$peer"
  sed '1,/^\r$/d' <&"$peer"
  exec {peer}>&-
}

finish() {
  step 'Stopping the broker'
  stop_broker || fail 'the broker did not stop cleanly'
  command_line 'keybroker audit verify'
  broker audit verify 2>&1 | indented
}

# Prints the last lines of a story. The argument is the result.
ended() {
  printf '\ntook %d s\n' $((SECONDS - STARTED))
  printf 'demo: %s\n' "$1"
}
