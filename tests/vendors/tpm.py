"""A TPM maker of our own: certificate authorities, attestation keys, quotes and boot logs, all under a throw-away root."""

import datetime
import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from cloister.evidence.tpm import GENERATED, TpmEvidence, parse_public, public_area, sized

NOW = 1_800_000_000.0
DAY = 86400.0
AK_USAGE = x509.ObjectIdentifier("2.23.133.8.3")
EK_USAGE = x509.ObjectIdentifier("2.23.133.8.1")

Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey

ZERO_PCRS: Mapping[int, bytes] = {index: bytes(32) for index in range(24)}


def time(at: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(at, tz=datetime.UTC)


def usage(*names: str) -> x509.KeyUsage:
    every = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign "
        "encipher_only decipher_only"
    )
    return x509.KeyUsage(**{name: name in names for name in every.split()})


@dataclass(frozen=True)
class Terms:
    """What a certificate says beside its key; the defaults are an attestation key's."""

    subject: str = "attestation key"
    ca: bool = False
    path_length: int | None = None
    usages: tuple[str, ...] | None = ("digital_signature",)
    extended: x509.ObjectIdentifier | None = AK_USAGE
    since: float = NOW - DAY
    until: float = NOW + 30 * DAY
    crl_point: bool = False
    crl_address: str = "http://tpm.example/crl"
    critical: x509.ExtensionType | None = None
    serial: int = 7
    constraints: bool = True
    digest: hashes.HashAlgorithm = field(default_factory=hashes.SHA256)


CA = Terms(subject="TPM CA", ca=True, path_length=0, usages=("key_cert_sign",), extended=None, crl_point=True, serial=5)
ROOT = replace(CA, subject="TPM Root", path_length=None, usages=("key_cert_sign", "crl_sign"), crl_point=False)
EK = Terms(subject="endorsement key", usages=("key_encipherment",), extended=EK_USAGE)


