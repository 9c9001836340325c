"""X.509 as far as hardware vendors use it: load, and check one link. Chains are walked by each platform's verifier."""

from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.utils import CryptographyDeprecationWarning

from cloister.errors import MalformedEvidence
from cloister.verify.factors import Factor, failed, passed

__all__ = [
    "MALFORMED",
    "basic_constraints",
    "check_leaf",
    "crl_number",
    "issued",
    "key_usage",
    "load_certificate",
    "public_key_p384",
]

MALFORMED = (
    ValueError,
    TypeError,
    UserWarning,  # names against X.520's lengths, where warnings are errors
    UnsupportedAlgorithm,
    CryptographyDeprecationWarning,  # an exception where warnings are errors; what it warns of is refused below
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""What pyca raises on reading bytes that are no certificate or revocation list."""

_LONGEST_NUMBER = 160  # bits; RFC 5280, section 5.2.3
_REMEMBERED = 256
"""Certificates, and links between two: the vendors' own stand in every document. Both are what their bytes make them."""


def load_certificate(data: bytes, *, what: str) -> x509.Certificate:
    """DER, whose names, extensions and key can be read too (pyca reads them lazily).

    Stricter than pyca: the serial number is positive (RFC 5280, section 4.1.2.2), and the signature's bit string has no
    unused bits, which pyca would ignore: the certificate has one encoding.

    Raises: MalformedEvidence.
    """
    try:
        certificate, strict = _load(data)
    except MALFORMED as error:
        raise MalformedEvidence(f"{what} is not an X.509 certificate.", step=what) from error
    if not strict:
        raise MalformedEvidence(f"{what} is not strictly encoded.", step=what)
    return certificate


@lru_cache(_REMEMBERED)
def _load(data: bytes) -> tuple[x509.Certificate, bool]:
    certificate = x509.load_der_x509_certificate(data)
    _ = certificate.extensions, certificate.public_key(), certificate.subject, certificate.issuer
    _ = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return certificate, certificate.serial_number > 0 and data.endswith(b"\0" + certificate.signature)


def crl_number(crl: x509.CertificateRevocationList) -> int | None:
    """None where the list has none. Raises: ValueError for one that is longer than 20 octets (RFC 5280, section 5.2.3)."""
    try:
        number = crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except x509.ExtensionNotFound:
        return None
    if number.bit_length() > _LONGEST_NUMBER:
        raise ValueError("a number that is none")
    return number


def public_key_p384(certificate: x509.Certificate, *, what: str) -> ec.EllipticCurvePublicKey:
    """Raises: MalformedEvidence for a key of another kind."""
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise MalformedEvidence(f"{what} has no P-384 key.", step=what)
    return key


@lru_cache(_REMEMBERED)
def issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """The issuer's name and key signed the certificate, whatever both may be."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, *MALFORMED):
        return False
    return True


def basic_constraints(certificate: x509.Certificate) -> x509.BasicConstraints | None:
    """RFC 5280, section 4.2.1.9; None where it has none: then it is no CA."""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:
        return None


def key_usage(certificate: x509.Certificate) -> x509.KeyUsage | None:
    """RFC 5280, section 4.2.1.3; None where it has none."""
    try:
        return certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return None


def _valid_at(certificate: x509.Certificate, now: float) -> bool:
    return certificate.not_valid_before_utc.timestamp() <= now <= certificate.not_valid_after_utc.timestamp()


def _signs_only_data(certificate: x509.Certificate) -> bool:
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return False
    return not constraints.ca and usage.digital_signature and not usage.key_cert_sign


def check_leaf(step: str, leaf: x509.Certificate, issuer: x509.Certificate, now: float) -> Factor:
    """The leaf was signed by `issuer` itself, both are valid at `now`, and the leaf may sign data, not certificates.

    Does not check: whether `issuer` is to be believed, revocation.
    """
    serial = f"serial {leaf.serial_number:x}"
    if not issued(leaf, issuer):
        return failed(step, expected="signed by the trusted root", got=serial, hint="Another root made this evidence.")
    if not _valid_at(leaf, now) or not _valid_at(issuer, now):
        return failed(step, expected="valid now", got=serial, hint="Expired, not valid yet, or a clock is wrong.")
    if not _signs_only_data(leaf):
        return failed(step, expected="a certificate for signing reports", got=serial)
    return passed(step, serial)
