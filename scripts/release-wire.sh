#!/usr/bin/env bash
# Keeps the descriptors of the wire format as released, for the compatibility test. Run when a release is made, never otherwise.
set -euo pipefail
cd "$(dirname "$0")/.."

cp src/proto/src/generated/keybroker_v1.binpb tests/wire/keybroker_v1.binpb
printf 'tests/wire/keybroker_v1.binpb: %s bytes\n' "$(stat -c %s tests/wire/keybroker_v1.binpb)"
