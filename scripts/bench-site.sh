# shellcheck shell=bash
# Shared functions for scripts that run `keybroker bench`: a broker with SoftHSM in a temporary folder. The script that sources
# this file sets WORK (the folder) and PROGRAM (the binary), and defines fail.

# Runs a command of the broker whose configuration is in the folder $1 below $WORK.
broker() {
  "$PROGRAM" --config "$WORK/$1/keybroker.toml" "${@:2}" >"$WORK/said" 2>&1 || fail "keybroker ${*:2}: $(cat "$WORK/said")"
}

# The folder for tokens, certificates and PINs.
token() {
  local module
  for module in /usr/lib/softhsm/libsofthsm2.so /usr/lib/*/softhsm/libsofthsm2.so; do [[ -e $module ]] && break; done
  MODULE=$module
  ENVIRONMENT="SOFTHSM2_CONF = \"$WORK/softhsm2.conf\""
  scripts/dev-ca.sh "$WORK/pki" load
  mkdir "$WORK/tokens"
  sed "s|@TOKENS@|$WORK/tokens|" softhsm/softhsm2.conf.template >"$WORK/softhsm2.conf"
  openssl rand -hex 12 >"$WORK/pin"
  openssl rand -hex 12 >"$WORK/so-pin"
}

# Creates a configuration, a token and a wrapping key in the folder $2. The label of the token begins with $1. $3 is the URL of
# the database, $4 the length of the wrapping key (2048 by default), $5 its purpose (plain by default). MODULE is the PKCS#11
# module, and ENVIRONMENT the line of its environment variable.
site() {
  local engine=$1 name=$2 url=$3 bits=${4:-2048} said
  rm -rf "${WORK:?}/$name"
  mkdir "$WORK/$name"
  cat >"$WORK/$name/keybroker.toml" <<CONF
[token]
module = "$MODULE"
label = "$engine-$name"
pin_file = "$WORK/pin"
allow_oaep_sha1 = true
[token.environment]
$ENVIRONMENT
[store]
url = "$url"
$(! declare -F socket_users >/dev/null || socket_users)
[audit]
directory = "$WORK/$name/audit"
[status]
address = "127.0.0.1:0"
[[listener]]
address = "127.0.0.1:0"
apis = ["grpc"]
[listener.tls]
certificate_file = "$WORK/pki/server.pem"
key_file = "$WORK/pki/server.key"
client_ca_file = "$WORK/pki/ca.pem"
[[principal]]
san = "URI:spiffe://dev.example/load"
roles = ["enrol", "release"]
key_names = ["*"]
CONF
  # An earlier release has the name `doors` for this setting.
  said=$("$PROGRAM" --config "$WORK/$name/keybroker.toml" config check 2>&1 || true)
  if [[ $said == *"expected one of"*doors* ]]; then
    sed -i 's/^apis = /doors = /' "$WORK/$name/keybroker.toml"
  fi
  broker "$name" token init --label "$engine-$name" --so-pin-file "$WORK/so-pin"
  broker "$name" store migrate
  broker "$name" key generate --bits "$bits" ${5:+--purpose "$5"}
}

# For jq: the median of an array.
# shellcheck disable=SC2034  # The scripts that source this use it.
MEDIAN='def median: sort | (.[((length - 1) / 2 | floor)] + .[(length / 2 | floor)]) / 2;'
