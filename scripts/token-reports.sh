#!/usr/bin/env bash
# Writes the reports on tokens in docs/tokens anew, on the modules that the tests use. Needs scripts/install.sh --tools.
set -euo pipefail
cd "$(dirname "$0")/.."

main() {
  local folder=$PWD/docs/tokens
  mkdir -p "$folder"
  scripts/kryoptic.sh
  scripts/pkcs11-proxy.sh
  # One after another: the rates of a token that shares the machine with another say less.
  KEYBROKER_TOKEN_REPORTS=$folder cargo nextest run --package keybroker --test it --test-threads 1 \
    -E 'test(/^reports::.*_is_as_published$/)'
  printf 'token-reports: wrote %s\n' "$folder"
}

main "$@"
