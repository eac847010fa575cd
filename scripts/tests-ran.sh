#!/usr/bin/env bash
# Fails unless every test of every workspace member ran. A member that is left out of a run fails no test, so the summary
# alone does not show that its tests ran.
#
# Usage: tests-ran.sh LOG      LOG is the output of `cargo nextest run --workspace` without a filter
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  printf 'tests-ran: %s\n' "$1" >&2
  exit 1
}

# Prints each member and its directory on one line.
members() { cargo tree --offline --locked --workspace --depth 0 --prefix none | sed -nE 's/^([^ ]+) v[^ ]+ \((.*)\)$/\1 \2/p'; }

# Counts the tests of each member. nextest lists `keybroker-store`, `keybroker::it` or `keybroker::bin/keybroker`, then
# the name of the test.
counts() {
  cargo nextest list --workspace --message-format oneline --color never 2>/dev/null \
    | awk '{ sub(/::.*/, "", $1); count[$1]++ } END { for (member in count) print member, count[member] }'
}

# The number of tests in the summary, `Summary [ 61.2s] 812 tests run: 812 passed, 0 skipped`.
summary() { sed -nE 's/^ *Summary .* ([0-9]+) tests? run:.*$/\1/p' "$1" | tail -n 1; }

main() {
  [[ $# -eq 1 ]] || fail 'usage: tests-ran.sh LOG'
  local listed ran member directory count total=0 empty=()
  ran=$(summary "$1")
  [[ -n $ran ]] || fail "$1 has no summary of nextest"
  listed=$(counts)
  while read -r member directory; do
    count=$(awk -v member="$member" '$1 == member { print $2 }' <<<"$listed")
    total=$((total + ${count:-0}))
    # The directory has test functions, or its manifest lists tests in other places.
    if [[ -z $count ]] && { grep -rqE '#\[(tokio::)?test\b' --include='*.rs' "$directory" \
      || grep -q '^\[\[test\]\]' "$directory/Cargo.toml"; }; then
      empty+=("$member")
    fi
  done < <(members)
  [[ $total -gt 0 ]] || fail 'no member has tests'
  [[ ${#empty[@]} -eq 0 ]] || fail "these members have tests, but nextest lists none of them: ${empty[*]}"
  [[ $ran -eq $total ]] || fail "$ran tests ran, but the members have $total"
  printf 'tests-ran: %s\n' "$total tests of $(wc -l <<<"$listed") members"
}

main "$@"
