"""Gramine's /dev/attestation: one question for the whole process, quotes over whatever it is when they are asked for."""

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.enclave.attest.fakes.kernel import Buffered, FakeKernel, Node, OpenFile, Reading, failure
from tests.vendors.intel import sgx

from cloister.enclave.attest.device import Mode
from cloister.enclave.attest.gramine import ATTESTATION, LAUNCH_PATH


def sgx_quote(report_data: bytes) -> bytes:
    return sgx(report={"report_data": report_data}).quote


@dataclass
class FakeGramine:
    """`slow`: seconds between a question and its quote, in which another thread could ask."""

    kind: str = "dcap"
    launch: bytes | None = b'{"v":1}'
    make: Callable[[bytes], bytes] = sgx_quote
    slow: float = 0.0
    no_quote: bool = False
    question: bytes = bytes(64)
    keys: dict[str, bytes | None] = field(default_factory=lambda: {"default": None, "_sgx_mrenclave": b"\x5e" * 16})

    def mkdir(self, path: str) -> None:
        raise failure(errno.EACCES, path)

    rmdir = mkdir

    def listdir(self, path: str) -> tuple[str, ...] | None:
        return () if path in ("", "keys") else None

    def node(self, path: str) -> Node | None:
        known = ("attestation_type", "user_report_data", "my_target_info", "quote")
        if path not in known and path.removeprefix("keys/") not in self.keys:
            return None
        return lambda mode: self._open(path, mode)

    def _open(self, path: str, mode: Mode) -> OpenFile:
        if path.startswith("keys/"):
            return self._open_key(path.removeprefix("keys/"), mode)
        if path == "user_report_data" and mode == "w":
            return Buffered(self._ask)
        if mode != "r":
            raise failure(errno.EACCES)
        if path == "attestation_type":
            return Reading(self.kind.encode())
        if path == "my_target_info":
            return Reading(bytes(512))
        return Reading(self._quote() if path == "quote" else self.question)

    def _ask(self, data: bytes) -> None:
        """Too little is filled up, too much is cut off: neither is an error."""
        self.question = data[:64].ljust(64, b"\0")

    def _quote(self) -> bytes:
        if self.no_quote:
            raise failure(errno.EACCES)
        time.sleep(self.slow)
        return self.make(self.question)

    def _open_key(self, name: str, mode: Mode) -> OpenFile:
        if mode == "r":
            key = self.keys[name]
            if key is None:
                raise failure(errno.EACCES)
            return Reading(key)
        if name.startswith("_"):
            raise failure(errno.EACCES)
        return Buffered(lambda data: self.keys.__setitem__(name, data), limit=16)


def machine(fake: FakeGramine | None = None) -> FakeKernel:
    fake = fake or FakeGramine()
    nodes: dict[str, Node] = {} if fake.launch is None else {LAUNCH_PATH: lambda mode: Reading(fake.launch or b"")}
    return FakeKernel(nodes=nodes, folders={ATTESTATION: fake})
