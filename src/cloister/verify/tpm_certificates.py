"""Chains above a TPM's keys: from an attestation or endorsement key's certificate to a pinned root, with its revocation lists."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtensionOID

from cloister.errors import MalformedEvidence
from cloister.verify.certificates import MALFORMED, basic_constraints, crl_number, issued, key_usage, load_certificate
from cloister.verify.factors import Factor, failed, not_checked, passed
from cloister.verify.platform import Expiry
from cloister.verify.policy import Policy

__all__ = ["ATTESTATION_KEY", "ENDORSEMENT_KEY", "PROVIDER_ROOTS", "Chain", "Purpose", "judge_chain"]

PROVIDER_ROOTS = frozenset(
    {
        # Azure Virtual TPM Root Certificate Authority 2023, until 2048:
        # http://www.microsoft.com/pkiops/certs/Azure%20Virtual%20TPM%20Root%20Certificate%20Authority%202023.crt
        "e6c596b17f8ffefba5c300f714cfb1260c6028704ecf7becc4ab5018efb00e95",
        # Google Cloud "EK/AK CA Root", until 2122; also server/ca-certs/gcp_ek_ak_ca_root.crt of google/go-tpm-tools:
        # http://privateca-content-62d71773-0000-21da-852e-f4f5e80d7778.storage.googleapis.com/032bf9d39db4fa06aade/ca.crt
        "594759594b9b61524f6c8ef668f7177f7b9066bc0674f2f49fe9e052be78beb2",
    }
)
"""SHA-256 of the DER of the roots above the cloud providers' virtual TPMs. No manufacturer of TPM chips is pinned."""

MAX_CRL = 1024 * 1024
_MAX_CHAIN = 6
_DAY = 86400.0
_STRONG = (hashes.SHA256, hashes.SHA384, hashes.SHA512)
_UNDERSTOOD = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
        ExtensionOID.CERTIFICATE_POLICIES,
    }
)
"""Extensions that may be critical. Alternative names and policies say who the key's TPM is; nothing here rests on them."""


@dataclass(frozen=True, slots=True)
class Purpose:
    """What the leaf must be for: a key usage, and the TCG's extended one where it names any."""

    name: str
    usages: tuple[str, ...]
    extended: x509.ObjectIdentifier


ATTESTATION_KEY = Purpose("an attestation key", ("digital_signature",), x509.ObjectIdentifier("2.23.133.8.3"))
ENDORSEMENT_KEY = Purpose(
    "an endorsement key", ("key_encipherment", "key_agreement"), x509.ObjectIdentifier("2.23.133.8.1")
)


@dataclass(frozen=True, slots=True)
class Chain:
    """What became of a chain: its leaf (to be believed only when no factor failed), factors, ends and list numbers."""

    leaf: x509.Certificate
    factors: tuple[Factor, ...]
    expiries: tuple[Expiry, ...]
    counters: Mapping[str, int]


def judge_chain(
    certificates: Sequence[bytes],
    crls: Sequence[bytes],
    *,
    purpose: Purpose,
    roots: frozenset[str],
    policy: Policy,
    now: float,
) -> Chain:
    """Judge DER certificates, the leaf first and the root last, and the DER revocation lists that came with them.

    (1) the last certificate is a pinned root, by the SHA-256 of its bytes
    (2) each certificate is valid now, and signed by the next one, which may sign certificates (RFC 5280, section 6.1),
        with SHA-256 or better and no key under 2048 bits; the leaf is for `purpose` and no CA
    (3) each certificate that names a revocation list is looked up in one, signed by its issuer and current

    Does not check: names and policies in the certificates, nor lists that no certificate names.

    Raises: MalformedEvidence for certificates or lists that are none.
    """
    if not 0 < len(certificates) <= _MAX_CHAIN:
        raise MalformedEvidence("The TPM's certificate chain is empty, or too long.", step="tpm.certificates")
    chain = [load_certificate(der, what="tpm.certificates") for der in certificates]
    lists = [_load_crl(der) for der in crls]
    expiries = [Expiry(f"certificate of {_subject(one)}", one.not_valid_after_utc.timestamp()) for one in chain]
    used, crl_factor = _check_crls(chain, lists, policy, now)
    expiries += [Expiry(f"revocation list of {_issuer(one)}", _until(one)) for one in used]
    factors = (
        _check_root(chain[-1], roots),  # (1)
        _check_links(chain, purpose, now),  # (2)
        crl_factor,  # (3)
    )
    return Chain(chain[0], factors, tuple(expiries), MappingProxyType(dict(_numbers(used))))


