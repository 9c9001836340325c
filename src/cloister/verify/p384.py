"""P-384 as AWS and NVIDIA use it: a certificate chain to a pinned root, and raw signatures r || s with SHA-384."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import TypeGuard

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtensionOID, SignatureAlgorithmOID

from cloister.verify.certificates import basic_constraints, issued, key_usage
from cloister.verify.factors import Factor, failed, passed
from cloister.verify.platform import Expiry

__all__ = ["SIGNATURE_SIZE", "chain_expiries", "check_chain", "check_root", "check_signature"]

SIGNATURE_SIZE = 96

_UNDERSTOOD = frozenset({ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.KEY_USAGE})
"""Critical extensions that are judged here; RFC 5280, section 4.2, has every other one refused."""


def check_root(root: x509.Certificate, pinned_sha256: str, *, vendor: str) -> Factor:
    """The last certificate of a chain is the pinned one, by SHA-256 of its DER."""
    got = hashlib.sha256(root.public_bytes(Encoding.DER)).hexdigest()
    if got == pinned_sha256:
        return passed("evidence.root", got)
    hint = f"Whoever made this evidence, it was not {vendor}: the chain ends in another root, or before the root."
    return failed("evidence.root", expected=pinned_sha256, got=got, hint=hint)


def check_chain(chain: Sequence[x509.Certificate], now: float) -> Factor:
    """`chain` from the signing certificate to the root: RFC 5280, section 6.1, as far as these vendors need it.

    Each is signed by the next (names, ECDSA with SHA-384), has a P-384 key and is valid at `now`; each but the first
    may sign certificates (basicConstraints, keyUsage) and allows as many below it (pathLen); the first may sign data
    and no certificates; no critical extension is unknown.

    Does not check: whether the last one is to be believed (`check_root`), revocation.
    """
    faults = [fault for at in range(len(chain)) for fault in _faults(chain, at, now)]
    if not faults:
        return passed("evidence.chain", f"{len(chain)} certificates")
    hint = "Expired, not valid yet, or a clock is wrong." if all("valid" in f for f in faults) else "A forged chain."
    return failed("evidence.chain", expected="a valid chain", got="; ".join(faults)[:400], hint=hint)


def check_signature(signer: x509.Certificate, signature: bytes, message: bytes, *, hint: str) -> Factor:
    """`signature` is r || s, 96 bytes, big-endian; ECDSA on P-384 with SHA-384 over `message`."""
    step = "evidence.signature"
    key = signer.public_key()
    if not _is_p384(key):
        return failed(step, expected="a P-384 key", got="another kind of key", hint="A forged certificate.")
    if len(signature) != SIGNATURE_SIZE:
        return failed(step, expected=f"{SIGNATURE_SIZE} bytes", got=str(len(signature)), hint=hint)
    r, s = (int.from_bytes(half, "big") for half in (signature[:48], signature[48:]))
    try:
        key.verify(encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return failed(step, expected="signed by the certificate's key", got="another signature", hint=hint)
    return passed(step, "ECDSA P-384 SHA-384")


def chain_expiries(chain: Sequence[x509.Certificate], *, what: str) -> tuple[Expiry, ...]:
    """`what` names the signing certificate; those above it are numbered."""
    return tuple(
        Expiry(f"{what} certificate" if at == 0 else f"{what} CA certificate {at}", end.timestamp())
        for at, end in enumerate(certificate.not_valid_after_utc for certificate in chain)
    )


def _faults(chain: Sequence[x509.Certificate], at: int, now: float) -> Iterator[str]:
    certificate, name = chain[at], f"certificate {at + 1} of {len(chain)}"
    issuer = chain[at + 1] if at + 1 < len(chain) else None
    if issuer is not None and not _issued_with_p384(certificate, issuer):
        yield f"{name} is not signed by the next"
    if not _is_p384(certificate.public_key()):
        yield f"{name} has no P-384 key"
    if not certificate.not_valid_before_utc.timestamp() <= now <= certificate.not_valid_after_utc.timestamp():
        yield f"{name} is valid {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} to {certificate.not_valid_after_utc:%Y-%m-%d %H:%M}"
    if any(extension.critical and extension.oid not in _UNDERSTOOD for extension in certificate.extensions):
        yield f"{name} has an unknown critical extension"
    if not (_may_sign_data(certificate) if at == 0 else _may_sign_certificates(certificate, below=at - 1)):
        yield f"{name} may not sign {'data' if at == 0 else 'the one below it'}"


def _issued_with_p384(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    algorithm = certificate.signature_algorithm_oid
    return algorithm == SignatureAlgorithmOID.ECDSA_WITH_SHA384 and issued(certificate, issuer)


def _is_p384(key: object) -> TypeGuard[ec.EllipticCurvePublicKey]:
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1)


def _may_sign_data(certificate: x509.Certificate) -> bool:
    """RFC 5280, section 4.2.1.9: without basicConstraints it is no CA."""
    constraints, usage = basic_constraints(certificate), key_usage(certificate)
    is_ca = constraints is not None and constraints.ca
    return not is_ca and usage is not None and usage.digital_signature and not usage.key_cert_sign


def _may_sign_certificates(certificate: x509.Certificate, *, below: int) -> bool:
    """`below`: how many CA certificates stand between this one and the signing certificate."""
    constraints, usage = basic_constraints(certificate), key_usage(certificate)
    if constraints is None or usage is None or not constraints.ca or not usage.key_cert_sign:
        return False
    return constraints.path_length is None or below <= constraints.path_length
