"""Who signed Intel's evidence: PCK chain, TCB signing chain, revocation lists, each judged against one root.

Profiles of Intel's "SGX PCK Certificate and Certificate Revocation List Profile Specification", section 1.3: the root
issues the PCK CAs (Processor, Platform) and the TCB signer, a PCK CA issues the platforms' PCK certificates.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.x509.oid import NameOID

from cloister.errors import MalformedEvidence
from cloister.verify.certificates import MALFORMED, crl_number, issued, load_certificate
from cloister.verify.factors import Factor, failed, passed
from cloister.verify.platform import ISSUED, Expiry
from cloister.verify.policy import Limits

__all__ = [
    "Crl",
    "Signers",
    "check_chains",
    "check_crls",
    "check_revoked",
    "check_root",
    "crl_counters",
    "expiries",
    "load_crl",
    "load_signers",
    "signs",
    "validity",
]

_PCK_CAS = MappingProxyType({"Intel SGX PCK Processor CA": "processor", "Intel SGX PCK Platform CA": "platform"})
_TCB_SIGNER = "Intel SGX TCB Signing"
_DAY = 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Signers:
    """Every certificate that the verification rests on. `roots` are the roots that the chains bring along, as DER."""

    pck: x509.Certificate
    pck_ca: x509.Certificate
    root: x509.Certificate
    tcb: x509.Certificate
    qe: x509.Certificate
    roots: frozenset[bytes]

    def named(self) -> tuple[tuple[str, x509.Certificate], ...]:
        """Every different one with its name."""
        signers = [("TCB signing certificate", self.tcb)]
        if self.qe is not self.tcb:
            signers.append(("QE identity signing certificate", self.qe))
        return (
            ("PCK certificate", self.pck),
            ("PCK CA certificate", self.pck_ca),
            *signers,
            ("root certificate", self.root),
        )


@dataclass(frozen=True, slots=True)
class Crl:
    """A revocation list whose dates and number could be read."""

    name: str
    crl: x509.CertificateRevocationList
    this_update: float
    next_update: float
    number: int


def load_signers(pck: tuple[bytes, ...], tcb: tuple[bytes, ...], qe: tuple[bytes, ...]) -> Signers:
    """From three chains as DER, leaf first, each with its root.

    Raises: MalformedEvidence for a chain of another length, and for what is not a certificate.
    """
    for chain, size, what in ((pck, 3, "the PCK chain"), (tcb, 2, "the TCB signing chain"), (qe, 2, "the QE chain")):
        if len(chain) != size:
            got = str(len(chain))
            raise MalformedEvidence(f"{what} has another length.", step="evidence.chain", expected=str(size), got=got)
    tcb_signer = load_certificate(tcb[0], what="TCB signing certificate")
    return Signers(
        pck=load_certificate(pck[0], what="PCK certificate"),
        pck_ca=load_certificate(pck[1], what="PCK CA certificate"),
        root=load_certificate(pck[2], what="root certificate"),
        tcb=tcb_signer,
        qe=tcb_signer if qe[0] == tcb[0] else load_certificate(qe[0], what="QE identity signing certificate"),
        roots=frozenset({pck[-1], tcb[-1], qe[-1]}),
    )


def load_crl(data: bytes, *, name: str) -> Crl:
    """DER. Raises: MalformedEvidence; also for a list without a next update or number, or of limited scope."""
    what = f"the {name}"
    try:
        crl = x509.load_der_x509_crl(data)
        number = crl_number(crl)
        strict = data.endswith(b"\0" + crl.signature)
        limited = any(extension.critical for extension in crl.extensions)
        next_update = crl.next_update_utc
        this_update, _ = crl.last_update_utc.timestamp(), crl.issuer
    except (*MALFORMED, x509.ExtensionNotFound) as error:
        raise MalformedEvidence(f"{what} is not a revocation list.", step="evidence.crl") from error
    if limited or next_update is None or number is None:
        raise MalformedEvidence(f"{what} is of limited scope, without a number, or never ends.", step="evidence.crl")
    if not strict:
        raise MalformedEvidence(f"{what} is not strictly encoded.", step="evidence.crl")
    return Crl(name, crl, this_update, next_update.timestamp(), number)


def signs(key: object, signature: bytes, message: bytes) -> bool:
    """ECDSA with SHA-256; `signature` is r || s, 64 bytes. The curve is judged with the certificate."""
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return False
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    try:
        key.verify(encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def check_root(signers: Signers, root_sha256: str) -> Factor:
    """Every chain ends in the one root, byte for byte."""
    got = sorted(hashlib.sha256(root).hexdigest() for root in signers.roots)
    if got == [root_sha256]:
        return passed("evidence.root", root_sha256)
    hint = "Made under another root: a simulation, a test machine, or a forgery. Nothing in it can be believed."
    return failed("evidence.root", expected=root_sha256, got=" ".join(got), hint=hint)


def check_chains(signers: Signers) -> Iterator[Factor]:
    """Each certificate was signed by the next, and is of the kind that stands in its place. Not their
    validity, nor the root, which is known byte for byte."""
    ca_fits = _is_ca(signers.pck_ca) and _cn(signers.pck_ca) in _PCK_CAS
    links = [
        ("PCK certificate", signers.pck, signers.pck_ca, _is_pck(signers.pck)),
        ("PCK CA certificate", signers.pck_ca, signers.root, ca_fits),
        ("TCB signing certificate", signers.tcb, signers.root, _is_tcb_signer(signers.tcb)),
    ]
    if signers.qe is not signers.tcb:
        links.append(("QE identity signing certificate", signers.qe, signers.root, _is_tcb_signer(signers.qe)))
    broken = [_broken(*link) for link in links]
    wrong = [factor for factor in broken if factor is not None]
    yield from wrong or [passed("evidence.chain", f"{_cn(signers.pck_ca)}, serial {signers.pck.serial_number:x}")]


def _broken(name: str, certificate: x509.Certificate, issuer: x509.Certificate, right_kind: bool) -> Factor | None:
    if not issued(certificate, issuer):
        hint = "The chain of certificates is broken: it was put together from pieces, or changed."
        return failed("evidence.chain", expected=f"{name} signed by {_cn(issuer)}", got="another signature", hint=hint)
    if not right_kind:
        hint = "A certificate stands where its kind may not: it was issued for something else."
        return failed("evidence.chain", expected=name, got=_cn(certificate) or "nameless", hint=hint)
    return None


def _cn(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return ascii(names[0].value)[1:-1][:64] if names else ""


def _p256(certificate: x509.Certificate) -> bool:
    key = certificate.public_key()
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)


def _usage(certificate: x509.Certificate) -> tuple[bool, bool, bool]:
    """(is a CA, may sign certificates, may sign data)"""
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return False, False, False
    return constraints.ca, usage.key_cert_sign, usage.digital_signature


def _is_ca(certificate: x509.Certificate) -> bool:
    return _p256(certificate) and _usage(certificate)[:2] == (True, True)


def _is_pck(certificate: x509.Certificate) -> bool:
    return _p256(certificate) and _usage(certificate) == (False, False, True)


def _is_tcb_signer(certificate: x509.Certificate) -> bool:
    return _is_pck(certificate) and _cn(certificate) == _TCB_SIGNER


def validity(signers: Signers) -> Iterator[tuple[str, float, float]]:
    """(what, from, until), in Unix seconds."""
    for name, certificate in signers.named():
        yield name, certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()


def expiries(signers: Signers) -> tuple[Expiry, ...]:
    return tuple(Expiry(name, until) for name, _, until in validity(signers))


def check_crls(pck_crl: Crl, root_crl: Crl, signers: Signers, limits: Limits, now: float) -> Iterator[Factor]:
    """Each list was signed by the CA whose certificates it names, and is no older than the policy allows."""
    wrong = False
    for crl, issuer in ((pck_crl, signers.pck_ca), (root_crl, signers.root)):
        if not _signed_list(crl.crl, issuer):
            wrong = True
            hint = "A revocation list of another CA says nothing about these certificates. Fetch the collateral afresh."
            yield failed("evidence.crl", expected=f"{crl.name} signed by {_cn(issuer)}", got="another", hint=hint)
        age = (now - crl.this_update) / _DAY
        if limits.max_crl_age_days is not None and age > limits.max_crl_age_days:
            wrong = True
            hint = "Fetch the collateral afresh, or raise limits.max_crl_age_days."
            expected = f"{crl.name} of at most {limits.max_crl_age_days} days"
            yield failed("evidence.crl", expected=expected, got=f"{age:.1f} days", hint=hint)
    if not wrong:
        yield passed("evidence.crl", f"numbers {pck_crl.number} and {root_crl.number}")


def _signed_list(crl: x509.CertificateRevocationList, issuer: x509.Certificate) -> bool:
    key = issuer.public_key()
    try:
        return (
            crl.issuer == issuer.subject and isinstance(key, ec.EllipticCurvePublicKey) and crl.is_signature_valid(key)
        )
    except MALFORMED:
        return False


def crl_counters(pck_crl: Crl, root_crl: Crl, signers: Signers) -> Iterator[tuple[str, int]]:
    """Per CA, each list's number and when it was issued, in Unix seconds: Intel gives every list the number 1."""
    pck = f"pck-crl-{_PCK_CAS.get(_cn(signers.pck_ca), 'unknown')}"
    for name, crl in ((pck, pck_crl), ("root-crl", root_crl)):
        yield name, crl.number
        yield f"{name}{ISSUED}", int(crl.this_update)


def check_revoked(pck_crl: Crl, root_crl: Crl, signers: Signers) -> Iterator[Factor]:
    """No certificate stands on the list of the CA that issued it."""
    wrong = False
    for name, certificate in signers.named():
        crl = pck_crl if certificate is signers.pck else root_crl
        if _listed(crl.crl, certificate.serial_number):
            wrong = True
            hint = "Intel has withdrawn this certificate: its key may be known to others. This machine cannot be used."
            got = f"{name}, serial {certificate.serial_number:x}"
            yield failed("evidence.revoked", expected="certificates that stand", got=got, hint=hint)
    if not wrong:
        yield passed("evidence.revoked", "no certificate revoked")


def _listed(crl: x509.CertificateRevocationList, serial: int) -> bool:
    """A list that cannot be read to its end might name anything."""
    try:
        return crl.get_revoked_certificate_by_serial_number(serial) is not None
    except MALFORMED:
        return True