def _subject(certificate: x509.Certificate) -> str:
    return ascii(certificate.subject.rfc4514_string())[1:-1][:120] or f"serial {certificate.serial_number:x}"


def _issuer(crl: x509.CertificateRevocationList) -> str:
    return ascii(crl.issuer.rfc4514_string())[1:-1][:120]


def _check_root(root: x509.Certificate, roots: frozenset[str]) -> Factor:
    got = hashlib.sha256(root.public_bytes(Encoding.DER)).hexdigest()
    if got in roots:
        return passed("evidence.root", got)
    hint = "Somebody else than a known provider certified this TPM. The chain must end with the provider's own root."
    return failed("evidence.root", expected=" or ".join(sorted(roots)) or "no root is trusted", got=got, hint=hint)


def _check_links(chain: Sequence[x509.Certificate], purpose: Purpose, now: float) -> Factor:
    wrong = [*_wrong_leaf(chain[0], purpose)]
    if len(chain) < 2:
        wrong.append("a certificate without an issuer")
    for certificate in chain:
        wrong += [f"{_subject(certificate)}: {fault}" for fault in _wrong_certificate(certificate, now)]
    for depth, (certificate, issuer) in enumerate(pairwise(chain)):
        wrong += [f"{_subject(certificate)}: {fault}" for fault in _wrong_link(certificate, issuer, depth)]
    if not wrong:
        return passed("evidence.chain", " <- ".join(_subject(certificate) for certificate in chain))
    hint = "A certificate has expired, a clock is wrong, or the chain was put together by somebody else."
    return failed("evidence.chain", expected=f"a valid chain above {purpose.name}", got="; ".join(wrong), hint=hint)


def _wrong_certificate(certificate: x509.Certificate, now: float) -> Iterator[str]:
    if not certificate.not_valid_before_utc.timestamp() <= now <= certificate.not_valid_after_utc.timestamp():
        yield "expired, or not valid yet"
    key = certificate.public_key()
    if not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey) or key.key_size < (
        2048 if isinstance(key, rsa.RSAPublicKey) else 256
    ):
        yield "a weak key"
    if not _is_strong(certificate):
        yield "a weak signature algorithm"
    unknown = [one.oid.dotted_string for one in certificate.extensions if one.critical and one.oid not in _UNDERSTOOD]
    if unknown:
        yield f"critical extension {unknown[0]}"


def _is_strong(signed: x509.Certificate | x509.CertificateRevocationList) -> bool:
    try:
        return isinstance(signed.signature_hash_algorithm, _STRONG)
    except (UnsupportedAlgorithm, ValueError, TypeError):
        return False


def _wrong_link(certificate: x509.Certificate, issuer: x509.Certificate, depth: int) -> Iterator[str]:
    if not issued(certificate, issuer):
        yield "not signed by the next certificate"
    constraints, usage = basic_constraints(issuer), key_usage(issuer)
    if constraints is None or not constraints.ca or usage is None or not usage.key_cert_sign:
        yield "issued by something that is no CA"
    elif constraints.path_length is not None and constraints.path_length < depth:
        yield "more CAs than its issuer allows"


def _wrong_leaf(leaf: x509.Certificate, purpose: Purpose) -> Iterator[str]:
    constraints, usage = basic_constraints(leaf), key_usage(leaf)
    if constraints is not None and constraints.ca:
        yield "the key's certificate is a CA's"
    if usage is None or usage.key_cert_sign or not any(getattr(usage, name) for name in purpose.usages):
        yield f"the certificate is not for {purpose.name}"
    try:
        extended = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return  # Google's have none
    if purpose.extended not in extended:
        yield f"the certificate is not for {purpose.name}"


