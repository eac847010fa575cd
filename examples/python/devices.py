"""Opens a member's user key on two trusted devices: the client's side of docs/devices.md, with real keys.

The program plays both devices of one member. Set the broker and the access token of the member in the environment:
KEYBROKER_ENDPOINT (https://host:port), KEYBROKER_CA (a PEM file) and KEYBROKER_TOKEN (the access token). A real app
keeps the device key and the signature key in the secure storage of its device.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import hmac
import os
import pathlib
import secrets
import struct
import sys
import time
from urllib.parse import urlsplit

import grpc
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from keybroker.v1 import device_pb2, device_pb2_grpc, user_key_pb2, user_key_pb2_grpc

KEY_NAME = "vault"
# How an answer is encrypted. A trusted device uses SHA-256; a token that supports only SHA-1 uses SHA-1.
ENCRYPTION = "rsa-oaep-sha256"
WORDS = pathlib.Path(__file__).resolve().parents[2] / "src/core/src/eff_long_wordlist.txt"
OAEP = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
OAEP_SHA1 = padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA1(), None)
ENCRYPTIONS = {ENCRYPTION: OAEP, "rsa-oaep-sha1": OAEP_SHA1}
DEADLINE = 10.0


def spki(public_key) -> bytes:
    return public_key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def encrypt(key: bytes, data: bytes) -> bytes:
    """AES-256-GCM with a random nonce before the ciphertext."""
    nonce = secrets.token_bytes(12)
    return nonce + AESGCM(key).encrypt(nonce, data, None)


def decrypt(key: bytes, data: bytes) -> bytes:
    return AESGCM(key).decrypt(data[:12], data[12:], None)


def phrase(user: str, public_key: bytes) -> str:
    """The fingerprint phrase, which the member compares on both devices."""
    words = [word for word in WORDS.read_text("ascii").splitlines() if not word.startswith("#")]
    block = hmac.new(public_key, user.encode() + b"\x01", hashlib.sha256).digest()
    number, chosen = int.from_bytes(block, "big"), []
    for _ in range(5):
        number, index = divmod(number, len(words))
        chosen.append(words[index])
    return " ".join(chosen)


class Device:
    """The keys of an app."""

    def __init__(self, user: str, name: str):
        self.user, self.name, self.id = user, name, secrets.token_bytes(16)
        self.device_key = secrets.token_bytes(32)
        self.signature_key = ed25519.Ed25519PrivateKey.generate()
        self.last_signature = 0

    def verification_key(self) -> bytes:
        raw = serialization.Encoding.Raw, serialization.PublicFormat.Raw
        return self.signature_key.public_key().public_bytes(*raw)

    def sign(self, change: str, *fields: bytes):
        """Signs a change: docs/devices.md, "Sign a change"."""
        now = max(time.time_ns() // 1_000, self.last_signature + 1)
        self.last_signature = now
        head = [
            b"keybroker/device-signature/v1",
            change.encode(),
            b"default",
            self.user.encode(),
            self.id,
            struct.pack(">q", now),
        ]
        signed = b"".join(struct.pack(">I", len(field)) + field for field in [*head, *fields])
        return device_pb2.DeviceSignature(
            device_id=self.id, sign_time_us=now, signature=self.signature_key.sign(signed)
        )

    def sealed(self, user_key: bytes):
        """A new key pair, and the three encrypted values that the broker keeps."""
        pair = rsa.generate_private_key(65537, 2048)
        private_key = pair.private_bytes(
            serialization.Encoding.DER,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return device_pb2.DeviceKeys(
            user_key=pair.public_key().encrypt(user_key, OAEP),
            public_key=encrypt(user_key, spki(pair.public_key())),
            private_key=encrypt(self.device_key, private_key),
        )

    def trust(self, user_key: bytes, revision: int, request_id: bytes = b""):
        """The request that establishes the trust of this device."""
        keys = self.sealed(user_key)
        fields = [
            self.id,
            self.name.encode(),
            b"example",
            self.verification_key(),
            KEY_NAME.encode(),
            struct.pack(">Q", revision),
            keys.user_key,
            keys.public_key,
            keys.private_key,
        ]
        return device_pb2.EstablishTrustRequest(
            device_id=self.id,
            name=self.name,
            type="example",
            verification_key=self.verification_key(),
            key_name=KEY_NAME,
            revision=revision,
            keys=keys,
            access_request_id=request_id,
            signature=self.sign("establish", *fields),
        )

    def open(self, service) -> bytes:
        """Opens the user key as the app does at each start."""
        answer = service.GetDeviceKeys(device_pb2.GetDeviceKeysRequest(device_id=self.id))
        private_key = decrypt(self.device_key, answer.keys.private_key)
        return serialization.load_der_private_key(private_key, None).decrypt(answer.keys.user_key, OAEP)


class Service:
    """Calls with the access token and a deadline."""

    def __init__(self, stub, token: str):
        self.stub, self.metadata = stub, [("authorization", f"Bearer {token}")]

    def __getattr__(self, name: str):
        method = getattr(self.stub, name)
        return lambda request: method(request, timeout=DEADLINE, metadata=self.metadata)


@dataclasses.dataclass
class Asked:
    """What a new device keeps of its request until the request is decided."""

    id: bytes
    code: bytes
    pair: rsa.RSAPrivateKey

    def public_key(self) -> bytes:
        return spki(self.pair.public_key())


def ask(service, device: Device, approver=device_pb2.ACCESS_APPROVER_DEVICE) -> Asked:
    """On a new device: requests access. The member compares the phrase of the public key."""
    pair, code = rsa.generate_private_key(65537, 2048), secrets.token_bytes(32)
    answer = service.CreateAccessRequest(
        device_pb2.CreateAccessRequestRequest(
            device_id=device.id,
            device_name=device.name,
            device_type="example",
            verification_key=device.verification_key(),
            public_key=spki(pair.public_key()),
            access_code=code,
            key_name=KEY_NAME,
            approver=approver,
        )
    )
    return Asked(answer.access_request.id, code, pair)


def pending(service, request_id: bytes):
    """The pending request with this id, or None."""
    listed = service.ListAccessRequests(device_pb2.ListAccessRequestsRequest()).access_requests
    return next((one for one in listed if one.id == request_id), None)


def approve(service, signer: Device, request) -> None:
    """On a trusted device, after the member has compared the phrase: encrypts the user key to the new device."""
    recipient = serialization.load_der_public_key(request.public_key)
    sealed = recipient.encrypt(signer.open(service), OAEP)
    fields = [request.id, request.public_key, sealed, ENCRYPTION.encode()]
    service.ApproveAccessRequest(
        device_pb2.ApproveAccessRequestRequest(
            access_request_id=request.id,
            encrypted_user_key=sealed,
            encryption=ENCRYPTION,
            signature=signer.sign("approve", *fields),
        )
    )


def finish(service, device: Device, asked: Asked, revision: int) -> bool:
    """On the new device: opens the answer and establishes trust. Returns False if the request is not decided yet."""
    named = {"access_request_id": asked.id, "access_code": asked.code}
    answer = service.FetchAccessAnswer(device_pb2.FetchAccessAnswerRequest(**named))
    if answer.state != device_pb2.ACCESS_REQUEST_STATE_APPROVED:
        return False
    user_key = asked.pair.decrypt(answer.encrypted_user_key, ENCRYPTIONS[answer.encryption])
    service.EstablishTrust(device.trust(user_key, revision, asked.id))
    service.ConfirmAccessAnswer(device_pb2.ConfirmAccessAnswerRequest(**named))
    return True


def give_access(service, first: Device, second: Device) -> None:
    """The second device asks, the first one approves, and the second one opens the answer."""
    asked = ask(service, second)
    print(f"{second.name}: {phrase(second.user, asked.public_key())}")
    request = pending(service, asked.id)
    print(f"{first.name}: {phrase(first.user, request.public_key)}")
    approve(service, first, request)
    assert finish(service, second, asked, 1)


def rotate(service, signer: Device) -> int:
    """Replaces the user key, and encrypts the new one to every trusted device."""
    old_key, new_key = signer.open(service), secrets.token_bytes(32)
    listed = service.ListDevices(device_pb2.ListDevicesRequest()).devices
    kept, untrusted = [], []
    revision = 0
    for device in listed:
        if device.state != device_pb2.DEVICE_STATE_TRUSTED:
            continue
        revision = device.revision
        try:
            public_key = decrypt(old_key, device.encrypted_public_key)
        except Exception:  # The library raises InvalidTag: the public key does not open.
            untrusted.append(device.id)
            continue
        recipient = serialization.load_der_public_key(public_key)
        kept.append(
            device_pb2.RotatedDevice(
                device_id=device.id,
                user_key=recipient.encrypt(new_key, OAEP),
                public_key=encrypt(new_key, public_key),
            )
        )
    fields = [KEY_NAME.encode(), struct.pack(">Q", revision), new_key, struct.pack(">I", len(kept))]
    for device in kept:
        fields += [device.device_id, device.user_key, device.public_key]
    request = device_pb2.RotateDevicesRequest(
        key_name=KEY_NAME,
        key_material=new_key,
        expected_revision=revision,
        devices=kept,
        untrusted_device_ids=untrusted,
        signature=signer.sign("rotate", *fields, *untrusted),
    )
    return service.RotateDevices(request).revision


def untrust(service, signer: Device, lost: bytes) -> None:
    """Ends the trust of a lost device, by its id."""
    service.UntrustDevices(
        device_pb2.UntrustDevicesRequest(
            device_ids=[lost],
            lost=True,
            signature=signer.sign("untrust", b"lost", b"these", lost),
        )
    )


def story(channel: grpc.Channel, user: str, token: str) -> None:
    keys = Service(user_key_pb2_grpc.UserKeyServiceStub(channel), token)
    service = Service(device_pb2_grpc.DeviceServiceStub(channel), token)
    user_key = secrets.token_bytes(32)
    keys.CreateUserKey(
        user_key_pb2.CreateUserKeyRequest(user=user, key_name=KEY_NAME, key_material=user_key)
    )
    laptop, phone = Device(user, "laptop"), Device(user, "phone")
    service.EstablishTrust(laptop.trust(user_key, 1))
    assert laptop.open(service) == user_key
    give_access(service, laptop, phone)
    assert phone.open(service) == user_key
    print("both devices open the user key")
    revision = rotate(service, laptop)
    assert laptop.open(service) == phone.open(service) != user_key
    print(f"both devices open revision {revision}")
    untrust(service, laptop, phone.id)
    try:
        phone.open(service)
    except grpc.RpcError as error:
        print(f"the lost phone: {error.code().name}")


@contextlib.contextmanager
def connect():
    """A channel to the broker in the environment."""
    with open(os.environ["KEYBROKER_CA"], "rb") as file:
        credentials = grpc.ssl_channel_credentials(root_certificates=file.read())
    endpoint = urlsplit(os.environ["KEYBROKER_ENDPOINT"]).netloc
    with grpc.secure_channel(endpoint, credentials) as channel:
        yield channel


def main() -> int:
    parser = argparse.ArgumentParser(description="Open a user key on two trusted devices")
    parser.add_argument("user", help="the user id of the member, as in the access token")
    arguments = parser.parse_args()
    with connect() as channel:
        try:
            story(channel, arguments.user, os.environ["KEYBROKER_TOKEN"])
        except grpc.RpcError as error:
            print(f"error: {error.code().name}: {error.details()}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
