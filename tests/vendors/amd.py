"""A synthetic AMD: chains, revocation lists and SEV-SNP reports under throw-away roots, whole or wrong in one place."""

import datetime as dt
import struct
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from cloister.evidence.sev_snp import LAYOUTS, SIGNED_SIZE, VCEK, VLEK

NOW = 1_800_000_000.0
DAY = 86_400.0
YEAR = 365 * DAY
HOST_DATA = bytes(range(32))
REPORT_DATA = bytes(range(64))
CHIP_ID = bytes(range(100, 164))
TURIN_CHIP_ID = bytes(range(100, 108)) + bytes(56)
TCB: Mapping[str, bytes] = MappingProxyType(
    {
        "Milan": bytes([4, 1, 0, 0, 0, 0, 24, 219]),
        "Genoa": bytes([10, 1, 0, 0, 0, 0, 23, 84]),
        "Turin": bytes([2, 3, 1, 4, 0, 0, 0, 77]),
    }
)
CPUID: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {"Milan": (0x19, 0x01, 1), "Genoa": (0x19, 0x11, 1), "Turin": (0x1A, 0x02, 1)}
)
NAMES: Mapping[str, str] = MappingProxyType({"Milan": "Milan-B0", "Genoa": "Genoa", "Turin": "Turin-C1"})

OID = "1.3.6.1.4.1.3704.1."
SPL: Mapping[str, str] = MappingProxyType(
    {
        "bootloader": OID + "3.1",
        "tee": OID + "3.2",
        "snp": OID + "3.3",
        "spl4": OID + "3.4",
        "spl5": OID + "3.5",
        "spl6": OID + "3.6",
        "spl7": OID + "3.7",
        "microcode": OID + "3.8",
        "fmc": OID + "3.9",
    }
)
PRODUCT_NAME, HWID, CSP_ID = OID + "2", OID + "4", OID + "5"

OFFSETS: Mapping[str, tuple[int, str]] = MappingProxyType(
    {
        "version": (0x00, "I"),
        "guest_svn": (0x04, "I"),
        "policy": (0x08, "Q"),
        "family_id": (0x10, "16s"),
        "image_id": (0x20, "16s"),
        "vmpl": (0x30, "I"),
        "signature_algo": (0x34, "I"),
        "current_tcb": (0x38, "8s"),
        "platform_info": (0x40, "Q"),
        "key_info": (0x48, "I"),
        "report_data": (0x50, "64s"),
        "measurement": (0x90, "48s"),
        "host_data": (0xC0, "32s"),
        "id_key_digest": (0xE0, "48s"),
        "author_key_digest": (0x110, "48s"),
        "report_id": (0x140, "32s"),
        "report_id_ma": (0x160, "32s"),
        "reported_tcb": (0x180, "8s"),
        "cpuid": (0x188, "3s"),
        "chip_id": (0x1A0, "64s"),
        "committed_tcb": (0x1E0, "8s"),
        "launch_tcb": (0x1F0, "8s"),
        "launch_mit_vector": (0x1F8, "Q"),
        "current_mit_vector": (0x200, "Q"),
    }
)
"""Written down here a second time, from the specification, so that a parser's slip is seen."""

GUIDS: Mapping[str, str] = MappingProxyType(
    {
        "vcek": "63da758d-e664-4564-adc5-f4b93be8accd",
        "vlek": "a8074bc2-a25a-483e-aae6-39c045a0b8a1",
        "ask": "4ab7b379-bbac-4fe4-a02f-05aef327c782",
        "ark": "c0b406a4-a803-4952-9743-3fb6014cd0ae",
        "crl": "92f81bc3-5811-4d3d-97ff-d19f88dc67ea",
    }
)