def _load_crl(der: bytes) -> x509.CertificateRevocationList:
    if len(der) > MAX_CRL:
        raise MalformedEvidence("A TPM's revocation list is over 1 MiB.", step="tpm.crl")
    try:
        crl = x509.load_der_x509_crl(der)
        _ = crl.extensions, crl.issuer, crl.next_update_utc, crl.last_update_utc
        _ = crl_number(crl)
        strict = der.endswith(b"\0" + crl.signature)
    except MALFORMED as error:
        raise MalformedEvidence("A TPM's revocation list is not one.", step="tpm.crl") from error
    if not strict:
        raise MalformedEvidence("A TPM's revocation list is not strictly encoded.", step="tpm.crl")
    return crl


def _check_crls(
    chain: Sequence[x509.Certificate], lists: Sequence[x509.CertificateRevocationList], policy: Policy, now: float
) -> tuple[list[x509.CertificateRevocationList], Factor]:
    used: list[x509.CertificateRevocationList] = []
    missing: list[str] = []
    wrong: list[str] = []
    for certificate, issuer in pairwise(chain):
        if not _names_a_list(certificate):
            continue
        crl = next((one for one in lists if _signed_by(one, issuer)), None)
        if crl is None:
            missing.append(_subject(certificate))
            continue
        used.append(crl)
        wrong += _wrong_list(crl, policy, now)
        if crl.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None:
            wrong.append(f"revoked: {_subject(certificate)}")
    if wrong:
        hint = "A certificate was withdrawn, or its revocation list is too old: fetch the list again."
        return used, failed("evidence.crl", expected="current lists, nothing revoked", got="; ".join(wrong), hint=hint)
    if missing and not policy.limits.dangerously_allow_missing_crl:
        hint = "No revocation list came with the evidence. To accept that: dangerously_allow_missing_crl = true"
        return used, failed("evidence.crl", expected="a revocation list", got=f"none for {missing[0]}", hint=hint)
    if missing:
        return used, not_checked("evidence.crl", "No revocation list came with the evidence; the policy allows that.")
    if not used:
        return used, not_checked("evidence.crl", "The provider publishes no revocation list for these certificates.")
    return used, passed("evidence.crl", f"{len(used)} revocation lists")


def _names_a_list(certificate: x509.Certificate) -> bool:
    return any(one.oid == ExtensionOID.CRL_DISTRIBUTION_POINTS for one in certificate.extensions)


def _signed_by(crl: x509.CertificateRevocationList, issuer: x509.Certificate) -> bool:
    key = issuer.public_key()
    if crl.issuer != issuer.subject or not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
        return False
    usage = key_usage(issuer)
    try:
        # Microsoft's intermediate may not sign lists, its root may; an absent usage would allow anything.
        return usage is not None and usage.crl_sign and crl.is_signature_valid(key)
    except (UnsupportedAlgorithm, ValueError, TypeError):
        return False


def _wrong_list(crl: x509.CertificateRevocationList, policy: Policy, now: float) -> Iterator[str]:
    since, age = crl.last_update_utc.timestamp(), policy.limits.max_crl_age_days
    if not since <= now <= _until(crl):
        yield f"not current: the list of {_issuer(crl)}"
    if age is not None and now - since > age * _DAY:
        yield f"older than {age} days: the list of {_issuer(crl)}"
    if any(one.critical for one in crl.extensions):
        yield f"a partial list of {_issuer(crl)}"
    if not _is_strong(crl):
        yield f"a weak signature on the list of {_issuer(crl)}"


def _until(crl: x509.CertificateRevocationList) -> float:
    return crl.next_update_utc.timestamp() if crl.next_update_utc is not None else 0.0


def _numbers(used: Sequence[x509.CertificateRevocationList]) -> Iterator[tuple[str, int]]:
    for crl in used:
        if (number := crl_number(crl)) is not None:
            yield f"tpm-crl {_issuer(crl)}", number
