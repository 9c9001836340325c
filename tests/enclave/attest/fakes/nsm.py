"""AWS's security module: PCRs that can be extended until they are locked, and documents over the locked ones."""

import ctypes
import errno
import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import cbor2
from tests.enclave.attest.fakes.kernel import FakeKernel, OpenFile, failure
from tests.vendors import aws

from cloister.enclave.attest.nsm import DEVICE

RAW = 0xC0200A00  # _IOWR(0x0A, 0, struct nsm_raw), as the C compiler has it


@dataclass
class FakeModule:
    """`answer`: what to say instead, to any question. `race`: what another process does right before one."""

    pcrs: dict[int, bytes] = field(
        default_factory=lambda: {at: bytes([at + 1]) * 48 if at < 5 else bytes(48) for at in range(32)}
    )
    locked: set[int] = field(default_factory=lambda: set(range(16)))
    answer: bytes | None = None
    race: Callable[["FakeModule", str], None] | None = None
    questions: list[str] = field(default_factory=list)

    def ask(self, question: bytes) -> bytes:
        request = cbor2.loads(question)
        name, fields = (request, {}) if isinstance(request, str) else next(iter(request.items()))
        if self.race is not None:
            self.race(self, name)
        self.questions.append(name)
        return cbor2.dumps(self._answer(name, fields)) if self.answer is None else self.answer

    def _answer(self, name: str, fields: dict[str, Any]) -> Any:
        if name == "Attestation":
            values = {at: value for at, value in self.pcrs.items() if at in self.locked}
            return {name: {"document": aws.document(pcrs=values, **fields)}}
        index = fields.get("index", -1)
        if index not in self.pcrs:
            return {"Error": "InvalidIndex"}
        if name == "DescribePCR":
            return {name: {"lock": index in self.locked, "data": self.pcrs[index]}}
        if index in self.locked:
            return {"Error": "ReadOnlyIndex"}
        if name == "LockPCR":
            self.locked.add(index)
            return name
        if name == "ExtendPCR" and fields["data"]:
            self.pcrs[index] = hashlib.sha384(self.pcrs[index] + fields["data"]).digest()
            return {name: {"data": self.pcrs[index]}}
        return {"Error": "InvalidArgument"}


class _Device(OpenFile):
    def __init__(self, module: FakeModule) -> None:
        self._module = module

    def ioctl(self, request: int, argument: bytearray) -> int:
        """The pointers are real: the buffers lie in this process. An answer that does not fit is cut, silently."""
        if request != RAW:
            raise failure(errno.EINVAL)
        asked, asked_length, answered, room = struct.unpack("<QQQQ", argument)
        if asked_length > 0x1000:
            raise failure(errno.EMSGSIZE)
        answer = self._module.ask(ctypes.string_at(asked, asked_length))[: min(room, 0x3000)]
        ctypes.memmove(answered, answer, len(answer))
        argument[24:] = struct.pack("<Q", len(answer))
        return 0


def machine(module: FakeModule) -> FakeKernel:
    return FakeKernel(nodes={DEVICE: lambda _: _Device(module)})
