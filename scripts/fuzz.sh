#!/usr/bin/env bash
# Runs the fuzz targets for longer than scripts/test.sh does: those named, else all, each for so many seconds (300).
#
# With cargo-fuzz and a nightly toolchain the inputs are guided by coverage, and the memory of C code is checked; what was learnt is kept
# in target/fuzz for the next run. Without them the inputs are random changes of good ones. An input that fails is printed.
#
# Usage: fuzz.sh [--seconds N] [TARGET…]
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH

guided() {
  local seconds=$1 target corpus
  shift
  for target in "$@"; do
    corpus=$PWD/target/fuzz/corpus/$target
    mkdir -p "$corpus"
    printf 'fuzz: %s for %s s\n' "$target" "$seconds"
    # In the directory of the programs, whose toolchain is another one. The good inputs are the first ones.
    cargo run --quiet --package keybroker-fuzz-targets --example seeds -- "$target" "$corpus"
    (cd tests/fuzz && cargo +nightly fuzz run --fuzz-dir . --target-dir ../../target/fuzz/build "$target" "$corpus" -- \
      -max_total_time="$seconds" -max_len=65536 -timeout=20)
  done
}

main() {
  local seconds=300 targets=()
  if [[ ${1:-} == --seconds ]]; then
    seconds=${2:?--seconds needs a number}
    shift 2
  fi
  targets=("$@")
  if [[ ${#targets[@]} -eq 0 ]]; then
    mapfile -t targets < <(basename --suffix=.rs tests/fuzz/fuzz_targets/*.rs)
  fi
  if cargo fuzz --version >/dev/null 2>&1 && cargo +nightly --version >/dev/null 2>&1; then
    guided "$seconds" "${targets[@]}"
  else
    printf 'fuzz: without cargo-fuzz and a nightly toolchain the inputs are random\n'
    local filter
    filter=$(printf ' or test(=%s)' "${targets[@]}")
    KEYBROKER_TEST_FUZZ_SECONDS=$seconds cargo nextest run --profile long --package keybroker-fuzz-targets -E "${filter# or }"
  fi
  printf 'fuzz: ok\n'
}

main "$@"
