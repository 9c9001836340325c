"""An NVIDIA GPU's (or NVSwitch's) attestation report: an SPDM 1.1 measurement exchange, and the chain that signs it.

```
report    = GET_MEASUREMENTS request (37 bytes) || MEASUREMENTS response
request   = 11 e0 01 ff || nonce (32) || slot (1)
response  = 11 60 00 slot || blocks (1) || record length (3) || record || nonce (32)
            || opaque length (2) || opaque || signature (96): r || s, over everything before it
block     = index (1) || 01 || size (2) || value type (1) || value size (2) || value
opaque    = { type (2) || size (2) || data }*                            numbers are little-endian
gpu-N     = CBOR {"report": bytes, "chain": PEM, the device's certificate first, "nonce": 32 bytes}
```

Source: DMTF DSP0274 1.1.0, sections 10.11.1 to 10.11.4; the opaque fields' numbers as NVIDIA's nvtrust names them.
"""

import base64
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import cbor2

from cloister.errors import MalformedEvidence
from cloister.evidence.document import MAX_ITEM, Item
from cloister.evidence.strict_cbor import load_map

__all__ = [
    "MEDIA_TYPE",
    "NONCE_SIZE",
    "GpuEvidence",
    "GpuReport",
    "parse_chain",
    "parse_fwids",
    "parse_gpu",
    "parse_report",
]

MEDIA_TYPE = "application/cbor"
NONCE_SIZE = 32

_REQUEST = b"\x11\xe0\x01\xff"
"""SPDM 1.1, GET_MEASUREMENTS, signature requested, all measurements."""

_RESPONSE = b"\x11\x60\x00"
"""SPDM 1.1, MEASUREMENTS, no count of blocks here."""

_REQUEST_SIZE = 37
_SIGNATURE_SIZE = 96
_MAX_SLOT = 7
_DMTF = 1
_MAX_VALUE = 64
_MAX_OPAQUE = 1024

_DRIVER, _VBIOS, _NVDEC0, _FWID = 3, 6, 11, 20
_NVDEC0_DISABLED = b"\x55"
_VERSION = re.compile(rb"([0-9A-Za-z][0-9A-Za-z._-]{0,31})\0*")
_VBIOS_SIZE = 8

_MAX_CHAIN = 8
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----\n((?:[A-Za-z0-9+/=]{1,64}\n){1,64})-----END CERTIFICATE-----\n")
_PEM_LINE = 64


@dataclass(frozen=True, slots=True)
class GpuEvidence:
    """One `gpu-N` item, as transported. `nonce` is what the collector says it asked for; a verifier has its own."""

    report: bytes
    chain: bytes
    nonce: bytes

    def item(self) -> Item:
        return Item(MEDIA_TYPE, cbor2.dumps({"report": self.report, "chain": self.chain, "nonce": self.nonce}))


@dataclass(frozen=True, slots=True)
class GpuReport:
    """`nonce` is the requester's. `measurements`: SPDM index (from 1) -> value, 48 bytes for SHA-384; `record` is their
    exact encoding. `opaque`: the vendor's field number -> data. `signed`: the bytes under `signature` (r || s)."""

    nonce: bytes
    measurements: Mapping[int, bytes]
    record: bytes
    opaque: Mapping[int, bytes]
    signed: bytes
    signature: bytes

    @property
    def driver(self) -> str:
        """Such as "590.12"; "" in a switch's report."""
        return _version(self.opaque.get(_DRIVER, b""), "gpu.driver")

    @property
    def vbios(self) -> str:
        """As nvidia-smi writes it, such as "96.00.A5.00.01"; "" where the report does not say."""
        data = self.opaque.get(_VBIOS, b"")
        if len(data) != _VBIOS_SIZE:
            return _version(data, "gpu.vbios")
        return ".".join(f"{byte:02X}" for byte in (*reversed(data[:4]), data[4]))

    @property
    def fwid(self) -> bytes:
        """The digest of the firmware that holds the signing key (DICE's FWID); b"" where the report does not say."""
        return self.opaque.get(_FWID, b"")

    @property
    def nvdec0_disabled(self) -> bool:
        """Then NVIDIA's reference value 35 says nothing about this device."""
        return self.opaque.get(_NVDEC0) == _NVDEC0_DISABLED


