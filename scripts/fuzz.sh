#!/usr/bin/env bash
# Runs fuzz targets for longer than scripts/test.sh does.
#
# If cargo-fuzz and a nightly toolchain are installed, coverage guides the inputs, and the memory accesses of C code are checked. The
# corpus is kept in target/fuzz for the next run. Otherwise, the inputs are random changes of valid inputs. The script prints an
# input that causes a failure.
#
# Usage: fuzz.sh [--seconds N] [TARGET…]      default: all targets, 300 seconds for each target
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
    # Write the valid inputs to the corpus. Then run the fuzz program in its own directory, because it needs the nightly
    # toolchain.
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
    printf 'fuzz: cargo-fuzz or the nightly toolchain is not installed; the inputs are random\n'
    local filter
    filter=$(printf ' or test(=%s)' "${targets[@]}")
    KEYBROKER_TEST_FUZZ_SECONDS=$seconds cargo nextest run --profile long --package keybroker-fuzz-targets -E "${filter# or }"
  fi
  printf 'fuzz: ok\n'
}

main "$@"
