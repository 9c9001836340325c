"""AMD SEV-SNP attestation reports and the certificates that travel beside them, as bytes with names.

AMD 56860, "SEV Secure Nested Paging Firmware ABI Specification": section 7.3, table "ATTESTATION_REPORT" (versions 2 to
5, 1,184 bytes), section 2.2 (TCB_VERSION), section 4.3 (guest policy), chapter 10 (signature). AMD 57230, "VCEK Certificate
and KDS Interface Specification". AMD 56421, "SEV-ES Guest-Hypervisor Communication Block Standardization", section 4.1.8
(the certificate table, which Linux gives out as `auxblob`).
"""

import base64
import binascii
import re
import struct
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cloister.errors import MalformedEvidence
from cloister.evidence.document import MAX_ITEM

__all__ = [
    "LAYOUTS",
    "PLATFORM",
    "REPORT_SIZE",
    "SIGNED_SIZE",
    "VCEK",
    "VERSIONS",
    "VLEK",
    "CertificateTable",
    "Report",
    "parse_certificate_table",
    "parse_report",
    "pem_or_der_certificates",
    "pem_or_der_crl",
    "product_of",
    "tcb_components",
]

PLATFORM = "sev-snp"
REPORT_SIZE = 0x4A0
SIGNED_SIZE = 0x2A0
VERSIONS = range(2, 6)
VCEK, VLEK = 0, 1
"""Values of SIGNING_KEY: the chip's own key, or its cloud's."""

_SIGNATURE_PART = 72
_SIG_ALGO_ECDSA_P384_SHA384 = 1
_CPUID_VERSION = 3
_MITIGATION_VERSION = 4

_TO_GENOA = ("bootloader", "tee", "spl4", "spl5", "spl6", "spl7", "snp", "microcode")
_FROM_TURIN = ("fmc", "bootloader", "tee", "snp", "spl5", "spl6", "spl7", "microcode")

LAYOUTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"Milan": _TO_GENOA, "Genoa": _TO_GENOA, "Turin": _FROM_TURIN}
)
"""Product -> what each byte of its TCB_VERSION counts, in the order of the bytes (56860, section 2.2; 57230, chapter 3)."""

_CPUID: Mapping[int, tuple[tuple[range, str], ...]] = MappingProxyType(
    {
        0x19: ((range(0x10), "Milan"), (range(0x10, 0x20), "Genoa"), (range(0xA0, 0xB0), "Genoa")),
        0x1A: ((range(0x12), "Turin"),),
    }
)

