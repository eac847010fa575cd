"""An app on one device, as a command: the client's side of docs/devices.md, with the keys of the device in a file.

Set the broker and the access token of the member in the environment, as for devices.py. A real app keeps these keys in
the secure storage of its device, and never writes the user key to a file.
"""

import argparse
import base64
import hashlib
import json
import os
import pathlib
import secrets
import sys

import grpc
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from google.rpc import error_details_pb2
from grpc_status import rpc_status

import devices
from devices import KEY_NAME, Asked, Device, Service, phrase
from keybroker.v1 import device_pb2, device_pb2_grpc, user_key_pb2, user_key_pb2_grpc

ENVIRONMENT = ["KEYBROKER_ENDPOINT", "KEYBROKER_CA", "KEYBROKER_TOKEN"]
APPROVERS = {
    "device": device_pb2.ACCESS_APPROVER_DEVICE,
    "administrator": device_pb2.ACCESS_APPROVER_ADMINISTRATOR,
}
STATES = {
    device_pb2.DEVICE_STATE_TRUSTED: "trusted",
    device_pb2.DEVICE_STATE_UNTRUSTED: "untrusted",
    device_pb2.DEVICE_STATE_LOST: "lost",
}


class Failure(Exception):
    """A failure that the broker did not cause."""


class App:
    """The app: its calls, and the keys in its file."""

    def __init__(self, channel: grpc.Channel, path: pathlib.Path, user: str, name: str):
        token = os.environ["KEYBROKER_TOKEN"]
        self.keys = Service(user_key_pb2_grpc.UserKeyServiceStub(channel), token)
        self.service = Service(device_pb2_grpc.DeviceServiceStub(channel), token)
        self.path, self.asked = path, None
        self.device = Device(user, name)
        if path.exists():
            self.load(json.loads(path.read_text()))

    def load(self, stored: dict) -> None:
        def value(name: str) -> bytes:
            return base64.b64decode(stored[name])

        self.device.name, self.device.last_signature = stored["name"], stored["last_signature"]
        self.device.id, self.device.device_key = value("id"), value("device_key")
        private = ed25519.Ed25519PrivateKey.from_private_bytes(value("signature_key"))
        self.device.signature_key = private
        if "request" in stored:
            pair = serialization.load_der_private_key(value("request_private_key"), None)
            self.asked = Asked(value("request"), value("request_code"), pair)

    def save(self) -> None:
        def text(value: bytes) -> str:
            return base64.b64encode(value).decode()

        stored = {
            "name": self.device.name,
            "last_signature": self.device.last_signature,
            "id": text(self.device.id),
            "device_key": text(self.device.device_key),
            "signature_key": text(self.device.signature_key.private_bytes_raw()),
        }
        if self.asked:
            private = self.asked.pair.private_bytes(
                serialization.Encoding.DER,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            stored |= {
                "request": text(self.asked.id),
                "request_code": text(self.asked.code),
                "request_private_key": text(private),
            }
        self.path.touch(mode=0o600)
        self.path.write_text(json.dumps(stored))

    def revision(self) -> int:
        """The current revision of the user key."""
        address = user_key_pb2.GetUserKeyRequest(user=self.device.user, key_name=KEY_NAME)
        return self.keys.GetUserKey(address).user_key.revision

    def pending(self):
        """The pending requests of the member's devices, with the phrases that this app computes."""
        listed = self.service.ListAccessRequests(device_pb2.ListAccessRequestsRequest())
        return [(phrase(self.device.user, one.public_key), one) for one in listed.access_requests]

    # The commands.

    def first(self, _arguments) -> None:
        user_key = secrets.token_bytes(32)
        request = user_key_pb2.CreateUserKeyRequest(
            user=self.device.user, key_name=KEY_NAME, key_material=user_key
        )
        revision = self.keys.CreateUserKey(request).user_key.revision
        print(f"made the user key {fingerprint(user_key)}, and enrolled it as revision {revision}")
        self.service.EstablishTrust(self.device.trust(user_key, revision))
        print(f"{self.device.name} is trusted")

    def ask(self, arguments) -> None:
        approver = APPROVERS[arguments.approver]
        self.asked = devices.ask(self.service, self.device, approver)
        print(f"asked for access; the request needs the approval of {article(arguments.approver)}")
        print(f"phrase: {phrase(self.device.user, self.asked.public_key())}")

    def requests(self, _arguments) -> None:
        pending = self.pending()
        for words, request in pending:
            print(f"{request.device_name} asks for access from {request.peer}")
            print(f"phrase: {words}")
        if not pending:
            print("no device asks for access")

    def approve(self, arguments) -> None:
        compared = " ".join(arguments.phrase)
        matching = [request for words, request in self.pending() if words == compared]
        if len(matching) != 1:
            raise Failure("no pending request has this phrase; nothing was approved")
        devices.approve(self.service, self.device, matching[0])
        print(f"approved: the user key is encrypted to the key of {matching[0].device_name}")

    def finish(self, _arguments) -> None:
        if not self.asked:
            raise Failure("this device did not ask for access")
        if not devices.finish(self.service, self.device, self.asked, self.revision()):
            raise Failure("the request is not decided yet")
        self.asked = None
        print(f"{self.device.name} is trusted")

    def open(self, arguments) -> None:
        user_key = self.device.open(self.service)
        print(f"opened the user key {fingerprint(user_key)}")
        if arguments.out:
            arguments.out.touch(mode=0o600)
            arguments.out.write_bytes(user_key)

    def rotate(self, _arguments) -> None:
        revision = devices.rotate(self.service, self.device)
        print(f"the new user key is revision {revision}, encrypted to every trusted device")

    def untrust(self, arguments) -> None:
        listed = self.service.ListDevices(device_pb2.ListDevicesRequest()).devices
        lost = next((one for one in listed if one.name == arguments.lost), None)
        if lost is None:
            raise Failure(f"the member has no device {arguments.lost}")
        devices.untrust(self.service, self.device, lost.id)
        print(f"ended the trust of {lost.name}")

    def list(self, _arguments) -> None:
        for one in self.service.ListDevices(device_pb2.ListDevicesRequest()).devices:
            print(f"{one.name}: {STATES[one.state]}, opens revision {one.revision}")


def article(approver: str) -> str:
    return "an administrator" if approver == "administrator" else "another device"


def fingerprint(user_key: bytes) -> str:
    """Enough of a hash to compare two keys without showing them."""
    return hashlib.sha256(user_key).hexdigest()[:16]


def refusal(error: grpc.RpcError) -> str:
    """The reason and the causes that the broker states, or the code of a call that did not reach the broker."""
    reason, causes = error.code().name, []
    status = rpc_status.from_call(error)
    for detail in status.details if status else []:
        info, request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(request):
            causes = [violation.description for violation in request.field_violations]
    return f"{reason}: {'; '.join(causes) or error.details()}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="An app on one device of a member")
    parser.add_argument("--user", required=True, help="the user id of the member, as in the access token")
    parser.add_argument(
        "--keys", required=True, type=pathlib.Path, help="file with the keys of this device; made if it is absent"
    )
    parser.add_argument("--name", help="name of the device (default: the name of the file)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("first", help="make the user key, enrol it, and trust this first device")
    ask = commands.add_parser("ask", help="ask for access, and show the phrase")
    ask.add_argument("approver", choices=list(APPROVERS), help="who is asked to approve")
    commands.add_parser("requests", help="show the pending requests of the member's new devices")
    approve = commands.add_parser("approve", help="approve the request with this phrase")
    approve.add_argument("phrase", nargs=5, metavar="WORD", help="the phrase that the new device shows")
    commands.add_parser("finish", help="open the answer to the request, and trust this device")
    open_key = commands.add_parser("open", help="open the user key, as an app does at each start")
    open_key.add_argument("--out", type=pathlib.Path, help="also write the user key to this file, for tests")
    commands.add_parser("rotate", help="replace the user key on all trusted devices")
    untrust = commands.add_parser("untrust", help="end the trust of a lost device")
    untrust.add_argument("lost", metavar="NAME", help="the name of the lost device")
    commands.add_parser("list", help="list the devices of the member")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    missing = [name for name in ENVIRONMENT if name not in os.environ]
    if missing:
        print(f"error: set {', '.join(missing)} in the environment", file=sys.stderr)
        return 2
    with devices.connect() as channel:
        app = App(channel, given.keys, given.user, given.name or given.keys.stem)
        try:
            getattr(app, given.command)(given)
        except grpc.RpcError as error:
            print(f"refused: {refusal(error)}", file=sys.stderr)
            return 1
        except Failure as failure:
            print(f"error: {failure}", file=sys.stderr)
            return 1
        finally:
            # Also after a failure: the time of the last signature must never go back.
            app.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