_PSS = padding.PSS(mgf=padding.MGF1(hashes.SHA384()), salt_length=48)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that `judge` takes; `roots` has the synthetic ARK under its product's name."""

    report: bytes
    chain: tuple[bytes, bytes, bytes]
    crl: bytes | None
    roots: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Authority:
    """How ARK, ASK or ASVK is made. `valid`: seconds before and after `NOW`. `owner`: another one's key, same name.

    `signer`: whose ARK signs it, where not the chain's own.
    """

    valid: tuple[float, float] = (3 * YEAR, 20 * YEAR)
    owner: str = "amd"
    signer: str = ""
    ca: bool = True
    signs_certificates: bool = True
    signs_lists: bool = True
    usage: bool = True
    critical: bool = False
    sha: int = 384


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """How VCEK or VLEK is made. `extensions`: OID -> value instead of the right one, None to leave it out."""

    valid: tuple[float, float] = (30 * DAY, 7 * YEAR)
    curve: ec.EllipticCurve = field(default_factory=ec.SECP384R1)
    extensions: Mapping[str, bytes | None] = field(default_factory=dict)
    ca: bool = False
    pss: bool = True
    issuer: str = ""
    owner: str = "amd"


@dataclass(frozen=True, kw_only=True)
class Crl:
    """How the revocation list is made. `revoked`: "ASK", "ARK"; `valid` as above, None for no end; `owner`: whose key."""

    valid: tuple[float, float | None] = (10 * DAY, 300 * DAY)
    revoked: tuple[str, ...] = ()
    serials: tuple[int, ...] = ()
    number: int | None = 6
    owner: str = "amd"
    issuer: str = ""
    critical: bool = False
    pss: bool = True


def make(
    product: str = "Milan",
    *,
    version: int = 3,
    kind: int = VCEK,
    ark: Authority | None = None,
    ask: Authority | None = None,
    leaf: Leaf | None = None,
    crl: Crl | None = None,
    swapped_key: bool = False,
    **fields: Any,
) -> Evidence:
    """Genuine evidence but for what is given; `fields` are the report's. `swapped_key`: another chip signs the report."""
    ark, ask, leaf = ark or Authority(), ask or Authority(), leaf or Leaf()
    root = certificate_ark(product, ark)
    values = report_fields(product, version, kind, **fields)
    leaf_der = certificate_leaf(product, kind, leaf)
    signer = chip_key(leaf.curve.name, "swapped" if swapped_key else leaf.owner)
    return Evidence(
        report=sign(body(values), signer),
        chain=(leaf_der, certificate_ask(product, kind, ask, ark), root),
        crl=revocation_list(product, crl or Crl(), kind),
        roots={product: _sha256(root)},
    )


# Keys -------------------------------------------------------------------------------------------------------------------


@cache
def rsa_key(name: str) -> rsa.RSAPrivateKey:
    """AMD's have 4,096 bits; these are made quickly."""
    _ = name
    return rsa.generate_private_key(65537, 2048)


@cache
def chip_key(curve: str, owner: str) -> ec.EllipticCurvePrivateKey:
    _ = owner
    return ec.generate_private_key({"secp384r1": ec.SECP384R1(), "secp256r1": ec.SECP256R1()}[curve])


def _ca_name(kind: int, product: str) -> str:
    return f"SEV-VLEK-{product}" if kind == VLEK else f"SEV-{product}"


def _key_of(name: str, owner: str) -> rsa.RSAPrivateKey:
    return rsa_key(f"{owner} {name}")


# Certificates -----------------------------------------------------------------------------------------------------------


def _name(common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "Engineering"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Synthetic Micro Devices"),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )


def _at(seconds: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(seconds, dt.UTC)


def _sha256(der: bytes) -> str:
    return x509.load_der_x509_certificate(der).fingerprint(hashes.SHA256()).hex()


def serial_of(name: str) -> int:
    return {"ARK": 65536, "ASK": 65537, "ASVK": 65793}[name]


def _authority(common: str, issuer: str, serial: int, made: Authority, signer: rsa.RSAPrivateKey) -> bytes:
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=made.signs_certificates,
        crl_sign=made.signs_lists,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(common))
        .issuer_name(_name(issuer))
        .serial_number(serial)
        .public_key(_key_of(common, made.owner).public_key())
        .not_valid_before(_at(NOW - made.valid[0]))
        .not_valid_after(_at(NOW + made.valid[1]))
        .add_extension(x509.BasicConstraints(ca=made.ca, path_length=None), critical=True)
    )
    if made.usage:
        builder = builder.add_extension(usage, critical=True)
    if made.critical:
        unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")
        builder = builder.add_extension(unknown, critical=True)
    digest = hashes.SHA384() if made.sha == 384 else hashes.SHA256()
    pss = padding.PSS(mgf=padding.MGF1(digest), salt_length=digest.digest_size)
    return builder.sign(signer, digest, rsa_padding=pss).public_bytes(Encoding.DER)


