#!/usr/bin/env bash
# Keeps the descriptors of the wire format as released, for the compatibility test. Run when a release is made, never otherwise.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo build --quiet
newest=$(find "${CARGO_TARGET_DIR:-target}/debug/build" -name keybroker_v1.binpb -printf '%T@ %p\n' | sort -n | tail -1 | cut -d' ' -f2-)
cp "$newest" tests/wire/keybroker_v1.binpb
printf 'tests/wire/keybroker_v1.binpb: %s bytes\n' "$(stat -c %s tests/wire/keybroker_v1.binpb)"
