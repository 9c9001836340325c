"""SGX through Gramine's /dev/attestation: one buffer per process for the question, one file for the quote.

Source: Gramine's documentation, "Attestation and Secret Provisioning", section "Low-level /dev/attestation interface".
"""

import hmac
import re
import threading
from collections.abc import Mapping

from cloister.enclave.attest.device import Device, read_file, said_by_hardware, write_file
from cloister.enclave.attest.launch import check_question
from cloister.errors import MalformedEvidence, NotTrusted, WrongUse
from cloister.evidence.document import MAX_ITEM, Item
from cloister.evidence.intel import TEE_SGX, parse_quote
from cloister.evidence.launch import MAX_LAUNCH

__all__ = ["ATTESTATION", "KEY_SIZE", "LAUNCH_PATH", "GramineSgx"]

ATTESTATION = "/dev/attestation"
LAUNCH_PATH = "/launch.json"
"""The trusted file that holds the launch config. The manifest names its digest, so MRENCLAVE covers it."""

KEY_SIZE = 16

_QUESTION_LOCK = threading.Lock()
"""`user_report_data` is one buffer for the whole process: between our write and our read nobody else may ask."""

_KEY_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
"""Names with a leading underscore are Gramine's own, such as `_sgx_mrenclave`: sealing keys that are not set."""

_HINT = 'Run under gramine-sgx, with sgx.remote_attestation = "dcap" in the manifest.'
_QUOTE_HINT = "Is the host's AESM or quote provider library running? Its log says why there was no quote."


class GramineSgx:
    """An `EvidenceSource`. Blocking; safe to call from several threads."""

    platform = "sgx"

    def __init__(self, device: Device, *, root: str = ATTESTATION, launch_path: str = LAUNCH_PATH) -> None:
        """Raises: NotTrusted unless Gramine attests by DCAP; ConnectionFailed outside Gramine."""
        self._device = device
        self._root = root
        self._launch_path = launch_path
        with said_by_hardware("Asking Gramine for its attestation type", hint=_HINT):
            kind = read_file(device, f"{root}/attestation_type", limit=64).decode("ascii", "replace").strip("\0\n")
        if kind != "dcap":
            raise NotTrusted(
                "Gramine does not attest by DCAP.", step="attest", expected="dcap", got=ascii(kind)[1:-1], hint=_HINT
            )

    def _holds_launch(self, launch: bytes) -> bool:
        """The trusted file: Gramine checked its content against the measured manifest when it was opened."""
        return hmac.compare_digest(self._launch(), launch)

    def fix_launch(self, launch: bytes) -> None:
        """Nothing is left to fix: MRENCLAVE covers it. Raises: NotTrusted when this is not what it covers."""
        if not self._holds_launch(launch):
            raise NotTrusted(
                "The manifest's trusted launch config is another one.",
                step="attest.launch",
                hint="Build the manifest with this launch config: it changes MRENCLAVE.",
            )

    def collect(self, report_data: bytes, *, nonce: bytes = b"") -> Mapping[str, Item]:
        """`cpu`, a version 3 quote over exactly 64 bytes. `nonce` is in `report_data` already; SGX has no field for it.

        Raises: WrongUse for other sizes; ConnectionFailed when there is no quote; MalformedEvidence for something else
        than an SGX quote, or a quote over something else.
        """
        check_question(report_data, nonce)
        with _QUESTION_LOCK, said_by_hardware("Making the quote", hint=_QUOTE_HINT):
            write_file(self._device, f"{self._root}/user_report_data", report_data)
            encoded = read_file(self._device, f"{self._root}/quote", limit=MAX_ITEM)
        quote = parse_quote(encoded)
        if quote.header.tee_type != TEE_SGX or quote.report.report_data != report_data:
            raise MalformedEvidence("Gramine's quote answers another question.", step="attest")
        return {"cpu": Item("application/octet-stream", encoded)}

    def read_key(self, name: str) -> bytes:
        """An encrypted file system's key, 16 bytes. `name` may be one of Gramine's own here.

        Raises: WrongUse for a bad name; ConnectionFailed when there is no such key, or it was not set.
        """
        with said_by_hardware(f"Reading the key {name!r}"):
            key = read_file(self._device, self._key(name, own=True), limit=KEY_SIZE)
        if len(key) != KEY_SIZE:
            raise MalformedEvidence("Gramine's key has another length.", step="attest.key", expected=str(KEY_SIZE))
        return key

    def set_key(self, name: str, key: bytes) -> None:
        """Raises: WrongUse for a bad name or another size than 16 bytes; ConnectionFailed when Gramine refuses."""
        path = self._key(name, own=False)
        if len(key) != KEY_SIZE:
            raise WrongUse("An encrypted file system's key has 16 bytes.", step="attest.key", expected=str(KEY_SIZE))
        with said_by_hardware(f"Setting the key {name!r}"):
            write_file(self._device, path, key)

    def _launch(self) -> bytes:
        with said_by_hardware("Reading the trusted launch config", hint=f"The manifest needs {self._launch_path}."):
            return read_file(self._device, self._launch_path, limit=MAX_LAUNCH)

    def _key(self, name: str, *, own: bool) -> str:
        if not _KEY_NAME.fullmatch(name.removeprefix("_") if own else name):
            raise WrongUse("That is not a key's name.", step="attest.key", got=ascii(name)[:64])
        return f"{self._root}/keys/{name}"