@cache
def certificate_ark(product: str, made: Authority) -> bytes:
    name = f"ARK-{product}"
    return _authority(name, name, serial_of("ARK"), made, _key_of(name, made.signer or made.owner))


@cache
def certificate_ask(product: str, kind: int, made: Authority, ark: Authority) -> bytes:
    root = f"ARK-{product}"
    serial = serial_of("ASVK" if kind == VLEK else "ASK")
    return _authority(_ca_name(kind, product), root, serial, made, _key_of(root, made.signer or ark.owner))


def integer(value: int) -> bytes:
    return bytes([2, 1, value]) if value < 0x80 else bytes([2, 2, 0, value])


def ia5(text: str) -> bytes:
    return bytes([0x16, len(text)]) + text.encode()


def extensions(product: str, kind: int, tcb: bytes) -> dict[str, bytes]:
    """OID -> value, as KDS writes them: the hwID stands there bare."""
    spl = {SPL[name]: integer(value) for name, value in zip(LAYOUTS[product], tcb, strict=True)}
    chip = (
        {CSP_ID: ia5("synthetic-cloud")}
        if kind == VLEK
        else {HWID: chip_id(product)[: 8 if product == "Turin" else 64]}
    )
    return {OID + "1": integer(int(product == "Turin")), PRODUCT_NAME: ia5(NAMES[product]), **spl, **chip}


def chip_id(product: str) -> bytes:
    return TURIN_CHIP_ID if product == "Turin" else CHIP_ID


def certificate_leaf(product: str, kind: int, made: Leaf) -> bytes:
    issuer, key = made.issuer or _ca_name(kind, product), _key_of(_ca_name(kind, product), made.owner)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name("SEV-VLEK" if kind == VLEK else "SEV-VCEK"))
        .issuer_name(_name(issuer))
        .serial_number(1)
        .public_key(chip_key(made.curve.name, made.owner).public_key())
        .not_valid_before(_at(NOW - made.valid[0]))
        .not_valid_after(_at(NOW + made.valid[1]))
    )
    for oid, value in {**extensions(product, kind, TCB[product]), **made.extensions}.items():
        if value is not None:
            unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value)
            builder = builder.add_extension(unknown, critical=False)
    if made.ca:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    scheme: padding.PSS | padding.PKCS1v15 = _PSS if made.pss else padding.PKCS1v15()
    return _with_serial_zero(builder.sign(key, hashes.SHA384(), rsa_padding=scheme), key, scheme)


def _with_serial_zero(
    certificate: x509.Certificate, key: rsa.RSAPrivateKey, scheme: padding.PSS | padding.PKCS1v15
) -> bytes:
    """As KDS issues its leaves, and as pyca builds none."""
    version = bytes.fromhex("a003020102")
    tbs = certificate.tbs_certificate_bytes
    changed = tbs.replace(version + b"\x02\x01\x01", version + b"\x02\x01\x00", 1)
    signature = key.sign(changed, scheme, hashes.SHA384())
    return certificate.public_bytes(Encoding.DER).replace(tbs, changed).replace(certificate.signature, signature)


def revocation_list(product: str, made: Crl, kind: int = VCEK) -> bytes:
    root = f"ARK-{product}"
    begin, end = made.valid
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(_name(made.issuer or root))
        .last_update(_at(NOW - begin))
        .next_update(_at(NOW + (DAY if end is None else end)))
    )
    names = ["ASVK" if name == "ASK" and kind == VLEK else name for name in made.revoked]
    for serial in (*(serial_of(name) for name in names), *made.serials):
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(_at(NOW - begin)).build()
        builder = builder.add_revoked_certificate(entry)
    if made.number is not None:
        builder = builder.add_extension(x509.CRLNumber(made.number), critical=False)
    if made.critical:
        unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")
        builder = builder.add_extension(unknown, critical=True)
    key = _key_of(root, made.owner)
    scheme: padding.PSS | padding.PKCS1v15 = _PSS if made.pss else padding.PKCS1v15()
    crl = builder.sign(key, hashes.SHA384(), rsa_padding=scheme)
    return _without_end(crl, key) if end is None else crl.public_bytes(Encoding.DER)


