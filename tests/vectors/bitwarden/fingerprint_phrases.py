#!/usr/bin/env python3
"""Computes fingerprint phrases in a second implementation, with Python's big integers.

Prints one line per vector: text, public key in base64, phrase; separated by tabs. The phrase does not depend on the
form of the key, so most keys are arbitrary bytes of the length that a public key of RSA-2048 or RSA-4096 has.

    fingerprint_phrases.py >fingerprint-phrases.tsv
"""

import base64
import hashlib
import hmac
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
LIST = HERE / "../../../src/core/src/eff_long_wordlist.txt"
TEXTS = ["user@example.com", "User@Example.com", "üser@example.com", "a@b", "first.last+tag@example.org"]


def words():
    return [line for line in LIST.read_text(encoding="ascii").splitlines() if not line.startswith("#")]


def expand(prk, info, length):
    """HKDF-Expand with SHA-256 (RFC 5869 section 2.3)."""
    output, block, counter = b"", b"", 1
    while len(output) < length:
        block = hmac.new(prk, block + info + bytes([counter]), hashlib.sha256).digest()
        output += block
        counter += 1
    return output[:length]


def phrase(text, public_key, word_list):
    number = int.from_bytes(expand(public_key, text.encode(), 32), "big")
    chosen = []
    for _ in range(5):
        number, index = divmod(number, len(word_list))
        chosen.append(word_list[index])
    return "-".join(chosen)


def keys():
    yield base64.b64decode((HERE / "fingerprint-public-key.txt").read_text(encoding="ascii"))
    for number, length in enumerate([64, 65, 294, 294, 294, 294, 294, 294, 422, 550, 550, 550]):
        yield hashlib.shake_256(b"fingerprint phrase %d" % number).digest(length)


def main():
    sys.stdout.reconfigure(encoding="utf-8")
    word_list = words()
    assert len(word_list) == 7776
    for key in keys():
        for text in TEXTS:
            print(text, base64.b64encode(key).decode(), phrase(text, key, word_list), sep="\t")


if __name__ == "__main__":
    main()