def certify(public: object, terms: Terms, issuer: str, issuer_key: Key) -> bytes:
    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    builder = (
        x509.CertificateBuilder()
        .subject_name(name(terms.subject))
        .issuer_name(name(issuer))
        .public_key(public)  # type: ignore[arg-type]
        .serial_number(terms.serial)
        .not_valid_before(time(terms.since))
        .not_valid_after(time(terms.until))
    )
    if terms.constraints:
        constraints = x509.BasicConstraints(ca=terms.ca, path_length=terms.path_length)
        builder = builder.add_extension(constraints, critical=True)
    if terms.usages is not None:
        builder = builder.add_extension(usage(*terms.usages), critical=True)
    if terms.extended is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([terms.extended]), critical=False)
    if terms.crl_point:
        point = x509.DistributionPoint(
            [x509.UniformResourceIdentifier(terms.crl_address)],
            relative_name=None,
            reasons=None,
            crl_issuer=None,
        )
        builder = builder.add_extension(x509.CRLDistributionPoints([point]), critical=False)
    if terms.critical is not None:
        builder = builder.add_extension(terms.critical, critical=True)
    return builder.sign(issuer_key, terms.digest).public_bytes(Encoding.DER)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Maker:
    """A root, one CA below it, and what they say of themselves."""

    root_key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP384R1()))
    ca_key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    root_terms: Terms = ROOT
    ca_terms: Terms = CA

    @cached_property
    def root(self) -> bytes:
        return certify(self.root_key.public_key(), self.root_terms, self.root_terms.subject, self.root_key)

    @cached_property
    def ca(self) -> bytes:
        return certify(self.ca_key.public_key(), self.ca_terms, self.root_terms.subject, self.root_key)

    def chain(self, key: object, terms: Terms | None = None) -> tuple[bytes, ...]:
        return certify(key, terms or Terms(), self.ca_terms.subject, self.ca_key), self.ca, self.root

    def crl(
        self,
        *revoked: int,
        since: float = NOW - DAY,
        until: float = NOW + DAY,
        number: int = 3,
        key: ec.EllipticCurvePrivateKey | None = None,
        critical: x509.ExtensionType | None = None,
        issuer: str | None = None,
        digest: hashes.SHA256 | hashes.SHA3_256 | None = None,
    ) -> bytes:
        """The root's list, unless told otherwise."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer or self.root_terms.subject)]))
            .last_update(time(since))
            .next_update(time(until))
            .add_extension(x509.CRLNumber(number), critical=False)
        )
        if critical is not None:
            builder = builder.add_extension(critical, critical=True)
        for serial in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(time(since)).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(key or self.root_key, digest or hashes.SHA256()).public_bytes(Encoding.DER)


def pinned(certificate: bytes) -> frozenset[str]:
    """The roots that a verifier pins: this one."""
    return frozenset({hashlib.sha256(certificate).hexdigest()})


def selection(indices: Sequence[int], bank: int = 0x000B, size: int = 3) -> bytes:
    return struct.pack(">HB", bank, size) + sum(1 << index for index in indices).to_bytes(size, "little")


def quote(
    extra: bytes,
    pcrs: Mapping[int, bytes],
    *,
    magic: int = GENERATED,
    kind: int = 0x8018,
    selections: Sequence[bytes] | None = None,
    digest: bytes | None = None,
    hash_name: str = "sha256",
    signer: bytes = b"\0\x0b" + bytes(32),
) -> bytes:
    chosen = [selection(sorted(pcrs))] if selections is None else selections
    values = b"".join(pcrs[index] for index in sorted(pcrs))
    return (
        struct.pack(">IH", magic, kind)
        + sized(signer)
        + sized(extra)
        + struct.pack(">QIIBQ", 1000, 1, 0, 1, 7)
        + len(chosen).to_bytes(4, "big")
        + b"".join(chosen)
        + sized(hashlib.new(hash_name, values).digest() if digest is None else digest)
    )


HASHES: Mapping[int, hashes.HashAlgorithm] = {
    0x0004: hashes.SHA1(),
    0x000B: hashes.SHA256(),
    0x000C: hashes.SHA384(),
    0x000D: hashes.SHA512(),
}


def sign(message: bytes, key: Key, *, scheme: int | None = None, hash_id: int = 0x000B) -> bytes:
    """A TPMT_SIGNATURE."""
    algorithm = HASHES[hash_id]
    if isinstance(key, ec.EllipticCurvePrivateKey):
        size = (key.key_size + 7) // 8
        r, s = decode_dss_signature(key.sign(message, ec.ECDSA(algorithm)))
        return struct.pack(">HH", 0x0018, hash_id) + sized(r.to_bytes(size, "big")) + sized(s.to_bytes(size, "big"))
    scheme = scheme or 0x0014
    salted = padding.PSS(padding.MGF1(algorithm), padding.PSS.DIGEST_LENGTH)
    value = key.sign(message, padding.PKCS1v15() if scheme == 0x0014 else salted, algorithm)
    return struct.pack(">HH", scheme, hash_id) + sized(value)


@dataclass(frozen=True)
class Tpm:
    """One TPM with its attestation key. `area` its TPMT_PUBLIC, `chain` its certificates."""

    key: Key = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    attributes: int = 0x00050072
    chain: tuple[bytes, ...] = ()

    @property
    def area(self) -> bytes:
        return public_area(self.key.public_key(), attributes=self.attributes)

    @property
    def pin(self) -> frozenset[str]:
        return frozenset({parse_public(self.area).name_digest})

    def certified(self, maker: Maker, terms: Terms | None = None) -> "Tpm":
        return replace(self, chain=maker.chain(self.key.public_key(), terms))

    @property
    def signer(self) -> bytes:
        """Its qualified name: a primary key of the endorsement hierarchy."""
        return parse_public(self.area).qualified_name(bytes.fromhex("4000000b"))

    def evidence(
        self, extra: bytes, pcrs: Mapping[int, bytes] = ZERO_PCRS, *, message: bytes | None = None
    ) -> TpmEvidence:
        """`message` is signed instead of an honest quote."""
        message = quote(extra, pcrs, signer=self.signer) if message is None else message
        return TpmEvidence(message, sign(message, self.key), dict(pcrs), sized(self.area), self.chain)


def event(
    index: int, data: bytes, *, kind: int = 0x0D, algorithms: Sequence[int] = (0x000B,), digest: bytes | None = None
) -> bytes:
    """TCG_PCR_EVENT2, with the digests of its data."""
    digests = b""
    for algorithm in algorithms:
        name = {0x0004: "sha1", 0x000B: "sha256", 0x000C: "sha384"}[algorithm]
        value = hashlib.new(name, data).digest() if digest is None else digest
        digests += struct.pack("<H", algorithm) + value
    return struct.pack("<III", index, kind, len(algorithms)) + digests + struct.pack("<I", len(data)) + data


def event_log(*events: bytes, algorithms: Sequence[int] = (0x000B,), tail: bytes = b"", vendor: bytes = b"") -> bytes:
    sizes = {0x0004: 20, 0x000B: 32, 0x000C: 48}
    body = b"Spec ID Event03\0" + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, len(algorithms))
    body += b"".join(struct.pack("<HH", algorithm, sizes[algorithm]) for algorithm in algorithms)
    body += bytes([len(vendor)]) + vendor
    return struct.pack("<II", 0, 3) + bytes(20) + struct.pack("<I", len(body)) + body + b"".join(events) + tail


def extended(*measured: bytes, name: str = "sha256", start: bytes | None = None) -> bytes:
    """A register after one extend per argument."""
    value = bytes(hashlib.new(name).digest_size) if start is None else start
    for data in measured:
        value = hashlib.new(name, value + hashlib.new(name, data).digest()).digest()
    return value
