#!/usr/bin/env bash
# The whole test: installs what is missing, runs every check, then every test. What CI runs, nothing more, nothing less.
# Arguments go to `cargo nextest run`.
set -euo pipefail
cd "$(dirname "$0")/.."

# Tests that find a part missing (SoftHSM, openssl, …) fail under CI and say so; they never pass by skipping.
main() {
  scripts/install.sh --tools
  export PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
  scripts/check.sh
  scripts/kryoptic.sh

  local log
  log=$(mktemp)
  # shellcheck disable=SC2064  # The path is fixed here.
  trap "rm -f '$log'" EXIT
  if ! cargo nextest run --workspace --no-fail-fast --color never "$@" 2>&1 | tee "$log"; then
    printf '\ntest: FAILED\n'
    grep -E '^ *(FAIL|TIMEOUT|SIGABRT|SIGSEGV) ' "$log" | sort -u || true
    exit 1
  fi
  # With arguments the caller chooses what runs.
  [[ $# -gt 0 ]] || scripts/tests-ran.sh "$log"
  printf '\ntest: %s\n' "$(grep -E '^ *Summary ' "$log" | sed 's/^ *//')"
  printf 'test: ok\n'
}

main "$@"
