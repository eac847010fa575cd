"""Searches the memory of processes for keys, and shows first that the search finds keys that are there.

Every form of every window of 16 bytes counts: raw, in hexadecimal, and in base64. The processes of the broker are not
dumpable, so only root can read their memory.
"""

import argparse
import base64
import os
import pathlib
import signal
import socket
import ssl
import struct
import subprocess
import sys
from urllib.parse import urlsplit

PAGE = os.sysconf("SC_PAGESIZE")
# Bits 62 and 63 of an entry of pagemap: the page is swapped out, or present.
USED = 0b11 << 62


def forms(key: bytes) -> dict[str, list[bytes]]:
    """Blocks of the key in each form. Every window of 16 bytes contains at least one block of each form completely.

    Raw: 16 bytes contain one of the aligned blocks of 8 bytes. Base64: 16 bytes contain four complete groups of three
    bytes, and therefore an aligned pair of groups, whatever the position in the text is.
    """
    raw = [key[at : at + 8] for at in range(0, len(key) - 7, 8)]
    pairs = [key[at : at + 6] for phase in range(3) for at in range(phase, len(key) - 5, 6)]
    texts = [base64.b64encode(pair) for pair in pairs] + [base64.urlsafe_b64encode(pair) for pair in pairs]
    return {
        "raw": raw,
        "hexadecimal": [block.hex().encode() for block in raw] + [block.hex().upper().encode() for block in raw],
        "base64": sorted(set(texts)),
    }


def runs(pid: int):
    """The writable memory of a process, in pieces without gaps. Pages that were never used are left out."""
    folder = pathlib.Path(f"/proc/{pid}")
    with open(folder / "mem", "rb", 0) as memory, open(folder / "pagemap", "rb", 0) as pagemap:
        for line in (folder / "maps").read_text().splitlines():
            area, mode = line.split()[:2]
            start, end = (int(text, 16) for text in area.split("-"))
            if not mode.startswith("rw"):
                continue
            pagemap.seek(start // PAGE * 8)
            entries = pagemap.read((end - start) // PAGE * 8)
            run = bytearray()
            for page, (entry,) in enumerate(struct.iter_unpack("<Q", entries)):
                if entry & USED:
                    run += read_page(memory, start + page * PAGE)
                elif run:
                    yield bytes(run)
                    run = bytearray()
            yield bytes(run)


def read_page(memory, at: int) -> bytes:
    try:
        memory.seek(at)
        return memory.read(PAGE)
    except OSError:
        return b""  # The process has released the page meanwhile.


def search(pid: int, keys: dict[str, bytes]) -> dict[str, set[str]]:
    """The forms in which each key is in the memory of a process."""
    found = {name: set() for name in keys}
    wanted = {name: forms(key) for name, key in keys.items()}
    for run in runs(pid):
        for name, blocks in wanted.items():
            found[name] |= {form for form, those in blocks.items() if any(block in run for block in those)}
    return found


HOLDER = "import sys; held = sys.stdin.buffer.read(int(sys.argv[1])); print(flush=True); sys.stdin.buffer.read()"


def control(key: bytes) -> bool:
    """Whether the search finds one window of the key in a process that holds only this window, in each form."""
    window = key[5:21]
    held = {"raw": window, "hexadecimal": window.hex().encode(), "base64": base64.b64encode(window)}
    for form, text in held.items():
        command = [sys.executable, "-c", HOLDER, str(len(text))]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            holder.stdin.write(text)
            holder.stdin.flush()
            holder.stdout.readline()
            found = search(holder.pid, {"key": key})["key"]
            holder.stdin.close()
        if found != {form}:
            return False
    return True


def table(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def report(arguments) -> int:
    keys = {name: pathlib.Path(path).read_bytes() for name, path in arguments.key}
    if not all(control(key) for key in keys.values()):
        print("the search does not find the keys in a process that holds them", file=sys.stderr)
        return 1
    control_name, control_value = arguments.control
    wanted = {f"control: {control_name}": bytes.fromhex(control_value)} | keys
    rows, is_complete = [["process", *wanted]], True
    for name, pid in arguments.process:
        found = {key: set() for key in wanted}
        for _ in range(arguments.rounds):
            for key, those in search(int(pid), wanted).items():
                found[key] |= those
        rows.append([name, *(", ".join(sorted(those)) or "none" for those in found.values())])
        is_complete &= rows[-1][1] != "none"
    print(table(rows))
    return 0 if is_complete else 1


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """A frame of HTTP/2 (RFC 9113, section 4.1)."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def header(name: str, value: str) -> bytes:
    """A header without indexing (RFC 7541, section 6.2.2)."""

    def text(value: str) -> bytes:
        size, prefix = len(value), bytearray()
        if size < 127:
            return bytes([size]) + value.encode()
        prefix.append(127)
        size -= 127
        while size >= 128:
            prefix.append(size % 128 + 128)
            size //= 128
        return bytes(prefix) + bytes([size]) + value.encode()

    return b"\x00" + text(name) + text(value)


def half_call(arguments) -> int:
    """Sends an enrolment without its last byte, so that the broker has the key and waits, until a signal ends this process."""
    address = urlsplit(arguments.endpoint)
    token = arguments.token_file.read_text().strip()
    fields = [arguments.user.encode(), b"control", arguments.key_file.read_bytes()]
    message = b"".join(bytes([number << 3 | 2, len(field)]) + field for number, field in enumerate(fields, 1))
    headers = {
        ":method": "POST",
        ":scheme": "https",
        ":path": "/keybroker.v1.UserKeyService/CreateUserKey",
        ":authority": address.netloc,
        "content-type": "application/grpc",
        "te": "trailers",
        "authorization": f"Bearer {token}",
    }
    block = b"".join(header(name, value) for name, value in headers.items())
    # The length of the message promises one byte more than the frame contains.
    data = b"\x00" + struct.pack(">I", len(message) + 1) + message
    context = ssl.create_default_context(cafile=arguments.ca)
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((address.hostname, address.port)) as plain:
        with context.wrap_socket(plain, server_hostname=address.hostname) as connection:
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(4, 1, 0, b""))
            connection.sendall(frame(1, 4, 1, block) + frame(0, 0, 1, data))
            print("sent", flush=True)
            signal.pause()
    return 0


def named(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not value:
        raise argparse.ArgumentTypeError("must be NAME=VALUE")
    return name, value


def main() -> int:
    parser = argparse.ArgumentParser(description="Search the memory of processes for keys")
    commands = parser.add_subparsers(required=True)
    search_command = commands.add_parser("search", help="search processes for keys")
    search_command.add_argument("--key", type=named, action="append", required=True, metavar="NAME=FILE")
    search_command.add_argument("--control", type=named, required=True, metavar="NAME=HEX", help="a value that each process has")
    search_command.add_argument("--process", type=named, action="append", required=True, metavar="NAME=PID")
    search_command.add_argument("--rounds", type=int, default=1, help="number of searches of each process")
    search_command.set_defaults(run=report)
    half = commands.add_parser("half-call", help="send an enrolment without its end, and wait for a signal")
    half.add_argument("endpoint")
    half.add_argument("ca")
    half.add_argument("token_file", type=pathlib.Path)
    half.add_argument("user")
    half.add_argument("key_file", type=pathlib.Path)
    half.set_defaults(run=half_call)
    arguments = parser.parse_args()
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
