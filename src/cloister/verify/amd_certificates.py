"""AMD's certificates: ARK, ASK or ASVK, VCEK or VLEK, and the ARK's revocation list (57230, "VCEK Certificate and KDS
Interface Specification")."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import ExtensionOID, SignatureAlgorithmOID

from cloister.errors import MalformedEvidence
from cloister.evidence.sev_snp import LAYOUTS, pem_or_der_crl
from cloister.verify.certificates import basic_constraints, crl_number, issued, key_usage, load_certificate
from cloister.verify.factors import Factor, failed, not_checked, passed
from cloister.verify.platform import Expiry
from cloister.verify.policy import Policy

__all__ = [
    "RESERVED_SPL",
    "Endorsed",
    "chain_expiries",
    "check_chain",
    "check_crl",
    "check_root",
    "crl_counters",
    "load_chain",
    "load_crl",
    "read_extensions",
]

_CHAIN = ("leaf", "ASK", "ARK")
_UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
_UNDERSTOOD = frozenset({ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.KEY_USAGE})
"""Critical extensions that are judged here; RFC 5280, section 4.2, has every other one refused."""

_AMD = "1.3.6.1.4.1.3704.1."
_PRODUCT_NAME, _HWID, _CSP_ID = _AMD + "2", _AMD + "4", _AMD + "5"
_SPL: Mapping[str, str] = MappingProxyType(
    {
        "bootloader": _AMD + "3.1",
        "tee": _AMD + "3.2",
        "snp": _AMD + "3.3",
        "spl4": _AMD + "3.4",
        "spl5": _AMD + "3.5",
        "spl6": _AMD + "3.6",
        "spl7": _AMD + "3.7",
        "microcode": _AMD + "3.8",
        "fmc": _AMD + "3.9",
    }
)
RESERVED_SPL = frozenset({"spl4", "spl5", "spl6", "spl7"})
"""Left out of some certificates; zero then."""

_DAY = 86_400.0
_HWID_SIZES: Mapping[str, int] = MappingProxyType({"Milan": 64, "Genoa": 64, "Turin": 8})


@dataclass(frozen=True, slots=True)
class Endorsed:
    """What the leaf says about the chip (AMD 57230, "VCEK Certificate Extensions", "VLEK …"): None where it does not.

    `product` without its stepping ("Milan-B0"). `tcb` has the values by name. `faults`: values of another form.
    """

    product: str | None
    tcb: Mapping[str, int]
    hwid: bytes | None
    csp_id: str | None
    faults: tuple[str, ...]


def load_chain(chain: Sequence[bytes]) -> tuple[x509.Certificate, x509.Certificate, x509.Certificate]:
    """Three DER certificates: leaf, ASK or ASVK, ARK. Does not check anything but their form. Raises: MalformedEvidence."""
    if len(chain) != len(_CHAIN):
        raise MalformedEvidence(
            "An AMD chain is the chip's certificate, its CA's and the root's.",
            step="endorsements.amd",
            expected="3 certificates",
            got=str(len(chain)),
        )
    leaf, ask, ark = chain
    return (
        _load_leaf(leaf),
        load_certificate(ask, what="endorsements.amd ASK"),
        load_certificate(ark, what="endorsements.amd ARK"),
    )


def _load_leaf(data: bytes) -> x509.Certificate:
    """As `load_certificate`, but that AMD gives its chips' certificates the serial number 0, of which pyca warns."""
    what = "endorsements.amd leaf"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CryptographyDeprecationWarning)
            certificate = x509.load_der_x509_certificate(data)
            _ = certificate.extensions, certificate.public_key(), certificate.subject, certificate.issuer
            _ = certificate.not_valid_before_utc, certificate.not_valid_after_utc
            strict = certificate.serial_number >= 0 and data.endswith(b"\0" + certificate.signature)
    except _UNREADABLE as error:
        raise MalformedEvidence(f"{what} is not an X.509 certificate.", step=what) from error
    if not strict:
        raise MalformedEvidence(f"{what} is not strictly encoded.", step=what)
    return certificate


def load_crl(data: bytes) -> x509.CertificateRevocationList:
    """DER or PEM, in strict encoding. Does not check anything but its form. Raises: MalformedEvidence."""
    step = "endorsements.amd_crl"
    der = pem_or_der_crl(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CryptographyDeprecationWarning)
            crl = x509.load_der_x509_crl(der)
            _ = crl.extensions, crl.issuer, crl.last_update_utc, crl.next_update_utc, crl.signature_hash_algorithm
            _ = [(entry.serial_number, entry.extensions) for entry in crl]
            _ = crl_number(crl)
            strict = der.endswith(b"\0" + crl.signature)
    except _UNREADABLE as error:
        raise MalformedEvidence("AMD's revocation list is not one.", step=step) from error
    if not strict:
        raise MalformedEvidence("AMD's revocation list is not strictly encoded.", step=step)
    return crl


