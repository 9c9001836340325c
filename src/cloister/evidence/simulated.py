"""The simulated TEE's report: shaped like real ones, signed by a chip key, worth nothing without its root.

```
report       = CBOR {"body": bytes, "signature": bytes}          signature: ECDSA P-384, SHA-384, r || s, 96 bytes,
                                                                 over "cloister/sim-report/v1\\0" || body
body         = CBOR {"v": 1, "report_data": 64 bytes, "launch_sha256": 32 bytes,
                     "components": {"code", "interpreter", "engine"}, "measurement": 32 bytes}
measurement  = SHA-256 over the components' sorted lines `name value\\n`
endorsements = CBOR {"chain": [DER certificate of the chip key]}
```
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import cbor2

from cloister.errors import MalformedEvidence
from cloister.evidence.binding import REPORT_DATA_SIZE
from cloister.evidence.document import MAX_ITEM, Item
from cloister.evidence.strict_cbor import load_map

__all__ = [
    "COMPONENTS",
    "ENDORSEMENTS_MEDIA_TYPE",
    "PLATFORM",
    "REPORT_MEDIA_TYPE",
    "SimBody",
    "SimReport",
    "combined_measurement",
    "endorsements_item",
    "parse_chain",
    "parse_report",
    "report_item",
    "signed_bytes",
]

PLATFORM = "sim"
REPORT_MEDIA_TYPE = "application/vnd.cloister.sim-report+cbor"
ENDORSEMENTS_MEDIA_TYPE = "application/cbor"
COMPONENTS = ("code", "interpreter", "engine")

_DOMAIN = b"cloister/sim-report/v1\0"
_SIGNATURE_SIZE = 96
_MAX_CHAIN = 4
_VALUE = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,254}[\x21-\x7e])?")
"""Printable ASCII: a component's value stands in policies and on terminals."""


@dataclass(frozen=True, slots=True)
class SimBody:
    """What the chip signs. `components` values are text, such as "sha256:…"; the digests are raw bytes."""

    report_data: bytes
    launch_sha256: bytes
    components: Mapping[str, str]
    measurement: bytes

    def encode(self) -> bytes:
        return cbor2.dumps(
            {
                "v": 1,
                "report_data": self.report_data,
                "launch_sha256": self.launch_sha256,
                "components": {name: self.components[name] for name in COMPONENTS},
                "measurement": self.measurement,
            }
        )


@dataclass(frozen=True, slots=True)
class SimReport:
    """`encoded` is the exact body that `signature` (r || s) is said to be over."""

    body: SimBody
    encoded: bytes
    signature: bytes


def combined_measurement(components: Mapping[str, str]) -> bytes:
    """One value for all components: 32 bytes."""
    lines = sorted(f"{name} {value}\n".encode() for name, value in components.items())
    return hashlib.sha256(b"".join(lines)).digest()


def signed_bytes(encoded_body: bytes) -> bytes:
    return _DOMAIN + encoded_body


def report_item(encoded_body: bytes, signature: bytes) -> Item:
    return Item(REPORT_MEDIA_TYPE, cbor2.dumps({"body": encoded_body, "signature": signature}))


def endorsements_item(chain: list[bytes]) -> Item:
    return Item(ENDORSEMENTS_MEDIA_TYPE, cbor2.dumps({"chain": chain}))


def parse_report(content: bytes) -> SimReport:
    """Form only: the signature is not checked here, nor is `measurement` against the components.

    Raises: MalformedEvidence.
    """
    outer = load_map(content, keys=frozenset({"body", "signature"}), max_bytes=MAX_ITEM, what="cpu")
    encoded = _bytes(outer["body"], None, "cpu.body")
    return SimReport(
        body=_parse_body(encoded),
        encoded=encoded,
        signature=_bytes(outer["signature"], _SIGNATURE_SIZE, "cpu.signature"),
    )


def parse_chain(content: bytes) -> tuple[bytes, ...]:
    """DER certificates, the chip's first. Raises: MalformedEvidence."""
    chain = load_map(content, keys=frozenset({"chain"}), max_bytes=MAX_ITEM, what="endorsements")["chain"]
    if not isinstance(chain, list) or not 0 < len(chain) <= _MAX_CHAIN:
        raise MalformedEvidence("endorsements.chain is not a short list.", step="endorsements.chain")
    return tuple(_bytes(certificate, None, "endorsements.chain") for certificate in chain)


def _parse_body(encoded: bytes) -> SimBody:
    keys = frozenset({"v", "report_data", "launch_sha256", "components", "measurement"})
    body = load_map(encoded, keys=keys, max_bytes=MAX_ITEM, what="cpu.body")
    if type(body["v"]) is not int or body["v"] != 1:
        raise MalformedEvidence("The report has an unknown version.", step="cpu.body.v", expected="1")
    return SimBody(
        report_data=_bytes(body["report_data"], REPORT_DATA_SIZE, "cpu.body.report_data"),
        launch_sha256=_bytes(body["launch_sha256"], 32, "cpu.body.launch_sha256"),
        components=_components(body["components"]),
        measurement=_bytes(body["measurement"], 32, "cpu.body.measurement"),
    )


def _bytes(value: object, size: int | None, what: str) -> bytes:
    if not isinstance(value, bytes) or (size is not None and len(value) != size):
        raise MalformedEvidence(f"{what} is not bytes of the right length.", step=what, expected=str(size or "bytes"))
    return value


def _components(value: object) -> Mapping[str, str]:
    if not isinstance(value, dict) or value.keys() != set(COMPONENTS):
        raise MalformedEvidence("The report does not measure code, interpreter and engine.", step="cpu.body.components")
    for component in value.values():
        if not isinstance(component, str) or not _VALUE.fullmatch(component):
            raise MalformedEvidence("A component is not printable ASCII.", step="cpu.body.components")
    return MappingProxyType(dict(value))
