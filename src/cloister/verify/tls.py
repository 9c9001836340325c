"""A TLS server's certificate, held against what a verified enclave says of the key that ends TLS inside it."""

import hashlib
import hmac
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister.errors import NotTrusted, WrongUse
from cloister.verify.certificates import basic_constraints, load_certificate
from cloister.verify.document import CLOCK_TOLERANCE
from cloister.verify.verified import Verified

__all__ = ["LONGEST_LIFE", "check_certificate"]

LONGEST_LIFE = 25 * 3600.0
"""Seconds; an enclave makes a new one every day."""


def check_certificate(der: bytes, verified: Verified, now: float) -> x509.Certificate:
    """Its key must be the attested one; then it must be no authority, valid `now` (Unix seconds), and for a day at most.

    The server must have proved that it has the key, as in every handshake. Does not look at the names in it.

    Raises: MalformedEvidence, WrongUse for an enclave without TLS; NotTrusted.
    """
    attested = verified.statement.tls_spki
    if attested is None:
        raise WrongUse("This enclave has no TLS listener.", step="tls", hint="Its owner starts one with --tls.")
    certificate = load_certificate(der, what="tls")
    spki = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    got = hashlib.sha256(spki).hexdigest()
    if not hmac.compare_digest(got, attested):
        hint = "Somebody in between ends TLS and could read everything, or this is another server's address."
        raise NotTrusted("The TLS key is not the enclave's.", step="tls.key", expected=attested, got=got, hint=hint)
    constraints = basic_constraints(certificate)
    if constraints is None or constraints.ca:
        raise NotTrusted(
            "The certificate could vouch for other servers.", step="tls.authority", hint="Do not import it."
        )
    born, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if (ends - born).total_seconds() > LONGEST_LIFE:
        expected, got = f"at most {LONGEST_LIFE / 3600:.0f} h", f"{(ends - born).total_seconds() / 3600:.0f} h"
        raise NotTrusted("The certificate is valid for too long.", step="tls.lifetime", expected=expected, got=got)
    if not born.timestamp() - CLOCK_TOLERANCE <= now <= ends.timestamp():
        when = datetime.fromtimestamp(now, UTC).isoformat(" ", "minutes")
        hint = "Set this machine's clock. If it is right, the enclave's is wrong."
        got = f"{born:%Y-%m-%d %H:%M} to {ends:%Y-%m-%d %H:%M} UTC"
        raise NotTrusted("The certificate is not valid now.", step="tls.time", expected=when, got=got, hint=hint)
    return certificate
