"""Runs inside: what is asked of /dev/attestation, which Gramine answers itself, is asked of the test outside.

By the seam that all drivers have (`Device`); the enclave's own code is untouched.
"""

import json
import os
import socket
import threading
from typing import Any

from cloister.enclave import main as front
from cloister.enclave.attest.detect import Machine
from cloister.enclave.attest.device import LinuxDevice, Mode

ATTESTATION = "/dev/attestation"
THEIRS = 1 << 20


class Attestation(LinuxDevice):
    def __init__(self) -> None:
        self._lines = socket.socket(fileno=100).makefile("rwb")
        self._lock = threading.Lock()

    def _ask(self, name: str, *arguments: object) -> Any:
        with self._lock:
            self._lines.write(json.dumps([name, *arguments]).encode() + b"\n")
            self._lines.flush()
            answer = json.loads(self._lines.readline())
        if "errno" in answer:
            raise OSError(answer["errno"], os.strerror(answer["errno"]))
        return answer["value"]

    def open(self, path: str, mode: Mode) -> int:
        ours = path.startswith(ATTESTATION)
        return THEIRS + int(self._ask("open", path, mode)) if ours else super().open(path, mode)

    def read(self, handle: int, size: int) -> bytes:
        ours = handle >= THEIRS
        return bytes.fromhex(self._ask("read", handle - THEIRS, size)) if ours else super().read(handle, size)

    def write(self, handle: int, data: bytes) -> int:
        ours = handle >= THEIRS
        return int(self._ask("write", handle - THEIRS, data.hex())) if ours else super().write(handle, data)

    def close(self, handle: int) -> None:
        if handle >= THEIRS:
            self._ask("close", handle - THEIRS)
        else:
            super().close(handle)

    def exists(self, path: str) -> bool:
        return bool(self._ask("exists", path)) if path.startswith(ATTESTATION) else super().exists(path)


DEVICE = Attestation()
front.Machine = lambda: Machine(device=DEVICE)  # type: ignore[misc, assignment, attr-defined]
