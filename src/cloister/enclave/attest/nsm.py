"""AWS Nitro's security module (/dev/nsm): CBOR questions by ioctl, an attestation document for an answer.

Sources: the kernel's include/uapi/linux/nsm.h (6.8 and later; AWS's own driver before it is the same); the wire format of
AWS's nsm-api, src/api/mod.rs: a request is `"Name"` or `{"Name": {…}}`, an answer likewise, or `{"Error": "Code"}`.
"""

import ctypes
import errno
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import cbor2

from cloister.enclave.attest.device import Device, iowr, opened, said_by_hardware
from cloister.enclave.attest.launch import check_question, refuse_launch, register_holds
from cloister.errors import ConnectionFailed, MalformedEvidence
from cloister.evidence.document import Item
from cloister.evidence.nitro import LAUNCH_PCR, MEDIA_TYPE, launch_extension, launch_pcr, parse_document

__all__ = ["DEVICE", "Nitro", "Nsm", "Pcr"]

DEVICE = "/dev/nsm"

MAX_REQUEST = 0x1000
MAX_RESPONSE = 0x3000
PCR_SIZE = 48

_RAW = struct.Struct("<QQQQ")  # struct nsm_raw: request and response, each address and length
_IOCTL_RAW = iowr(0x0A, 0, _RAW.size)

_LOCK = threading.Lock()
"""Between reading PCR 16 and locking it nobody else in this process may ask."""

_HINTS = {
    errno.ENOENT: "This is no Nitro enclave: /dev/nsm exists inside one alone.",
    errno.EACCES: "/dev/nsm was not given to this user.",
    errno.EPERM: "/dev/nsm was not given to this user.",
    errno.EMSGSIZE: "The question is too long for the security module.",
    errno.ETIMEDOUT: "The security module was silent for two minutes: the host is in trouble.",
}


@dataclass(frozen=True, slots=True)
class Pcr:
    """`value` has 48 bytes. Locked PCRs alone stand in attestation documents."""

    value: bytes
    locked: bool


@dataclass(frozen=True, slots=True)
class Nsm:
    """The module's requests that attestation needs. Each raises ConnectionFailed when the module or the kernel refuses,
    MalformedEvidence for an answer of another form."""

    device: Device
    path: str = DEVICE

    def describe_pcr(self, index: int) -> Pcr:
        answer = self._ask("DescribePCR", {"index": index})
        value, locked = answer.get("data"), answer.get("lock")
        if not isinstance(value, bytes) or len(value) != PCR_SIZE or not isinstance(locked, bool):
            raise _unreadable("DescribePCR")
        return Pcr(value, locked)

    def extend_pcr(self, index: int, data: bytes) -> bytes:
        """The value after it: SHA-384(value || data), by the module."""
        value = self._ask("ExtendPCR", {"index": index, "data": data}).get("data")
        if not isinstance(value, bytes) or len(value) != PCR_SIZE:
            raise _unreadable("ExtendPCR")
        return value

    def lock_pcr(self, index: int) -> None:
        """Until the enclave ends. Only then is the PCR part of attestation documents."""
        self._ask("LockPCR", {"index": index})

    def attestation(self, *, user_data: bytes, nonce: bytes | None) -> bytes:
        """The COSE_Sign1 document."""
        answer = self._ask("Attestation", {"user_data": user_data, "nonce": nonce, "public_key": None})
        document = answer.get("document")
        if not isinstance(document, bytes):
            raise _unreadable("Attestation")
        return document

    def _ask(self, name: str, fields: Mapping[str, object]) -> Mapping[str, Any]:
        answer = _decode(name, self._raw(cbor2.dumps({name: dict(fields)})))
        if answer == name:  # an answer without content, such as LockPCR's
            return {}
        if not isinstance(answer, dict) or len(answer) != 1:
            raise _unreadable(name)
        if "Error" in answer:
            code = ascii(answer["Error"])[1:-1][:64]
            raise ConnectionFailed(f"The security module refused {name}.", step="attest", got=code)
        content = answer.get(name)
        if not isinstance(content, dict):
            raise _unreadable(name)
        return content

    def _raw(self, question: bytes) -> bytes:
        request = ctypes.create_string_buffer(question, len(question))
        response = ctypes.create_string_buffer(MAX_RESPONSE)
        argument = bytearray(
            _RAW.pack(ctypes.addressof(request), len(question), ctypes.addressof(response), MAX_RESPONSE)
        )
        with (
            said_by_hardware("Asking the security module", hints=_HINTS),
            opened(self.device, self.path, "rw") as handle,
        ):
            self.device.ioctl(handle, _IOCTL_RAW, argument)
        length = _RAW.unpack(argument)[3]
        return response.raw[: min(length, MAX_RESPONSE)]


@dataclass(frozen=True, slots=True)
class Nitro:
    """An `EvidenceSource`. Blocking; safe to call from several threads."""

    nsm: Nsm
    platform: str = field(default="nitro", init=False)

    def fix_launch(self, launch: bytes) -> None:
        """Extends PCR 16 once by SHA-384(launch), and locks it: unlocked ones stand in no document. Does nothing where
        that was done already.

        Raises: NotTrusted where it holds something else; ConnectionFailed; MalformedEvidence.
        """
        with _LOCK:
            pcr = self.nsm.describe_pcr(LAUNCH_PCR)
            value = pcr.value
            if not any(value) and not pcr.locked:
                value = self.nsm.extend_pcr(LAUNCH_PCR, launch_extension(launch))
            if not register_holds(value, launch_pcr(launch)):
                raise refuse_launch("PCR 16", value, "Start the enclave anew, and extend PCR 16 by nothing else.")
            if not pcr.locked:
                self.nsm.lock_pcr(LAUNCH_PCR)

    def collect(self, report_data: bytes, *, nonce: bytes = b"") -> Mapping[str, Item]:
        """`cpu`, a COSE document with `report_data` as its user data, and the caller's `nonce` as its nonce.

        Raises: WrongUse, ConnectionFailed, MalformedEvidence.
        """
        check_question(report_data, nonce)
        document = self.nsm.attestation(user_data=report_data, nonce=nonce or None)
        parsed = parse_document(document)
        if parsed.user_data != report_data or (parsed.nonce or b"") != nonce:
            raise MalformedEvidence("The security module's document answers another question.", step="attest")
        return {"cpu": Item(MEDIA_TYPE, document)}


def _decode(name: str, answer: bytes) -> object:
    try:
        return cbor2.loads(answer)
    except (cbor2.CBORError, ValueError) as error:
        raise _unreadable(name) from error


def _unreadable(name: str) -> MalformedEvidence:
    return MalformedEvidence(f"The security module's answer to {name} is of another form.", step="attest")
