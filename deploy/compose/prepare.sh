#!/usr/bin/env bash
# Creates the secrets that ../compose.yaml mounts: random PINs, a database password and development certificates. Keeps
# existing PINs, passwords and certificates. Run this script as root: the files belong to root, and the group of the image's
# user may read them.
set -euo pipefail
umask 077
cd "$(dirname "$0")"

# The group of the image's user.
GROUP=10001

fail() {
  printf 'prepare: %s\n' "$1" >&2
  exit 1
}

secret() { [[ -e secrets/$1 ]] || openssl rand -hex 12 >"secrets/$1"; }

main() {
  [[ $(id -u) -eq 0 ]] || fail 'run this script as root, because only root can give the files to the group of the image'
  local name
  mkdir -p secrets
  ../../scripts/dev-ca.sh pki
  for name in pin so-pin database-password; do secret "$name"; done
  for name in server.pem server.key ca.pem; do cp "pki/$name" "secrets/$name"; done
  chown -R "0:$GROUP" secrets
  chmod 0750 secrets
  chmod 0440 secrets/*
  printf 'prepare: the secrets are in %s, the client certificates in %s\n' "$PWD/secrets" "$PWD/pki"
}

main "$@"