def _der(tag: int, content: bytes) -> bytes:
    size = len(content)
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, size] if size < 0x80 else [tag, 0x80 | len(length), *length]) + content


def _without_end(crl: x509.CertificateRevocationList, key: rsa.RSAPrivateKey) -> bytes:
    """RFC 5280 lets nextUpdate be left out; pyca does not."""
    tbs, time = crl.tbs_certlist_bytes, b"\x17\x0d"
    second = tbs.index(time, tbs.index(time) + 2)
    changed = _der(0x30, _content(tbs[:second] + tbs[second + 15 :]))
    rest = crl.public_bytes(Encoding.DER).partition(tbs)[2]
    algorithm = rest[: rest.index(b"\x03\x82\x01\x01\x00" + crl.signature)]
    return _der(0x30, changed + algorithm + _der(0x03, b"\0" + key.sign(changed, _PSS, hashes.SHA384())))


def _content(der: bytes) -> bytes:
    return der[2:] if der[1] < 0x80 else der[2 + (der[1] & 0x7F) :]


# Reports ----------------------------------------------------------------------------------------------------------------


def report_fields(product: str = "Milan", version: int = 3, kind: int = VCEK, **changes: Any) -> dict[str, Any]:
    """A report's fields by the specification's names, those that its version has."""
    tcb = TCB[product]
    values: dict[str, Any] = {
        "version": version,
        "guest_svn": 7,
        "policy": 0x3001F,
        "family_id": bytes(range(16)),
        "image_id": bytes(range(16, 32)),
        "vmpl": 0,
        "signature_algo": 1,
        "current_tcb": tcb,
        "platform_info": 0x25,
        "key_info": kind << 2,
        "report_data": REPORT_DATA,
        "measurement": bytes(range(48)),
        "host_data": HOST_DATA,
        "id_key_digest": bytes(48),
        "author_key_digest": bytes(48),
        "report_id": bytes(range(32)),
        "report_id_ma": b"\xff" * 32,
        "reported_tcb": tcb,
        "chip_id": chip_id(product),
        "committed_tcb": tcb,
        "launch_tcb": tcb,
    }
    if version >= 3:
        values["cpuid"] = CPUID[product]
    if version >= 5:
        values |= {"launch_mit_vector": 3, "current_mit_vector": 7}
    return {**values, **changes}


def body(values: Mapping[str, Any]) -> bytes:
    """The signed part. `values` may hold "raw": offset -> bytes, written last."""
    data = bytearray(SIGNED_SIZE)
    for name, value in values.items():
        if name != "raw":
            at, form = OFFSETS[name]
            struct.pack_into("<" + form, data, at, bytes(value) if form.endswith("s") else value)
    for at, raw in values.get("raw", {}).items():
        data[at : at + len(raw)] = raw
    return bytes(data)


def sign(signed: bytes, key: ec.EllipticCurvePrivateKey) -> bytes:
    r, s = decode_dss_signature(key.sign(signed, ec.ECDSA(hashes.SHA384())))
    return with_signature(signed, r.to_bytes(72, "little") + s.to_bytes(72, "little"))


def with_signature(signed: bytes, signature: bytes) -> bytes:
    return signed + signature + bytes(512 - len(signature))


def certificate_table(contents: Mapping[str, bytes]) -> bytes:
    """`auxblob`: name of `GUIDS`, or a GUID -> content."""
    at = 24 * (len(contents) + 1)
    entries = b""
    for name, content in contents.items():
        entries += uuid.UUID(GUIDS.get(name, name)).bytes + struct.pack("<II", at, len(content))
        at += len(content)
    return entries + bytes(24) + b"".join(contents.values())