def parse_gpu(content: bytes) -> GpuEvidence:
    """One `gpu-N` item of the attestation document. Raises: MalformedEvidence."""
    fields = load_map(content, keys=frozenset({"report", "chain", "nonce"}), max_bytes=MAX_ITEM, what="gpu")
    for name, value in fields.items():
        if not isinstance(value, bytes):
            raise MalformedEvidence(f"gpu.{name} is not bytes.", step=f"gpu.{name}")
    if len(fields["nonce"]) != NONCE_SIZE:
        raise MalformedEvidence("A GPU's nonce has 32 bytes.", step="gpu.nonce", expected=str(NONCE_SIZE))
    return GpuEvidence(fields["report"], fields["chain"], fields["nonce"])


def parse_report(data: bytes) -> GpuReport:
    """Total and bounded: form only, the signature is not checked.

    Raises: MalformedEvidence for another SPDM version or message, a length that does not fit exactly, a measurement
    that is not DMTF's or stands there twice, a version that is not printable.
    """
    if len(data) > MAX_ITEM:
        raise MalformedEvidence("The GPU's report is too long.", step="gpu.report", expected=f"{MAX_ITEM} bytes")
    reader = _Reader(data)
    if reader.take(4) != _REQUEST:
        raise MalformedEvidence("The report does not start with SPDM 1.1 GET_MEASUREMENTS.", step="gpu.request")
    nonce, slot = reader.take(NONCE_SIZE), reader.number(1)
    if reader.take(3) != _RESPONSE or reader.number(1) != slot or slot > _MAX_SLOT:
        raise MalformedEvidence("The request is not followed by SPDM 1.1 MEASUREMENTS.", step="gpu.response")
    blocks = reader.number(1)
    record = reader.take(reader.number(3))
    reader.take(NONCE_SIZE)  # the responder's
    length = reader.number(2)
    if length > _MAX_OPAQUE:
        raise MalformedEvidence("The opaque data is too long.", step="gpu.opaque", expected=f"{_MAX_OPAQUE} bytes")
    opaque = reader.take(length)
    report = GpuReport(
        nonce=nonce,
        measurements=MappingProxyType(_measurements(record, blocks)),
        record=record,
        opaque=MappingProxyType(_opaque(opaque)),
        signed=data[:-_SIGNATURE_SIZE],
        signature=reader.take(_SIGNATURE_SIZE),
    )
    reader.end()
    _ = report.driver, report.vbios
    return report


def parse_chain(pem: bytes) -> tuple[bytes, ...]:
    """DER certificates in the order in which they stand: the device's first. One spelling: lines of 64 characters,
    nothing between, no more after the last than one line feed.

    Raises: MalformedEvidence.
    """
    text = pem if pem.endswith(b"\n") else pem + b"\n"
    if len(text) > MAX_ITEM:
        raise MalformedEvidence("The GPU's certificate chain is too long.", step="gpu.chain")
    ders = tuple(_der(found[1]) for found in _PEM.finditer(text))
    if not 0 < len(ders) <= _MAX_CHAIN or b"".join(_encode(der) for der in ders) != text:
        raise MalformedEvidence("The GPU's certificate chain is not PEM in its one spelling.", step="gpu.chain")
    return ders


def parse_fwids(extension: bytes) -> tuple[bytes, ...]:
    """The firmware digests in a leaf's DICE extension (TCG, "DICE Attestation Architecture", section 6.1.1).

    Hopper writes `SEQUENCE { version, key, SEQUENCE { algorithm, digest } }`, Blackwell a DiceTcbInfo with `[6] {
    SEQUENCE { algorithm, digest }, … }`. Each digest has 48 bytes (SHA-384); unused ones are zero and are left out.

    Raises: MalformedEvidence.
    """
    outer = list(_elements(extension))
    if len(outer) != 1 or outer[0][0] != _SEQUENCE:
        raise MalformedEvidence("The DICE extension is not a sequence.", step="gpu.chain.fwid")
    members = list(_elements(outer[0][1]))
    listed = [content for tag, content in members if tag == _FWID_LIST]
    fwids = list(_elements(listed[0])) if listed else [member for member in members[2:3] if member[0] == _SEQUENCE]
    digests = tuple(_fwid(tag, content) for tag, content in fwids)
    return tuple(digest for digest in digests if any(digest))