def read_extensions(leaf: x509.Certificate) -> Endorsed:
    """AMD's own extensions (57230, section 3.1, "VCEK Certificate Extensions"); what is malformed is named in `faults`."""
    raw = {
        extension.oid.dotted_string: extension.value.value
        for extension in leaf.extensions
        if isinstance(extension.value, x509.UnrecognizedExtension)
    }
    name, csp_id, hwid = _ia5(raw.get(_PRODUCT_NAME)), _ia5(raw.get(_CSP_ID)), raw.get(_HWID)
    product = name.split("-", 1)[0] if name is not None else None
    size = _HWID_SIZES.get(product or "")
    if hwid is not None and size is not None and len(hwid) == size + 2 and hwid[:2] == bytes([0x04, size]):
        hwid = hwid[2:]  # KDS leaves the OCTET STRING's header out
    tcb = {name: _integer(raw[oid]) for name, oid in _SPL.items() if oid in raw}
    faults = [f"{name} is no number of one byte" for name, value in tcb.items() if value is None]
    if hwid is not None and len(hwid) != size:
        faults.append(f"hwID has {len(hwid)} bytes")
    known = {name: value for name, value in tcb.items() if value is not None}
    return Endorsed(product, MappingProxyType(known), hwid, csp_id, tuple(faults))


def _integer(der: bytes) -> int | None:
    """An INTEGER from 0 to 255 in its one encoding."""
    if len(der) == 3 and der[:2] == b"\x02\x01" and der[2] < 0x80:
        return der[2]
    if len(der) == 4 and der[:3] == b"\x02\x02\x00" and der[3] >= 0x80:
        return der[3]
    return None


def _ia5(der: bytes | None) -> str | None:
    """A short IA5String of printable characters."""
    if der is None or len(der) < 3 or der[0] != 0x16 or der[1] != len(der) - 2 or len(der) > 0x7F:
        return None
    text = der[2:]
    return text.decode("ascii") if all(0x20 <= character < 0x7F for character in text) else None


def check_root(got: str, roots: Mapping[str, str]) -> Factor:
    """`got` is SHA-256 of the ARK's DER; `roots` product -> the pinned one."""
    product = next((name for name, digest in roots.items() if digest == got), None)
    if product is not None:
        return passed("evidence.root", f"ARK {product} {got}")
    hint = "Whoever made this evidence, it was not AMD: its chain ends in a root that AMD does not have."
    return failed("evidence.root", expected=" or ".join(sorted(roots.values())), got=got, hint=hint)


def check_chain(certificates: Sequence[x509.Certificate], now: float) -> Factor:
    """(leaf, ASK, ARK), or (ASK, ARK): each signed by the next, the ARK by itself; each valid at `now`, and used for
    what it is for.

    Does not check: whether the ARK is AMD's (`check_root`), revocation (`check_crl`), which key signed the report.
    """
    names = _CHAIN if len(certificates) == len(_CHAIN) else _CHAIN[1:]
    faults = [
        fault
        for at, (name, certificate) in enumerate(zip(names, certificates, strict=True))
        for fault in _certificate_faults(name, certificate, certificates[min(at + 1, len(names) - 1)], now)
    ]
    if not faults:
        return passed("evidence.chain", ", ".join(names))
    timely = all("is valid" in fault for fault in faults)
    hint = "Expired, not valid yet, or a clock is wrong." if timely else "The chain was changed, or forged."
    return failed("evidence.chain", expected="a valid chain", got="; ".join(faults)[:400], hint=hint)


def _certificate_faults(
    name: str, certificate: x509.Certificate, issuer: x509.Certificate, now: float
) -> Iterator[str]:
    if not _issued(certificate, issuer):
        yield f"{name} is not signed by its issuer"
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not begin.timestamp() <= now <= end.timestamp():
        yield f"{name} is valid {begin:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M}"
    if any(extension.critical and extension.oid not in _UNDERSTOOD for extension in certificate.extensions):
        yield f"{name} has an unknown critical extension"
    if name == "leaf" and _is_ca(certificate):
        yield f"{name} may sign certificates"
    if name != "leaf" and not (_is_ca(certificate) and _usage(certificate, "key_cert_sign")):
        yield f"{name} may not sign certificates"


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """RSASSA-PSS with SHA-384 by the issuer, whose name stands in it. pyca's path building knows no RSASSA-PSS."""
    try:
        right = _is_pss(certificate.signature_algorithm_oid, certificate.signature_hash_algorithm)
    except _UNREADABLE:
        return False
    return right and issued(certificate, issuer)


