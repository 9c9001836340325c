"""The simulated hardware. It lives in the untrusted host's process, so that the enclave holds no attestation key."""

import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import cbor2
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding

from cloister.errors import WrongUse
from cloister.evidence.binding import REPORT_DATA_SIZE
from cloister.evidence.document import Item
from cloister.evidence.simulated import (
    SimBody,
    combined_measurement,
    endorsements_item,
    report_item,
    signed_bytes,
)
from cloister.sim.keys import ChipKeys, load_or_make
from cloister.sim.measure import Measurement

__all__ = ["Device", "LaunchedEnclave"]


class LaunchedEnclave:
    """One start of an enclave, as the hardware knows it: its measurement and launch digest are fixed from here on.

    `fd` is the enclave's end: pass it to the child (`pass_fds`), then call `handed_over` in the parent, so that the
    child's death is noticed. Ends when either side closes.
    """

    def __init__(self, keys: ChipKeys, measurement: Measurement, launch_sha256: bytes) -> None:
        if len(launch_sha256) != 32:
            raise WrongUse("A launch digest has 32 bytes.", step="sim", expected="32", got=str(len(launch_sha256)))
        self._keys = keys
        self._measurement = measurement
        self._launch_sha256 = launch_sha256
        self._here, self._there = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name="simulated-tee", daemon=True)
        self._thread.start()

    @property
    def fd(self) -> int:
        return self._there.fileno()

    def report(self, report_data: bytes) -> dict[str, Item]:
        """What the chip says about this enclave over exactly 64 bytes."""
        components = self._measurement.components()
        body = SimBody(report_data, self._launch_sha256, components, combined_measurement(components)).encode()
        r, s = decode_dss_signature(self._keys.chip_key.sign(signed_bytes(body), ec.ECDSA(hashes.SHA384())))
        return {
            "cpu": report_item(body, r.to_bytes(48, "big") + s.to_bytes(48, "big")),
            "endorsements": endorsements_item([self._keys.chip.public_bytes(Encoding.DER)]),
        }

    def handed_over(self) -> None:
        """Close this process's copy of the enclave's end."""
        self._there.close()

    def close(self) -> None:
        """Stop answering. Idempotent."""
        self._there.close()
        if self._thread.is_alive():
            self._here.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._here.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _serve(self) -> None:
        try:
            while len(request := _receive(self._here)) == REPORT_DATA_SIZE:
                items = {label: [item.media_type, item.content] for label, item in self.report(request).items()}
                answer = cbor2.dumps(items)
                self._here.sendall(len(answer).to_bytes(4, "big") + answer)
        except OSError:
            return  # The enclave died in the middle of a question: nobody is there to be told.


def _receive(here: socket.socket) -> bytes:
    """64 bytes, or fewer when the other side has closed."""
    request = b""
    while len(request) < REPORT_DATA_SIZE and (more := here.recv(REPORT_DATA_SIZE - len(request))):
        request += more
    return request


class Device:
    """One simulated machine: `open` makes its keys on the first use and loads them ever after."""

    def __init__(self, keys: ChipKeys) -> None:
        self._keys = keys

    @classmethod
    def open(cls, state_dir: Path, *, now: float | None = None) -> Self:
        """Raises: WrongUse when the state directory is shared with others or damaged."""
        return cls(load_or_make(state_dir, time.time() if now is None else now))

    @property
    def root_pem(self) -> bytes:
        """What a policy names to trust this simulator."""
        return self._keys.root.public_bytes(Encoding.PEM)

    def launch(self, measurement: Measurement, launch_sha256: bytes) -> LaunchedEnclave:
        """`launch_sha256`: SHA-256 of the launch config's exact bytes. Raises: WrongUse for another size."""
        return LaunchedEnclave(self._keys, measurement, launch_sha256)
