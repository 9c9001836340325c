"""An Azure confidential VM: the paravisor's report in the virtual TPM's NV, endorsed by hardware, and a quote over it.

Sources: Microsoft, "Guest attestation for confidential VMs: design" (NV indices, the attestation key's handle), "Trusted
Hardware Identity Management" (`/metadata/THIM/amd/certification`); `/acc/tdquote` as Microsoft's samples use it.
"""

import base64
import binascii
import hashlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from cloister.enclave.attest.launch import check_question
from cloister.enclave.attest.tdx_guest import TDREPORT_SIZE
from cloister.enclave.attest.tpm import Tpm, Vtpm
from cloister.errors import ConnectionFailed, MalformedEvidence
from cloister.evidence.azure import TDX, HclReport, parse_hcl, parse_runtime
from cloister.evidence.document import MAX_ITEM, Item
from cloister.evidence.endorsements import Endorsements
from cloister.evidence.intel import parse_quote
from cloister.evidence.sev_snp import parse_report, pem_or_der_certificates
from cloister.evidence.strict_json import load_object

__all__ = [
    "AK_CERTIFICATE",
    "AK_HANDLE",
    "REPORT_INDEX",
    "USER_DATA_INDEX",
    "AzureCvm",
    "Metadata",
    "MetadataService",
    "read_hcl",
]

REPORT_INDEX = 0x01400001
USER_DATA_INDEX = 0x01400002
AK_HANDLE = 0x81000003
AK_CERTIFICATE = 0x01C101D0

METADATA_HOST = "169.254.169.254"
METADATA_TIMEOUT = 10.0
CERTIFICATES = "/metadata/THIM/amd/certification"
TD_QUOTE = "/acc/tdquote"

REFRESH_ATTEMPTS = 20
REFRESH_PAUSE = 0.25
"""Seconds: the paravisor makes its report anew a moment after the user data were written."""

_RAW = "application/octet-stream"
_OK = 200