def _is_pss(algorithm: x509.ObjectIdentifier, digest: hashes.HashAlgorithm | None) -> bool:
    return algorithm == SignatureAlgorithmOID.RSASSA_PSS and isinstance(digest, hashes.SHA384)


def _is_ca(certificate: x509.Certificate) -> bool:
    constraints = basic_constraints(certificate)
    return constraints is not None and constraints.ca


def _usage(certificate: x509.Certificate, name: str) -> bool:
    usage = key_usage(certificate)
    return usage is not None and bool(getattr(usage, name))


def check_crl(
    crl: x509.CertificateRevocationList | None, issued: Sequence[x509.Certificate], policy: Policy, now: float
) -> Factor:
    """`issued`: the ARK's own certificates, ASK and ARK. A leaf is the ASK's; AMD revokes none of those singly."""
    step = "evidence.crl"
    if crl is None and policy.limits.dangerously_allow_missing_crl:
        return not_checked(step, "No revocation list came with the evidence; the policy allows that.")
    if crl is None:
        hint = "No revocation list came with the evidence. To accept that: dangerously_allow_missing_crl = true"
        return failed(step, expected="AMD's revocation list", got="nothing", hint=hint)
    faults = [*_crl_faults(crl, issued[-1], policy.limits.max_crl_age_days, now)]
    faults += [
        f"revoked: {name}"
        for name, certificate in zip(_CHAIN[1:], issued, strict=True)
        if crl.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None
    ]
    if not faults:
        return passed(step, f"of {crl.last_update_utc:%Y-%m-%d}, {len(crl)} revoked, this chain not among them")
    hint = (
        "AMD has withdrawn the key that this chip's certificate rests on: do not trust it."
        if any(fault.startswith("revoked") for fault in faults)
        else "Get a current list: cloister collateral fetch."
    )
    return failed(step, expected="a current list of the ARK, nothing revoked", got="; ".join(faults), hint=hint)


def _crl_faults(
    crl: x509.CertificateRevocationList, ark: x509.Certificate, max_age_days: int | None, now: float
) -> Iterator[str]:
    if not _crl_signed(crl, ark):
        yield "not signed by the ARK"
    if any(extension.critical for extension in crl.extensions):
        yield "an unknown critical extension"
    begin, end = crl.last_update_utc.timestamp(), crl.next_update_utc
    if not begin <= now:
        yield f"not valid before {crl.last_update_utc:%Y-%m-%d %H:%M}"
    if end is None or not now <= end.timestamp():
        yield "without an end" if end is None else f"out of date since {end:%Y-%m-%d %H:%M}"
    if max_age_days is not None and not now - begin <= max_age_days * _DAY:
        yield f"older than {max_age_days} days"


def _crl_signed(crl: x509.CertificateRevocationList, ark: x509.Certificate) -> bool:
    key = ark.public_key()
    if not isinstance(key, rsa.RSAPublicKey) or crl.issuer != ark.subject or not _usage(ark, "crl_sign"):
        return False
    try:
        return _is_pss(crl.signature_algorithm_oid, crl.signature_hash_algorithm) and crl.is_signature_valid(key)
    except _UNREADABLE:
        return False


def chain_expiries(
    certificates: Sequence[x509.Certificate], crl: x509.CertificateRevocationList | None, *, kind: str
) -> tuple[Expiry, ...]:
    """When each certificate and the list end. `kind`: "VCEK" or "VLEK"."""
    names = (kind, "ASVK" if kind == "VLEK" else "ASK", "ARK")
    expiries = [
        Expiry(f"AMD {name} certificate", certificate.not_valid_after_utc.timestamp())
        for name, certificate in zip(names, certificates, strict=True)
    ]
    if crl is not None and crl.next_update_utc is not None:
        expiries.append(Expiry("AMD revocation list", crl.next_update_utc.timestamp()))
    return tuple(expiries)


def crl_counters(product: str, crl: x509.CertificateRevocationList | None) -> Mapping[str, int]:
    """Each ARK numbers its own lists."""
    if crl is None or product not in LAYOUTS:
        return MappingProxyType({})
    number = crl_number(crl)
    return MappingProxyType({} if number is None else {f"amd-crl-number-{product.lower()}": number})