_ENTRY = struct.Struct("<16sII")
_MAX_ENTRIES = 16
_GUIDS: Mapping[str, str] = MappingProxyType(
    {
        "63da758d-e664-4564-adc5-f4b93be8accd": "vcek",
        "a8074bc2-a25a-483e-aae6-39c045a0b8a1": "vlek",
        "4ab7b379-bbac-4fe4-a02f-05aef327c782": "ask",
        "c0b406a4-a803-4952-9743-3fb6014cd0ae": "ark",
        "92f81bc3-5811-4d3d-97ff-d19f88dc67ea": "crl",
    }
)
_PEM_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----([A-Za-z0-9+/=\s]{1,16384})-----END CERTIFICATE-----")
_PEM_CRL = re.compile(rb"\s*-----BEGIN X509 CRL-----([A-Za-z0-9+/=\s]+)-----END X509 CRL-----\s*")
_MAX_CERTIFICATES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Fields as the specification names them; numbers are little-endian there. TCB versions are their 8 raw bytes.

    `cpuid` (family, model, stepping) is None before version 3, the mitigation vectors are None before version 4.
    `signature` is (r, s). `encoded` holds the exact 1,184 bytes.
    """

    version: int
    guest_svn: int
    policy: int
    family_id: bytes
    image_id: bytes
    vmpl: int
    current_tcb: bytes
    platform_info: int
    key_info: int
    report_data: bytes
    measurement: bytes
    host_data: bytes
    id_key_digest: bytes
    author_key_digest: bytes
    report_id: bytes
    report_id_ma: bytes
    reported_tcb: bytes
    cpuid: tuple[int, int, int] | None
    chip_id: bytes
    committed_tcb: bytes
    launch_tcb: bytes
    launch_mit_vector: int | None
    current_mit_vector: int | None
    signature: tuple[int, int]
    encoded: bytes

    @property
    def signed(self) -> bytes:
        return self.encoded[:SIGNED_SIZE]

    @property
    def author_key_en(self) -> bool:
        return bool(self.key_info & 1)

    @property
    def mask_chip_key(self) -> bool:
        """The host had the firmware leave out the signature."""
        return bool(self.key_info >> 1 & 1)

    @property
    def signing_key(self) -> int:
        """`VCEK`, `VLEK`, or 7 for none; the rest is reserved."""
        return self.key_info >> 2 & 7

    def nonzero_reserved(self) -> tuple[str, ...]:
        """Ranges that the specification reserves as zero and that are not, those behind the signature among them."""
        wrong = [f"{at:#05x}-{end - 1:#05x}" for at, end in _reserved(self.version) if any(self.encoded[at:end])]
        return (*wrong, *(["key_info"] if self.key_info >> 5 else []))


def _reserved(version: int) -> Iterator[tuple[int, int]]:
    yield 0x4C, 0x50
    yield (0x18B if version >= _CPUID_VERSION else 0x188), 0x1A0
    yield 0x1EB, 0x1EC
    yield 0x1EF, 0x1F0
    yield (0x208 if version >= _MITIGATION_VERSION else 0x1F8), SIGNED_SIZE
    yield SIGNED_SIZE + 2 * _SIGNATURE_PART, REPORT_SIZE  # unsigned: nothing but this rule keeps it from being changed


def parse_report(data: bytes) -> Report:
    """Exactly one report of a known version, signed with the only algorithm there is (ECDSA P-384, SHA-384).

    Does not check: the signature, reserved fields (`Report.nonzero_reserved`), what any value means.

    Raises: MalformedEvidence.
    """
    if len(data) != REPORT_SIZE:
        raise MalformedEvidence(
            "The SEV-SNP report has another length.", step="cpu", expected=str(REPORT_SIZE), got=str(len(data))
        )
    version, guest_svn, policy = struct.unpack_from("<IIQ", data)
    vmpl, sig_algo = struct.unpack_from("<II", data, 0x30)
    if version not in VERSIONS:
        raise MalformedEvidence(
            "Unknown version of SEV-SNP report.", step="cpu.version", expected="2 to 5", got=str(version)
        )
    if sig_algo != _SIG_ALGO_ECDSA_P384_SHA384:
        raise MalformedEvidence(
            "Unknown signature algorithm.", step="cpu.signature_algo", expected="1 (ECDSA P-384)", got=str(sig_algo)
        )
    platform_info, key_info = struct.unpack_from("<QI", data, 0x40)
    mitigations = struct.unpack_from("<QQ", data, 0x1F8) if version >= _MITIGATION_VERSION else (None, None)
    return Report(
        version=version,
        guest_svn=guest_svn,
        policy=policy,
        family_id=data[0x10:0x20],
        image_id=data[0x20:0x30],
        vmpl=vmpl,
        current_tcb=data[0x38:0x40],
        platform_info=platform_info,
        key_info=key_info,
        report_data=data[0x50:0x90],
        measurement=data[0x90:0xC0],
        host_data=data[0xC0:0xE0],
        id_key_digest=data[0xE0:0x110],
        author_key_digest=data[0x110:0x140],
        report_id=data[0x140:0x160],
        report_id_ma=data[0x160:0x180],
        reported_tcb=data[0x180:0x188],
        cpuid=(data[0x188], data[0x189], data[0x18A]) if version >= _CPUID_VERSION else None,
        chip_id=data[0x1A0:0x1E0],
        committed_tcb=data[0x1E0:0x1E8],
        launch_tcb=data[0x1F0:0x1F8],
        launch_mit_vector=mitigations[0],
        current_mit_vector=mitigations[1],
        signature=(_number(data, SIGNED_SIZE), _number(data, SIGNED_SIZE + _SIGNATURE_PART)),
        encoded=data,
    )


def _number(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + _SIGNATURE_PART], "little")


def product_of(cpuid: tuple[int, int, int]) -> str | None:
    """The product whose key endorses a processor of this (family, model, stepping); None for an unknown one."""
    family, model, _ = cpuid
    return next((product for models, product in _CPUID.get(family, ()) if model in models), None)


def tcb_components(tcb: bytes, product: str) -> Mapping[str, int]:
    """A TCB_VERSION's bytes by name, `product`'s way; an unknown product is read as Milan and Genoa are."""
    return MappingProxyType(dict(zip(LAYOUTS.get(product, _TO_GENOA), tcb, strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateTable:
    """What the host put beside the report: DER certificates and a DER revocation list, None where absent.

    All of it comes from the host: nothing here is believed before `verify.sev_snp` has judged it.
    """

    vcek: bytes | None = None
    vlek: bytes | None = None
    ask: bytes | None = None
    ark: bytes | None = None
    crl: bytes | None = None

    def chain(self, signing_key: int) -> tuple[bytes, ...]:
        """(leaf, ASK or ASVK, ARK) as far as they are there. `signing_key` is the report's own."""
        leaf = self.vlek if signing_key == VLEK else self.vcek
        return tuple(der for der in (leaf, self.ask, self.ark) if der is not None)


