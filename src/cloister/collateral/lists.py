"""Certificate revocation lists (RFC 5280, section 5), as both vendors sign them."""

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.utils import CryptographyDeprecationWarning

from cloister.collateral.pieces import Answer, Key, Piece, check_fresh, refuse
from cloister.errors import MalformedEvidence

__all__ = ["check_list"]

_MALFORMED = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    CryptographyDeprecationWarning,  # an exception where warnings are errors
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


def check_list(key: Key, answer: Answer, issuer: x509.Certificate, now: float) -> Piece:
    """A DER list, signed by `issuer`, of unlimited scope, fresh.

    Raises: MalformedEvidence, NotTrusted.
    """
    signer = issuer.public_key()
    if not isinstance(signer, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
        raise MalformedEvidence(f"The issuer of {key} has a key of another kind.", step=f"collateral.{key.kind}")
    try:
        crl = x509.load_der_x509_crl(answer.body)
        genuine = crl.issuer == issuer.subject and crl.is_signature_valid(signer)
        strict = answer.body.endswith(
            b"\0" + crl.signature
        )  # a bit string without unused bits, which pyca would ignore
        limited = any(extension.critical for extension in crl.extensions)
        revoked = frozenset(entry.serial_number for entry in crl)
        issued, next_update = crl.last_update_utc.timestamp(), crl.next_update_utc
    except _MALFORMED as error:
        raise MalformedEvidence(f"{key} is not a revocation list.", step=f"collateral.{key.kind}") from error
    if not strict:
        raise MalformedEvidence(f"{key} is not strictly encoded.", step=f"collateral.{key.kind}")
    if not genuine:
        raise refuse(key, f"{key} is not signed by its issuer.")
    if limited or next_update is None:
        raise MalformedEvidence(f"{key} is of limited scope, or never ends.", step=f"collateral.{key.kind}")
    check_fresh(key, issued, next_update.timestamp(), now)
    return Piece(key, answer, issued, next_update.timestamp(), revoked)
