#!/usr/bin/env bash
# Writes the token reports in docs/tokens again, for the modules that the tests use. Needs scripts/install.sh --tools.
set -euo pipefail
cd "$(dirname "$0")/.."

main() {
  local folder=$PWD/docs/tokens
  mkdir -p "$folder"
  scripts/kryoptic.sh
  scripts/pkcs11-proxy.sh
  # Run one module at a time, because tokens that share the machine affect each other's rates.
  KEYBROKER_TOKEN_REPORTS=$folder cargo nextest run --package keybroker --test it --test-threads 1 \
    -E 'test(/^reports::.*_is_as_published$/)'
  printf 'token-reports: wrote %s\n' "$folder"
}

main "$@"
