"""Azure: a paravisor that remakes its report when the user data change, and the metadata service."""

import base64
import hashlib
import json
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric import rsa
from tests.enclave.attest.fakes.sev import genuine
from tests.enclave.attest.fakes.tdx import TdModule
from tests.enclave.attest.fakes.tpm import FakeTpm
from tests.vendors import amd, azure
from tests.vendors import tpm as vendor

from cloister.enclave.attest.azure import AK_HANDLE, REPORT_INDEX, USER_DATA_INDEX
from cloister.errors import ConnectionFailed
from cloister.evidence.azure import SNP, TDX

AK = vendor.Tpm(rsa.generate_private_key(65537, 2048), attributes=0x00050472)
EK = rsa.generate_private_key(65537, 2048)


@dataclass
class Paravisor:
    """`late`: how many readings of the report still show the one before; `slow`: after every question. `hardware`: what it has in place of its own."""

    kind: int = SNP
    late: int = 0
    slow: int = 0
    hardware: Callable[[bytes], bytes] | None = None
    deaf: bool = False
    module: TdModule = field(default_factory=TdModule)
    tpm: FakeTpm = field(init=False)
    _next: bytes = b""

    def __post_init__(self) -> None:
        self.tpm = FakeTpm(persistent={AK_HANDLE: AK}, on_nv_write=self._written, on_nv_read=self._read, ek=EK)
        self.tpm.define(REPORT_INDEX, self.report(bytes(64)))

    def _read(self, tpm: FakeTpm, index: int) -> None:
        if index == REPORT_INDEX and self._next:
            if self.late:
                self.late -= 1
            else:
                tpm.nv[REPORT_INDEX], self._next = self._next, b""

    def report(self, user_data: bytes) -> bytes:
        public = AK.key.public_key()
        assert isinstance(public, rsa.RSAPublicKey)
        runtime = azure.runtime(public, **{"user-data": user_data.hex().upper()})
        bound = hashlib.sha256(runtime).digest() + bytes(32)
        made = self.hardware or (self.module.tdreport if self.kind == TDX else self._snp)
        return azure.hcl(made(bound), runtime, kind=self.kind)

    def _snp(self, report_data: bytes) -> bytes:
        return amd.make(report_data=report_data).report

    def _written(self, tpm: FakeTpm, index: int) -> None:
        if index == USER_DATA_INDEX and not self.deaf:
            self._next = self.report(tpm.nv[index])
            self.late = max(self.late, self.slow)


@dataclass
class FakeMetadata:
    """`answer`: instead of what the service would say. `down`: nobody answers."""

    module: TdModule = field(default_factory=TdModule)
    answer: bytes | None = None
    down: bool = False
    padded: bool = False
    padding: bytes = b""
    asked: list[tuple[str, str]] = field(default_factory=list)

    def request(self, method: str, path: str, body: bytes | None = None) -> bytes:
        self.asked.append((method, path))
        if self.down:
            raise ConnectionFailed("Azure's metadata service does not answer.")
        if self.answer is not None:
            return self.answer
        if (method, path) == ("GET", "/metadata/THIM/amd/certification"):
            leaf, *issuers = (ssl.DER_cert_to_PEM_cert(der) for der in genuine().chain)
            return json.dumps(
                {"vcekCert": leaf, "tcbm": "DB", "certificateChain": "".join(issuers), "cacheControl": "1"}
            ).encode()
        assert (method, path) == ("POST", "/acc/tdquote")
        report = json.loads(body or b"")["report"]
        tdreport = base64.urlsafe_b64decode(report + "=" * (-len(report) % 4))
        assert len(tdreport) == 1024
        quote = base64.urlsafe_b64encode(self.module.quote(tdreport[128:192]) + self.padding).decode()
        return json.dumps({"quote": quote if self.padded else quote.rstrip("=")}).encode()
