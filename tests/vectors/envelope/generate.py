#!/usr/bin/env python3
"""Writes the envelope vectors of format 1, from the format's description alone.

A second implementation on purpose: it shares no code with the broker. Run it in this folder; it must change nothing that
is committed, because vectors of a released format stay as they are.
"""

import hashlib
import hmac
import json
import pathlib

HERE = pathlib.Path(__file__).parent
BINDING_KEY = hashlib.sha256(b"keybroker test binding key").digest()
KEY_ID = bytes(range(16))
RECORD = {"tenant": "default", "record_id": "f0" * 16, "user": "alice@example.com", "key_name": "vault", "revision": 1}


def sized(data):
    return len(data).to_bytes(2, "big") + data


def context_bytes(kind, context):
    if kind == 2:
        return sized(context["tenant"].encode()) + sized(bytes.fromhex(context["context"]))
    return (
        sized(context["tenant"].encode())
        + bytes.fromhex(context["record_id"])
        + sized(context["user"].encode())
        + sized(context["key_name"].encode())
        + context["revision"].to_bytes(8, "big")
    )


def envelope(context, kind=1, algorithm=1, wrapped_len=256, key_id=KEY_ID):
    wrapped = b"".join(hashlib.sha256(b"wrapped %d" % i).digest() for i in range(wrapped_len // 32))
    message = (
        sized(b"keybroker/envelope/v1")
        + bytes([kind, algorithm])
        + key_id
        + sized(wrapped)
        + context_bytes(kind, context)
    )
    mac = hmac.new(BINDING_KEY, message, hashlib.sha256).digest()
    return bytes([1, kind, algorithm]) + key_id + sized(wrapped) + mac


def write(folder, name, data, context, kind="record"):
    path = HERE / "v1" / folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    vector = {"binding_key": BINDING_KEY.hex(), "kind": kind, "context": context, "envelope": data.hex()}
    path.write_text(json.dumps(vector, indent=1, sort_keys=True) + "\n")


def flip(data, offset, bit=1):
    return data[:offset] + bytes([data[offset] ^ bit]) + data[offset + 1 :]


def accepted():
    for algorithm, length in [(1, 256), (1, 384), (1, 512), (2, 256)]:
        write("accept", f"algorithm-{algorithm}-{length}-bytes", envelope(RECORD, algorithm=algorithm, wrapped_len=length), RECORD)
    longest = RECORD | {"tenant": "t" * 64, "user": "u" * 255, "key_name": "k" * 64, "revision": 2**63 - 1}
    write("accept", "longest-context", envelope(longest, wrapped_len=512), longest)
    shortest = RECORD | {"tenant": "t", "user": "u", "key_name": "k"}
    write("accept", "shortest-context", envelope(shortest), shortest)
    unicode_user = RECORD | {"user": "Zoë 🔑"}
    write("accept", "unicode-user", envelope(unicode_user), unicode_user)
    client = {"tenant": "default", "context": "00ff" * 512}
    write("accept", "client-longest-context", envelope(client, kind=2), client, kind="client")
    empty = {"tenant": "default", "context": ""}
    write("accept", "client-empty-context", envelope(empty, kind=2), empty, kind="client")


def malformed():
    good = envelope(RECORD)
    for cut in [0, 1, 2, 3, 18, 20, 21, 276, len(good) - 1]:
        write("reject/truncated", f"first-{cut}-bytes", good[:cut], RECORD)
    for version in [0, 2, 255]:
        write("reject/version", f"version-{version}", bytes([version]) + good[1:], RECORD)
    for kind in [0, 3, 255]:
        write("reject/kind", f"kind-{kind}", good[:1] + bytes([kind]) + good[2:], RECORD)
    for algorithm in [0, 3, 255]:
        write("reject/algorithm", f"algorithm-{algorithm}", good[:2] + bytes([algorithm]) + good[3:], RECORD)
    for length in [0, 255, 513, 65535]:
        body = good[:19] + length.to_bytes(2, "big") + b"w" * length + good[-32:]
        write("reject/wrapped-length", f"wrapped-{length}-bytes", body, RECORD)
    for extra in [1, 32]:
        write("reject/trailing", f"trailing-{extra}", good + b"\0" * extra, RECORD)


def refused_by_mac():
    good = envelope(RECORD)
    for name, offset in [("key-id", 3), ("wrapped-first", 21), ("wrapped-last", 276), ("mac-first", 277), ("mac-last", 308)]:
        write("reject/mac", f"flipped-{name}", flip(good, offset), RECORD)
    write("reject/mac", "other-algorithm", good[:2] + b"\x02" + good[3:], RECORD)
    write("reject/mac", "zero-mac", good[:-32] + b"\0" * 32, RECORD)
    changes = {
        "tenant": "other",
        "record_id": "f1" + "f0" * 15,
        "user": "bob@example.com",
        "key_name": "vault2",
        "revision": 2,
    }
    for field, value in changes.items():
        write("reject/context", f"other-{field.replace('_', '-')}", good, RECORD | {field: value})
    case = RECORD | {"user": "Alice@example.com"}
    write("reject/context", "other-case-of-user", good, case)
    shifted = RECORD | {"user": "alice@example.comv", "key_name": "ault"}
    write("reject/context", "shifted-boundary", good, shifted)
    as_client = {"tenant": "default", "context": context_bytes(1, RECORD)[9:].hex()}
    write("reject/context", "record-as-client", good, as_client, kind="client")
    client = {"tenant": "default", "context": "00"}
    write("reject/context", "client-as-record", envelope(client, kind=2), RECORD)


accepted()
malformed()
refused_by_mac()
