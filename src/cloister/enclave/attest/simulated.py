"""The simulated TEE's driver: asks the hardware over the descriptor that the enclave was started with."""

import hmac
import socket
import threading
from collections.abc import Mapping

from cloister.errors import ConnectionFailed, MalformedEvidence, NotTrusted, WrongUse
from cloister.evidence.binding import REPORT_DATA_SIZE
from cloister.evidence.document import Item
from cloister.evidence.launch import launch_digest
from cloister.evidence.simulated import PLATFORM, SimBody, parse_report
from cloister.evidence.strict_cbor import load_map

__all__ = ["SimulatedTee"]

TIMEOUT = 10.0
"""Seconds until the hardware is taken for dead."""

MAX_ANSWER = 256 * 1024

_LABELS = frozenset({"cpu", "endorsements"})


class SimulatedTee:
    """An `EvidenceSource`. Owns `fd` from here on. Blocking; safe to call from several threads, one at a time is asked."""

    platform = PLATFORM

    def __init__(self, fd: int, *, timeout: float = TIMEOUT) -> None:
        self._device = socket.socket(fileno=fd)
        self._device.settimeout(timeout)
        self._lock = threading.Lock()

    def fix_launch(self, launch: bytes) -> None:
        """The field was set at the start. It is read from a report over 64 zero bytes, which binds nothing and so proves
        nothing to anybody else. Raises: NotTrusted when it is another's."""
        held = self._ask(bytes(REPORT_DATA_SIZE))[0].launch_sha256
        if not hmac.compare_digest(held, launch_digest(launch)):
            raise NotTrusted(
                "The launch config handed over is not the one fixed in hardware.",
                step="attest.launch",
                hint="Start the enclave again with the launch config it was measured with.",
            )

    def collect(self, report_data: bytes, *, nonce: bytes = b"") -> Mapping[str, Item]:
        """`cpu` and `endorsements` over exactly 64 bytes; `nonce` is in them already.

        Raises: WrongUse for another size, ConnectionFailed when the hardware is gone or silent, MalformedEvidence when
        it answers with something else. After either of the last two it is not asked again.
        """
        return self._ask(report_data)[1]

    def close(self) -> None:
        self._device.close()

    def _ask(self, report_data: bytes) -> tuple[SimBody, Mapping[str, Item]]:
        if len(report_data) != REPORT_DATA_SIZE:
            raise WrongUse("A report is over 64 bytes.", step="attest", expected="64", got=str(len(report_data)))
        with self._lock:
            try:
                self._device.sendall(report_data)
                items = _items(self._answer())
                body = parse_report(items["cpu"].content).body
                if body.report_data != report_data:
                    raise MalformedEvidence("The simulated hardware answered another question.", step="attest")
            except OSError as error:
                self._device.close()
                raise ConnectionFailed("The simulated hardware does not answer.", step="attest") from error
            except MalformedEvidence:
                self._device.close()
                raise
        return body, items

    def _answer(self) -> bytes:
        length = int.from_bytes(self._receive(4), "big")
        if length > MAX_ANSWER:
            raise MalformedEvidence("The simulated hardware's answer is too long.", step="attest", got=str(length))
        return self._receive(length)

    def _receive(self, count: int) -> bytes:
        received = bytearray()
        while len(received) < count:
            more = self._device.recv(count - len(received))
            if not more:
                raise ConnectionResetError("closed in the middle of an answer")
            received += more
        return bytes(received)


def _items(answer: bytes) -> dict[str, Item]:
    records = load_map(answer, keys=_LABELS, max_bytes=MAX_ANSWER, what="attest")
    return {label: _item(record) for label, record in records.items()}


def _item(record: object) -> Item:
    if not isinstance(record, list) or len(record) != 2:
        raise MalformedEvidence("The simulated hardware's answer is not [media type, bytes].", step="attest")
    media_type, content = record
    if not isinstance(media_type, str) or not isinstance(content, bytes):
        raise MalformedEvidence("The simulated hardware's answer is not [media type, bytes].", step="attest")
    return Item(media_type, content)
