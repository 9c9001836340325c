"""The vendors' services on a loopback port: the paths that collateral is fetched by, with faults to order."""

import base64
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from tests.vendors import amd, intel

from cloister.collateral import Addresses, Vendor
from cloister.evidence.document import Document, Item
from cloister.evidence.endorsements import Endorsements
from cloister.verify.roots import PINNED, Roots

NOW = intel.NOW
INTEL = "/sgx/certification/v4"
TDX = "/tdx/certification/v4"
FMSPC = intel.FMSPC.hex().upper()
PCK_CRL = f"{INTEL}/pckcrl?ca=platform&encoding=der"
ROOT_CRL = f"{INTEL}/rootcacrl"
TCB_INFO = f"{TDX}/tcb?fmspc={FMSPC}"
TCB_INFO_EARLY = f"{TCB_INFO}&update=early"
QE_IDENTITY = f"{TDX}/qe/identity"
QE_IDENTITY_EARLY = f"{QE_IDENTITY}?update=early"
CHIP = "/vcek/v1/Milan/" + amd.CHIP_ID.hex() + "?blSPL=04&teeSPL=01&snpSPL=24&ucodeSPL=219"
AMD_CA = "/vcek/v1/Milan/cert_chain"
AMD_CRL = "/vcek/v1/Milan/crl"


@dataclass(frozen=True)
class Reply:
    """`cut`: bytes of the body that are sent of those that were announced."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None


@dataclass
class Service:
    replies: dict[str, Reply] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def serve(self, replies: Mapping[str, Reply]) -> None:
        self.replies.update(replies)

    def change(self, path: str, **changes: Any) -> None:
        self.replies[path] = replace(self.replies[path], **changes)

    def vendor(self) -> Vendor:
        return Vendor(Addresses(intel=self.url, amd=self.url, nvidia=self.url))


class _Handler(BaseHTTPRequestHandler):
    service: Service
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.service.requests.append(self.path)
        reply = self.service.replies.get(self.path, Reply(status=404))
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply.body if reply.cut is None else reply.body[: reply.cut])
        self.close_connection = True


class Running:
    def __init__(self) -> None:
        self.service = Service()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"service": self.service}))
        self.service.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def intel_replies(evidence: intel.Evidence, *, early: bool = False) -> dict[str, Reply]:
    """What Intel's service says about a TDX platform."""
    parts = evidence.parts

    def signed(member: str, name: str, header: str) -> Reply:
        body = f'{{"{member}":{parts[name]},"signature":"{parts[name + "_signature"]}"}}'
        return Reply(body.encode(), headers={header: quote(parts[f"{name}_issuer_chain"])})

    tcb_info = signed("tcbInfo", "tcb_info", "TCB-Info-Issuer-Chain")
    identity = signed("enclaveIdentity", "qe_identity", "SGX-Enclave-Identity-Issuer-Chain")
    if early:
        return {TCB_INFO_EARLY: tcb_info, QE_IDENTITY_EARLY: identity}
    pck_chain = {"SGX-PCK-CRL-Issuer-Chain": quote(parts["pck_crl_issuer_chain"])}
    return {
        PCK_CRL: Reply(bytes.fromhex(parts["pck_crl"]), headers=pck_chain),
        ROOT_CRL: Reply(parts["root_ca_crl"].encode()),  # as a PCCS writes it
        TCB_INFO: tcb_info,
        QE_IDENTITY: identity,
    }


def amd_replies(evidence: amd.Evidence) -> dict[str, Reply]:
    """What AMD's service says about a chip whose report is signed by its own key."""
    leaf, *issuers = evidence.chain
    pem = b"".join(x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM) for der in issuers)
    return {CHIP: Reply(leaf), AMD_CA: Reply(pem), AMD_CRL: Reply(evidence.crl or b"")}


def nvidia_replies(rims: Mapping[str, bytes]) -> dict[str, Reply]:
    """What NVIDIA's RIM service says: more than a client reads."""
    return {
        f"/v1/rim/{name}": Reply(
            json.dumps(
                {"id": name, "rim": base64.b64encode(rim).decode(), "rim_format": "TEXT", "sha256": "?"}
            ).encode()
        )
        for name, rim in rims.items()
    }


def roots(*, tdx: intel.Evidence | None = None, snp: amd.Evidence | None = None) -> Roots:
    return replace(PINNED, intel=tdx.root if tdx else None, amd=snp.roots if snp else {})


def document(cpu: bytes, endorsements: Endorsements | None = None) -> Document:
    items = {"statement": Item("application/json", b"{}"), "cpu": Item("application/octet-stream", cpu)}
    if endorsements is not None:
        items["endorsements"] = endorsements.item()
    return Document(items)
