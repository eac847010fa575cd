#!/usr/bin/env bash
# Builds Kryoptic, an independent PKCS#11 module, for the conformance tests, and prints the path of the module. The script builds
# each version once; tests/kryoptic/Cargo.toml sets the version. It needs the packages that `scripts/install.sh --tools` installs.
# The first build needs the network.
set -euo pipefail
cd "$(dirname "$0")/.."

main() {
  local version module log
  version=$(sed -nE 's/^kryoptic = \{ version = "=([0-9.]+)".*/\1/p' tests/kryoptic/Cargo.toml)
  [[ -n $version ]] || { printf 'kryoptic: tests/kryoptic/Cargo.toml sets no exact version of kryoptic (kryoptic = { version = "=…" })\n' >&2; exit 1; }
  module=target/kryoptic/libkryoptic-$version.so
  if [[ ! -e $module ]]; then
    printf 'kryoptic: building %s (once, about two minutes)\n' "$version" >&2
    log=$(mktemp)
    if ! cargo build --quiet --locked --release --manifest-path tests/kryoptic/Cargo.toml --package kryoptic \
      --target-dir target/kryoptic >"$log" 2>&1; then
      tail -n 30 "$log" >&2
      printf 'kryoptic: the build failed; the end of its output is above, the complete output is in %s\n' "$log" >&2
      exit 1
    fi
    rm -f "$log"
    # Copy the module last, so that an interrupted build leaves no module.
    cp target/kryoptic/release/libkryoptic_pkcs11.so "$module.partial"
    mv "$module.partial" "$module"
  fi
  printf '%s\n' "$module"
}

main "$@"