class Metadata(Protocol):
    """Azure's metadata service: link-local, plain HTTP, unauthenticated. What it says is believed by signatures only."""

    def request(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """The answer's body. Raises: ConnectionFailed."""


@dataclass(frozen=True, slots=True)
class MetadataService:
    """The real one. No proxy, no redirect, at most 64 KiB."""

    host: str = METADATA_HOST
    port: int = 80
    timeout: float = METADATA_TIMEOUT

    def request(self, method: str, path: str, body: bytes | None = None) -> bytes:
        headers = {"Metadata": "true", **({"Content-Type": "application/json"} if body is not None else {})}
        connection = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            content = response.read(MAX_ITEM + 1)
        except (OSError, http.client.HTTPException) as error:
            hint = "Let the enclave reach 169.254.169.254, and nothing else."
            raise ConnectionFailed(
                "Azure's metadata service does not answer.", step="attest.azure", hint=hint
            ) from error
        finally:
            connection.close()
        if response.status != _OK or len(content) > MAX_ITEM:
            raise ConnectionFailed("Azure's metadata service refuses.", step="attest.azure", got=str(response.status))
        return content


def read_hcl(tpm: Tpm) -> HclReport:
    """The paravisor's report as it stands. Raises: ConnectionFailed outside Azure; MalformedEvidence."""
    return parse_hcl(tpm.nv_read(REPORT_INDEX))


@dataclass(frozen=True, slots=True)
class AzureCvm:
    """An `EvidenceSource` for SEV-SNP and TDX alike. Blocking; safe to call from several threads.

    `vtpm` has the attestation key `AK_HANDLE`.
    """

    vtpm: Vtpm
    kind: int
    metadata: Metadata
    pause: Callable[[float], None] = time.sleep
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    @property
    def platform(self) -> str:
        return "azure-tdx" if self.kind == TDX else "azure-sev-snp"

    def fix_launch(self, launch: bytes) -> None:
        self.vtpm.fix_launch(launch)

    def collect(self, report_data: bytes, *, nonce: bytes = b"") -> Mapping[str, Item]:
        """`cpu`, `runtime`, `tpm`, `eventlog` and (SEV-SNP, while the metadata service answers) `endorsements`. One
        question at a time: its data go through one NV index.

        (1) write the 64 bytes into the user data's NV index
        (2) read the paravisor's report until its runtime data name them
        (3) SEV-SNP: the report in it is evidence itself; TDX: the metadata service makes a quote of its TDREPORT
        (4) either way the hardware's report data start with SHA-256 of the runtime data
        (5) the TPM's quote over SHA-256 of (3)

        Raises: WrongUse, ConnectionFailed, MalformedEvidence.
        """
        check_question(report_data, nonce)
        with self._lock:
            self.vtpm.tpm.nv_write(USER_DATA_INDEX, report_data)  # (1)
            hcl = self._refreshed(report_data)  # (2)
            cpu, bound = self._td_quote(hcl) if hcl.kind == TDX else _snp_report(hcl)  # (3)
            if bound[:32] != hashlib.sha256(hcl.runtime).digest():  # (4)
                raise MalformedEvidence("The hardware vouches for other runtime data.", step="attest.azure")
            quoted = self.vtpm.collect_over(hashlib.sha256(cpu).digest())  # (5)
        items = {"cpu": Item(_RAW, cpu), "runtime": Item(_RAW, hcl.runtime), **quoted}
        chain = self._chain(hcl.kind)
        return {**items, "endorsements": Endorsements(amd=chain).item()} if chain else items

    def _refreshed(self, report_data: bytes) -> HclReport:
        for _ in range(REFRESH_ATTEMPTS):
            hcl = read_hcl(self.vtpm.tpm)
            if parse_runtime(hcl.runtime).user_data == report_data:
                if hcl.kind != self.kind:
                    raise MalformedEvidence(
                        "The paravisor's report is of another kind than before.", step="attest.azure"
                    )
                return hcl
            self.pause(REFRESH_PAUSE)
        hint = "Old confidential VM images do not take user data: make the VM anew."
        raise ConnectionFailed("The paravisor does not take up our user data.", step="attest.azure", hint=hint)

    def _td_quote(self, hcl: HclReport) -> tuple[bytes, bytes]:
        question = base64.urlsafe_b64encode(hcl.hardware[:TDREPORT_SIZE]).rstrip(b"=").decode()
        answer = _json(self.metadata.request("POST", TD_QUOTE, json.dumps({"report": question}).encode()))
        encoded = _base64url(answer.get("quote"))
        quote = parse_quote(encoded)
        if quote.trailing:
            raise MalformedEvidence("The quote has bytes after its end.", step="attest.azure")
        return encoded[: len(encoded) - quote.padding], quote.report.report_data

    def _chain(self, kind: int) -> tuple[bytes, ...]:
        """The chip's certificate, its CA's, the root; () where the service is down, for the operator or AMD to give."""
        if kind == TDX:
            return ()
        try:
            answer = _json(self.metadata.request("GET", CERTIFICATES))
        except ConnectionFailed:
            return ()
        leaf, issuers = (_certificates(answer.get(name)) for name in ("vcekCert", "certificateChain"))
        return (*leaf, *issuers)


def _snp_report(hcl: HclReport) -> tuple[bytes, bytes]:
    return hcl.hardware, parse_report(hcl.hardware).report_data


def _json(content: bytes) -> Mapping[str, object]:
    return load_object(content, max_bytes=MAX_ITEM, what="attest.azure")


def _certificates(text: object) -> tuple[bytes, ...]:
    if not isinstance(text, str) or not text.isascii():
        raise MalformedEvidence("The metadata service gave no certificates.", step="attest.azure")
    return pem_or_der_certificates(text.encode())


def _base64url(text: object) -> bytes:
    """With padding or without it."""
    try:
        return base64.b64decode(_padded(text), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise MalformedEvidence("The metadata service's quote is not base64url.", step="attest.azure") from error


def _padded(text: object) -> str:
    if not isinstance(text, str):
        raise MalformedEvidence("The metadata service gave no quote.", step="attest.azure")
    bare = text.rstrip("=")
    return bare + "=" * (-len(bare) % 4)
