"""Enrols a user's key and releases it again, over gRPC with a client certificate. The release can be sealed.

The example shows three things that every client needs: a deadline on each call, the reason of a refusal, and safe
retries. Set the broker and the certificate in the environment: KEYBROKER_ENDPOINT (https://host:port), KEYBROKER_CA,
KEYBROKER_CERT and KEYBROKER_KEY (PEM files).
"""

import argparse
import hashlib
import os
import random
import secrets
import sys
import time
import uuid
from urllib.parse import urlsplit

import grpc
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from keybroker.v1 import user_key_pb2, user_key_pb2_grpc

DOMAIN = "keybroker.v1"
KEY_NAME = "example"
# The algorithms of a sealed release. The token of the broker determines which one it uses.
OAEP = {"RSA-OAEP-SHA-256": hashes.SHA256, "RSA-OAEP-SHA-1": hashes.SHA1}
# Time limit of a call with all its attempts, in seconds.
DEADLINE = 10.0
# Eight attempts outlast the restart of a broker or of its token worker, about one second.
ATTEMPTS = 8
FIRST_PAUSE = 0.02
LONGEST_PAUSE = 1.0
# Calls with any other reason fail again in the same way.
TRANSIENT = {"QUEUE_FULL", "RATE", "TOKEN_DOWN", "STORE_DOWN", "AUDIT_DOWN", "IDENTITY_DOWN", "DEADLINE"}
# A failure without a reason comes from the connection.
CONNECTION = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}


def connect() -> grpc.Channel:
    def read(name: str) -> bytes:
        with open(os.environ[name], "rb") as file:
            return file.read()

    credentials = grpc.ssl_channel_credentials(
        root_certificates=read("KEYBROKER_CA"),
        private_key=read("KEYBROKER_KEY"),
        certificate_chain=read("KEYBROKER_CERT"),
    )
    endpoint = urlsplit(os.environ["KEYBROKER_ENDPOINT"])
    # Disable gRPC's own retries, which do not use the broker's reasons or the request id.
    return grpc.secure_channel(endpoint.netloc, credentials, options=[("grpc.enable_retries", 0)])


def details(error: grpc.RpcError) -> tuple[str | None, float]:
    """The broker's reason, or None, and the delay that it asks for, in seconds."""
    reason, delay = None, 0.0
    status = rpc_status.from_call(error)
    for detail in status.details if status else []:
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            reason = info.reason
        elif detail.Unpack(retry):
            delay = retry.retry_delay.ToTimedelta().total_seconds()
    return reason, delay


def call(method, request):
    """Calls a method. Safe for reads, and for changes whose request has a request id: all attempts send the same one."""
    ends = time.monotonic() + DEADLINE
    pause = FIRST_PAUSE
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return method(request, timeout=max(ends - time.monotonic(), 0.001))
        except grpc.RpcError as error:
            reason, delay = details(error)
            is_transient = reason in TRANSIENT if reason else error.code() in CONNECTION
            wait = max(pause * random.uniform(0, 2), delay * random.uniform(1, 1.2))
            if not is_transient or attempt == ATTEMPTS or time.monotonic() + wait >= ends:
                raise
            print(f"attempt {attempt}: {reason or error.code().name}, again in {wait:.2f} s", file=sys.stderr)
            time.sleep(wait)
            pause = min(pause * 2, LONGEST_PAUSE)


def enrol(service, user: str, request_id: str) -> None:
    request = user_key_pb2.CreateUserKeyRequest(
        user=user,
        key_name=KEY_NAME,
        key_material=secrets.token_bytes(32),
        # The change has one id for all attempts. A service stores the id together with the planned
        # change.
        request_id=request_id,
    )
    answer = call(service.CreateUserKey, request)
    # Sending the same request again, as after a lost answer, stores nothing and returns the first
    # answer.
    assert call(service.CreateUserKey, request) == answer
    print(f"{user}: stored as revision {answer.user_key.revision}")


def unwrap(service, user: str) -> None:
    request = user_key_pb2.UnwrapUserKeyRequest(user=user, key_name=KEY_NAME)
    answer = call(service.UnwrapUserKey, request)
    # Use the key here, but do not print it. Python cannot overwrite the key in memory.
    print(f"{user}: revision {answer.revision}, {len(answer.key_material)} bytes")


def unwrap_sealed(service, user: str) -> None:
    """The token encrypts the key to a key pair of this process, so the broker never has the key."""
    private = rsa.generate_private_key(public_exponent=65537, key_size=3072)
    public = private.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    recipient = user_key_pb2.Recipient(public_key=public)
    request = user_key_pb2.UnwrapUserKeyRequest(user=user, key_name=KEY_NAME, recipient=recipient)
    answer = call(service.UnwrapUserKey, request)
    sealed = answer.sealed
    assert sealed.recipient_fingerprint == hashlib.sha256(public).digest()
    oaep = OAEP[sealed.algorithm]
    key = private.decrypt(sealed.ciphertext, padding.OAEP(mgf=padding.MGF1(oaep()), algorithm=oaep(), label=None))
    print(f"{user}: revision {answer.revision}, {len(key)} bytes, {sealed.algorithm}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Enrol a user's key and release it again")
    parser.add_argument("command", choices=["enrol", "unwrap", "unwrap-sealed"])
    parser.add_argument("user", help="1 to 255 bytes of UTF-8")
    arguments = parser.parse_args()
    with connect() as channel:
        service = user_key_pb2_grpc.UserKeyServiceStub(channel)
        try:
            if arguments.command == "enrol":
                enrol(service, arguments.user, str(uuid.uuid4()))
            elif arguments.command == "unwrap":
                unwrap(service, arguments.user)
            else:
                unwrap_sealed(service, arguments.user)
        except grpc.RpcError as error:
            reason, _ = details(error)
            print(f"error: {reason or error.code().name}: {error.details()}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
