#!/usr/bin/env bash
# Runs every check that does not run the product: format, lints, documentation, layers, dependencies and scripts.
# `check.sh NAME…` runs only these checks.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH

CHECKS=(format lints documentation lengths dependencies scripts workflows glossary words)

format() { cargo fmt --all --check; }

lints() { cargo clippy --quiet --workspace --all-targets -- -D warnings; }

# A person reads the sample. This check only requires that it is complete: 40 sentences, four headings and the commit.
documentation() {
  RUSTDOCFLAGS='-D warnings' cargo doc --quiet --workspace --no-deps --document-private-items || return 1
  local lines
  lines=$(scripts/sample-prose.sh | wc -l) || return 1
  [[ $lines -eq 45 ]] || { printf 'scripts/sample-prose.sh printed %s lines instead of 45\n' "$lines"; return 1; }
}

# A report and not a limit: a file of 420 lines with one topic is better than two files that split the topic.
lengths() {
  # shellcheck disable=SC2016  # The program is for awk.
  git ls-files -z 'src/*.rs' 'tests/*.rs' | xargs -0 awk '
    FNR == 1 { files++ }
    { lines[FILENAME]++; if (length($0) > 120 && $0 !~ /^[ \t]*\/\//) wide[FILENAME]++ }
    END {
      for (file in lines) {
        total += lines[file]
        if (lines[file] > 400) printf "  %s has %d lines\n", file, lines[file]
        if (wide[file]) printf "  %s has %d lines of code wider than 120 columns\n", file, wide[file]
      }
      printf "  %d files, %d lines\n", files, total
    }'
}

# Checks deny.toml with a crate of this workspace, because building cargo-deny takes minutes.
dependencies() { cargo test --quiet --locked --package keybroker-dependency-check; }

scripts() {
  git ls-files -z 'scripts/*.sh' 'examples/*.sh' .ci/run | xargs -0 shellcheck
}

# CI must run the same script as developers, and every action must be pinned to a commit.
workflows() {
  local loose
  grep -qE '^ *run: \.ci/run$' .github/workflows/ci.yml || { printf 'ci.yml does not run .ci/run\n'; return 1; }
  loose=$(git grep -nE '^[ -]*uses:' -- .github/workflows | grep -vE '@[0-9a-f]{40}( |$)' || true)
  [[ -z $loose ]] && return
  printf '%s\n' "$loose"
  return 1
}

glossary() { scripts/glossary.sh; }

# Notes to developers and paths of one machine must not be in a release.
words() {
  local found
  found=$(git grep -nIE '\b(TODO|FIXME|XXX)\b|\.\./shared|(^|[^[:alnum:]./])/(work|home)/[a-z]|[Cc]o-[Aa]uthored-[Bb]y|[Gg]enerated with \[' \
    -- . ':!scripts/check.sh' ':!Cargo.lock' || true)
  [[ -z $found ]] && return
  printf '%s\n' "$found"
  return 1
}

# `run` calls a check inside `if`, where the shell ignores `set -e`. Therefore each check must end with the status to
# report.
run() {
  local name=$1 log started=$SECONDS
  log=$(mktemp)
  if "$name" >"$log" 2>&1; then
    [[ $name == lengths ]] && cat "$log"
    printf 'check: %-14s ok  (%d s)\n' "$name" $((SECONDS - started))
    rm -f "$log"
  else
    cat "$log"
    rm -f "$log"
    printf 'check: %-14s FAILED\n' "$name"
    return 1
  fi
}

main() {
  local name known failed=()
  known=" ${CHECKS[*]} "
  for name in "${@:-${CHECKS[@]}}"; do
    [[ $known == *" $name "* ]] || { printf 'check: there is no check %s; the checks are:%s\n' "$name" "$known" >&2; exit 2; }
    run "$name" || failed+=("$name")
  done
  if [[ ${#failed[@]} -gt 0 ]]; then
    printf 'check: FAILED: %s\n' "${failed[*]}"
    exit 1
  fi
  printf 'check: ok\n'
}

main "$@"
