#!/usr/bin/env bash
# Runs the complete test: installs missing requirements, runs every check and then every test. CI runs exactly this script.
# Arguments are passed to `cargo nextest run`.
set -euo pipefail
cd "$(dirname "$0")/.."

# Prints the skipped tests. Skipped tests count as passed, so the summary alone does not show them.
skipped() {
  [[ -s $KEYBROKER_SKIPPED ]] || return 0
  printf '\ntest: these tests were skipped, because this machine lacks a requirement:\n'
  sort -u "$KEYBROKER_SKIPPED" | sed 's/^/test: skipped: /'
}

# If a requirement (SoftHSM, openssl, root, …) is missing, the affected tests fail with a message under CI. On other machines they
# are skipped and listed.
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
  # With arguments, the caller selects the tests, so not all of them run.
  [[ $# -gt 0 ]] || scripts/tests-ran.sh "$log"
  printf '\ntest: %s\n' "$(grep -E '^ *Summary ' "$log" | sed 's/^ *//')"
  printf 'test: ok\n'
}

main "$@"
