"""Synthetic P-384 certificate chains under a throw-away root, whole or wrong in one place."""

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

NOW = 1_800_000_000.0
DAY = 86_400.0


@dataclass(frozen=True)
class Link:
    """One certificate to be issued: `valid` in seconds before and after `NOW`."""

    name: str
    ca: bool = True
    path_length: int | None = None
    valid: tuple[float, float] = (DAY, DAY)
    curve: ec.EllipticCurve = field(default_factory=ec.SECP384R1)
    digest: hashes.HashAlgorithm = field(default_factory=hashes.SHA384)
    signs_data: bool | None = None
    signs_certificates: bool | None = None
    constraints: bool = True
    usage: bool = True
    extensions: tuple[tuple[x509.ExtensionType, bool], ...] = ()


@dataclass(frozen=True)
class Issued:
    """Certificates, root first, and their keys."""

    certificates: tuple[x509.Certificate, ...]
    keys: tuple[ec.EllipticCurvePrivateKey, ...]

    @property
    def ders(self) -> tuple[bytes, ...]:
        return tuple(certificate.public_bytes(Encoding.DER) for certificate in self.certificates)

    @property
    def root_sha256(self) -> str:
        return self.certificates[0].fingerprint(hashes.SHA256()).hex()


def changed(links: Sequence[Link], at: int, **changes: Any) -> tuple[Link, ...]:
    return tuple(replace(link, **changes) if i == at else link for i, link in enumerate(links))


def issue(links: Sequence[Link], *, names: Mapping[int, str] | None = None) -> Issued:
    """Each by the one before, the first by itself. `names`: another issuer's name than that one's, by position."""
    certificates: list[x509.Certificate] = []
    keys: list[ec.EllipticCurvePrivateKey] = []
    for at, link in enumerate(links):
        key = ec.generate_private_key(link.curve)
        issuer = (names or {}).get(at, links[max(at - 1, 0)].name)
        keys.append(key)
        certificates.append(_certificate(link, key, issuer, keys[max(at - 1, 0)]))
    return Issued(tuple(certificates), tuple(keys))


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _at(seconds: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(seconds, dt.UTC)


def _certificate(
    link: Link, key: ec.EllipticCurvePrivateKey, issuer: str, issuer_key: ec.EllipticCurvePrivateKey
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(link.name))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_at(NOW - link.valid[0]))
        .not_valid_after(_at(NOW + link.valid[1]))
    )
    if link.constraints:
        builder = builder.add_extension(x509.BasicConstraints(link.ca, link.path_length), critical=True)
    if link.usage:
        builder = builder.add_extension(_usage(link), critical=True)
    for extension, critical in link.extensions:
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(issuer_key, link.digest)  # type: ignore[arg-type]


def _usage(link: Link) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not link.ca if link.signs_data is None else link.signs_data,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=link.ca if link.signs_certificates is None else link.signs_certificates,
        crl_sign=link.ca,
        encipher_only=False,
        decipher_only=False,
    )


def raw_signature(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    size = (key.key_size + 7) // 8
    r, s = decode_dss_signature(key.sign(message, ec.ECDSA(hashes.SHA384())))
    return (r.to_bytes(size, "big") + s.to_bytes(size, "big")).rjust(96, b"\0")
