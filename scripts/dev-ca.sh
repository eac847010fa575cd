#!/usr/bin/env bash
# Creates a development CA, one server certificate and client certificates. NEVER use it for production: the CA's key
# is stored beside the certificates, and no certificate can be revoked.
#
# Usage: dev-ca.sh FOLDER [CLIENT…]      clients default to: releaser enroller lifecycle admin auditor
#
# Writes ca.pem, server.pem, server.key and, for each client, CLIENT.pem and CLIENT.key. The SAN of a client is the
# URI spiffe://dev.example/CLIENT. Existing certificates are kept, so that you can add a client later.
set -euo pipefail
umask 077

DAYS=90

fail() {
  printf 'dev-ca: %s\n' "$1" >&2
  exit 1
}

ssl() {
  local said
  said=$(openssl "$@" 2>&1 >/dev/null) || fail "openssl $1: $said"
}

authority() {
  [[ -e ca.pem ]] && return
  ssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -days "$DAYS" \
    -keyout ca.key -out ca.pem -subj '/CN=keybroker development CA' \
    -addext 'basicConstraints=critical,CA:TRUE,pathlen:0' -addext 'keyUsage=critical,keyCertSign,cRLSign'
}

# Arguments: name, subject alternative names, extended key usage.
certificate() {
  local name=$1 names=$2 usage=$3
  [[ -e $name.pem ]] && return
  ssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -keyout "$name.key" -out "$name.csr" -subj "/CN=$name"
  printf '%s\n' "subjectAltName=$names" "extendedKeyUsage=$usage" 'basicConstraints=critical,CA:FALSE' \
    'keyUsage=critical,digitalSignature' 'authorityKeyIdentifier=keyid' >"$name.ext"
  ssl x509 -req -in "$name.csr" -CA ca.pem -CAkey ca.key -CAcreateserial -days "$DAYS" -extfile "$name.ext" -out "$name.pem.new"
  mv "$name.pem.new" "$name.pem"
  rm -f "$name.csr" "$name.ext"
}

main() {
  [[ $# -ge 1 ]] || fail 'usage: dev-ca.sh FOLDER [CLIENT…]'
  local folder=$1 client
  shift
  [[ $# -gt 0 ]] || set -- releaser enroller lifecycle admin auditor
  for client in "$@"; do
    [[ $client =~ ^[a-z0-9][a-z0-9-]*$ && $client != server && $client != ca ]] \
      || fail "the name of a client must consist of a-z, 0-9 and -, and must not be ca or server: $client"
  done
  mkdir -p "$folder"
  cd "$folder"
  authority
  certificate server 'DNS:localhost,IP:127.0.0.1' serverAuth
  for client in "$@"; do
    certificate "$client" "URI:spiffe://dev.example/$client" clientAuth
  done
}

main "$@"