_SEQUENCE, _OID, _OCTETS, _FWID_LIST = 0x30, 0x06, 0x04, 0xA6
_SHA384_OID = bytes.fromhex("608648016503040202")


def _fwid(tag: int, content: bytes) -> bytes:
    members = list(_elements(content)) if tag == _SEQUENCE else []
    if [tag for tag, _ in members] != [_OID, _OCTETS] or members[0][1] != _SHA384_OID or len(members[1][1]) != 48:
        raise MalformedEvidence("A firmware digest in the leaf is not SHA-384.", step="gpu.chain.fwid")
    return members[1][1]


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """DER elements (X.690, section 8.1) of one-byte tags and fewer than 2^16 bytes."""
    while data:
        head, size = (2, data[1]) if len(data) > 1 else (0, 0)
        if size in (0x81, 0x82):
            head += size - 0x80
            size = int.from_bytes(data[2:head], "big")
        elif size >= 0x80:
            head = 0
        if not head or len(data) < head + size:
            raise MalformedEvidence("The DICE extension is not DER.", step="gpu.chain.fwid")
        yield data[0], data[head : head + size]
        data = data[head + size :]


class _Reader:
    """Takes fields from the front."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise MalformedEvidence("The GPU's report is cut short.", step="gpu.report")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def more(self) -> bool:
        return self._at < len(self._data)

    def end(self) -> None:
        if self.more():
            raise MalformedEvidence("The GPU's report goes on after its end.", step="gpu.report")


def _measurements(record: bytes, blocks: int) -> dict[int, bytes]:
    reader, found = _Reader(record), dict[int, bytes]()
    for _ in range(blocks):
        index, specification, size = reader.number(1), reader.number(1), reader.number(2)
        reader.number(1)  # the kind of firmware or configuration that was measured
        length = reader.number(2)
        if specification != _DMTF or size != 3 + length or not 0 < length <= _MAX_VALUE:
            raise MalformedEvidence("A measurement is not in DMTF's form.", step="gpu.measurements")
        if index == 0 or index in found:
            raise MalformedEvidence("A measurement's index is zero, or stands there twice.", step="gpu.measurements")
        found[index] = reader.take(length)
    reader.end()
    if not found:
        raise MalformedEvidence("The GPU's report measures nothing.", step="gpu.measurements")
    return found


def _opaque(data: bytes) -> dict[int, bytes]:
    reader, found = _Reader(data), dict[int, bytes]()
    while reader.more():
        kind, size = reader.number(2), reader.number(2)
        if kind in found:
            raise MalformedEvidence("An opaque field stands there twice.", step="gpu.opaque", got=str(kind))
        found[kind] = reader.take(size)
    return found


def _version(data: bytes, what: str) -> str:
    match = _VERSION.fullmatch(data)
    if data and not match:
        raise MalformedEvidence(f"{what} is not a version.", step=what)
    return match[1].decode("ascii") if match else ""


def _der(base64_lines: bytes) -> bytes:
    try:
        return base64.b64decode(base64_lines.replace(b"\n", b""), validate=True)
    except ValueError as error:
        raise MalformedEvidence("The GPU's certificate chain is not base64.", step="gpu.chain") from error


def _encode(der: bytes) -> bytes:
    text = base64.b64encode(der)
    lines = b"".join(text[at : at + _PEM_LINE] + b"\n" for at in range(0, len(text), _PEM_LINE))
    return b"-----BEGIN CERTIFICATE-----\n" + lines + b"-----END CERTIFICATE-----\n"
