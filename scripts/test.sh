#!/usr/bin/env bash
# The whole test: installs what is missing, runs every check, then every test. What CI runs, nothing more, nothing less.
# Arguments go to `cargo nextest run`.
set -euo pipefail
cd "$(dirname "$0")/.."

# Prints what was not tested. Its tests count as passed, so the summary alone does not show it.
skipped() {
  [[ -s $KEYBROKER_SKIPPED ]] || return 0
  printf '\ntest: skipped, because this machine lacks something:\n'
  sort -u "$KEYBROKER_SKIPPED" | sed 's/^/test: skipped: /'
}

# Tests that find a part missing (SoftHSM, openssl, …), or are not run as root, fail under CI and say so; they never pass by skipping.
# Elsewhere the parts that are not tested are listed.
main() {
  scripts/install.sh --tools
  export PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
  scripts/check.sh
  scripts/kryoptic.sh

  local log
  log=$(mktemp)
  KEYBROKER_SKIPPED=$(mktemp)
  export KEYBROKER_SKIPPED
  # shellcheck disable=SC2064  # The paths are fixed here.
  trap "rm -f '$log' '$KEYBROKER_SKIPPED'" EXIT
  if ! cargo nextest run --workspace --no-fail-fast --color never "$@" 2>&1 | tee "$log"; then
    printf '\ntest: FAILED\n'
    grep -E '^ *(FAIL|TIMEOUT|SIGABRT|SIGSEGV) ' "$log" | sort -u || true
    exit 1
  fi
  skipped
  # With arguments the caller chooses what runs.
  [[ $# -gt 0 ]] || scripts/tests-ran.sh "$log"
  printf '\ntest: %s\n' "$(grep -E '^ *Summary ' "$log" | sed 's/^ *//')"
  printf 'test: ok\n'
}

main "$@"