def parse_certificate_table(auxblob: bytes) -> CertificateTable:
    """Entries (GUID, offset, length), an entry of zeros at their end, then contents, each PEM or DER.

    b"" is an empty table. Entries of unknown GUIDs are the host's own business: bounded, and left out.

    Raises: MalformedEvidence for a table without an end, contents outside the blob, a GUID twice.
    """
    if len(auxblob) > MAX_ITEM:
        raise MalformedEvidence("The certificate table is over 64 KB.", step="auxblob")
    found: dict[str, bytes] = {}
    for guid, content in _entries(auxblob):
        name = _GUIDS.get(guid)
        if name in found:
            raise MalformedEvidence("A certificate stands twice in the table.", step="auxblob", got=guid)
        if name is not None:
            found[name] = pem_or_der_crl(content) if name == "crl" else _one_certificate(content, guid)
    return CertificateTable(**found)


def _entries(auxblob: bytes) -> Iterator[tuple[str, bytes]]:
    if not auxblob:
        return
    for at in range(0, _MAX_ENTRIES * _ENTRY.size, _ENTRY.size):
        if at + _ENTRY.size > len(auxblob):
            break
        guid, offset, length = _ENTRY.unpack_from(auxblob, at)
        if not any(guid) and not offset and not length:
            return
        if offset < at + _ENTRY.size or offset + length > len(auxblob):
            raise MalformedEvidence("A certificate lies outside the table.", step="auxblob", got=f"{offset}+{length}")
        yield str(uuid.UUID(bytes=guid)), auxblob[offset : offset + length]
    raise MalformedEvidence("The certificate table has no end.", step="auxblob")


def _one_certificate(content: bytes, guid: str) -> bytes:
    certificates = pem_or_der_certificates(content)
    if len(certificates) != 1:
        raise MalformedEvidence("An entry holds not exactly one certificate.", step="auxblob", got=guid)
    return certificates[0]


def pem_or_der_certificates(data: bytes) -> tuple[bytes, ...]:
    """DER of each certificate of a PEM bundle, in its order, or of the one DER certificate. Does not look inside.

    AMD KDS answers `vcek/v1/PRODUCT/cert_chain` with ASK and ARK in this order: put the leaf in front of them.

    Raises: MalformedEvidence.
    """
    if len(data) > MAX_ITEM:
        raise MalformedEvidence("Certificates over 64 KB.", step="endorsements.amd")
    if data[:1] == b"\x30":
        return (data,)
    blocks = _PEM_CERTIFICATE.findall(data)
    if not 0 < len(blocks) <= _MAX_CERTIFICATES or data.count(b"-----BEGIN") != len(blocks):
        raise MalformedEvidence("Neither DER nor a PEM bundle of certificates.", step="endorsements.amd")
    return tuple(_base64(block, "endorsements.amd") for block in blocks)


def pem_or_der_crl(data: bytes) -> bytes:
    """DER of one revocation list. Does not look inside. Raises: MalformedEvidence."""
    if len(data) > MAX_ITEM:
        raise MalformedEvidence("A revocation list over 64 KB.", step="endorsements.amd_crl")
    if data[:1] == b"\x30":
        return data
    match = _PEM_CRL.fullmatch(data)
    if match is None:
        raise MalformedEvidence("Neither DER nor PEM: no revocation list.", step="endorsements.amd_crl")
    return _base64(match[1], "endorsements.amd_crl")


def _base64(block: bytes, step: str) -> bytes:
    try:
        return base64.b64decode(b"".join(block.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MalformedEvidence("PEM without base64.", step=step) from error
