#!/usr/bin/env bash
# Stores the descriptors of the released wire format for the compatibility test. Run this only when a release is made.
set -euo pipefail
cd "$(dirname "$0")/.."

cp src/proto/src/generated/keybroker_v1.binpb tests/wire/keybroker_v1.binpb
printf 'release-wire: wrote tests/wire/keybroker_v1.binpb (%s bytes)\n' "$(stat -c %s tests/wire/keybroker_v1.binpb)"
