"""AMD's collateral for SEV-SNP: the chip's certificate, its CA and the root's revocation list.

AMD 57230, "VCEK Certificate and KDS Interface Specification": certificates chapter 3, the key distribution service
chapter 4. A cloud's own key (VLEK) is endorsed by a certificate that only the cloud gets, so it must come with the
evidence.
"""

import hashlib
import re
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import MappingProxyType

from cryptography import x509

from cloister.collateral.pieces import Answer, Key, Piece, Pieces, check_form, check_fresh, refuse
from cloister.errors import MalformedEvidence
from cloister.evidence.endorsements import Endorsements
from cloister.evidence.sev_snp import VCEK, VLEK, Report, pem_or_der_certificates, product_of, tcb_components
from cloister.verify.amd_certificates import check_chain, check_crl, load_chain, load_crl, read_extensions
from cloister.verify.certificates import load_certificate
from cloister.verify.factors import Factor
from cloister.verify.policy import Policy

__all__ = [
    "CA",
    "CRL",
    "LEAVES",
    "SPLS",
    "VENDOR",
    "answers_of",
    "check",
    "endorsed",
    "keys_of",
    "products_of",
    "tcb_of",
]

VENDOR = "amd"

LEAVES: Mapping[int, str] = MappingProxyType({VCEK: "vcek", VLEK: "vlek"})
CA, CRL = "-ca", "-crl"

SPLS: Mapping[str, str] = MappingProxyType(
    {"fmc": "fmcSPL", "bootloader": "blSPL", "tee": "teeSPL", "snp": "snpSPL", "microcode": "ucodeSPL"}
)
"""Component of a TCB version -> its name in the service's addresses, in the service's order."""

_UNNAMED = ("Milan", "Genoa")  # whose firmware makes reports that do not name their processor
_HWID_SIZE = MappingProxyType({"Turin": 8})  # others: all 64 bytes of CHIP_ID
_FORM = re.compile(
    r"v[cl]ek-(ca|crl) (milan|genoa|turin)|v[cl]ek (milan|genoa)-[0-9a-f]{128}-[0-9a-f]{16}|v[cl]ek turin-[0-9a-f]{16}-[0-9a-f]{16}"
)
_WARNINGS = threading.Lock()  # catching warnings, as loading chains does, changes state that all threads share

_Chain = tuple[x509.Certificate, x509.Certificate, x509.Certificate]


def products_of(report: Report, endorsements: Endorsements) -> tuple[str, ...]:
    """The product that made the report; several to be tried where neither it nor its certificates tell.

    Raises: MalformedEvidence for an unknown processor.
    """
    if report.cpuid is not None:
        product = product_of(report.cpuid)
        if product is None:
            raise MalformedEvidence("The report is from an unknown processor.", step="cpu", got=str(report.cpuid))
        return (product,)
    with suppress(MalformedEvidence):
        named = read_extensions(_load(endorsements.amd)[0]).product
        return (named,) if named in _UNNAMED else _UNNAMED
    return _UNNAMED


def _load(chain: tuple[bytes, ...]) -> _Chain:
    with _WARNINGS:
        return load_chain(chain)


def keys_of(report: Report, product: str) -> tuple[Key, ...]:
    """What judging this report needs, in the order in which it can be checked.

    Raises: MalformedEvidence for a report that no key signed, or whose chip does not say which one it is.
    """
    leaf = LEAVES.get(report.signing_key)
    if leaf is None:
        raise MalformedEvidence("No key signed the report.", step="cpu.key_info", got=str(report.signing_key))
    family = product.lower()
    hwid = report.chip_id[: _HWID_SIZE.get(product, len(report.chip_id))]
    if report.signing_key == VCEK and not any(hwid):
        hint = "The host masks the chip's identity: its certificate must come with the evidence."
        raise MalformedEvidence("The report does not name its chip.", step="cpu.chip_id", hint=hint)
    return (
        Key(VENDOR, leaf + CA, family),
        Key(VENDOR, leaf + CRL, family),
        Key(VENDOR, leaf, f"{family}-{hwid.hex()}-{report.reported_tcb.hex()}"),
    )


def tcb_of(key: Key) -> tuple[str, str, Mapping[str, int]]:
    """Product, chip in hexadecimal, and the TCB's components that the vendor asks for, of a leaf's key."""
    family, hwid, tcb = key.platform.split("-")
    product = family.capitalize()
    parts = tcb_components(bytes.fromhex(tcb), product)
    return product, hwid, {name: parts[name] for name in SPLS if name in parts}


def check(key: Key, answer: Answer, *, found: Pieces, roots: Mapping[str, str], now: float) -> Piece:
    """One answer, checked.

    (1) CA: the product's pinned root, and what it signed, both valid now
    (2) revocation list: signed by that root, fresh, and the CA is not on it
    (3) leaf: signed by that CA, valid now, for the chip and TCB version that were asked for

    `roots`: product -> SHA-256 of its root. `found` holds the pieces before in this order. Does not check any report.

    Raises: MalformedEvidence, NotTrusted.
    """
    check_form(key, _FORM)
    if key.kind.endswith(CA):
        return _check_ca(key, answer, roots, now)  # (1)
    issuers = pem_or_der_certificates(_before(key, found, CA).answer.body)
    if key.kind.endswith(CRL):
        return _check_list(key, answer, issuers, now)  # (2)
    return _check_leaf(key, answer, issuers, now)  # (3)


def _before(key: Key, found: Pieces, suffix: str) -> Piece:
    kind = key.kind.partition("-")[0] + suffix
    piece = found.get(kind)
    if piece is None:
        raise refuse(
            key, f"Nothing was found that {key} could be checked with.", expected=kind, hint="Fetch it afresh."
        )
    return piece


def _require(key: Key, factor: Factor) -> None:
    if factor.verdict != "pass":
        raise refuse(key, f"{key} is not good: {factor.got}.", expected=factor.expected, hint=factor.hint)


def _check_ca(key: Key, answer: Answer, roots: Mapping[str, str], now: float) -> Piece:
    step = f"collateral.{key.kind}"
    ders = pem_or_der_certificates(answer.body)
    if len(ders) != 2:
        raise MalformedEvidence(f"{key} is not two certificates.", step=step, got=str(len(ders)))
    expected, got = roots.get(key.platform.capitalize(), ""), hashlib.sha256(ders[1]).hexdigest()
    if got != expected:
        raise refuse(key, f"{key} comes from another root than AMD's.", expected=expected, got=got)
    ask, ark = (load_certificate(der, what=step) for der in ders)
    starts = [certificate.not_valid_before_utc.timestamp() for certificate in (ask, ark)]
    ends = [certificate.not_valid_after_utc.timestamp() for certificate in (ask, ark)]
    check_fresh(key, max(starts), min(ends), now)
    _require(key, check_chain((ask, ark), now))
    return Piece(key, answer, max(starts), min(ends))


def _check_list(key: Key, answer: Answer, issuers: tuple[bytes, ...], now: float) -> Piece:
    with _WARNINGS:
        crl = load_crl(answer.body)
    ask, ark = (load_certificate(der, what=f"collateral.{key.kind}") for der in issuers)
    _require(key, check_crl(crl, (ask, ark), Policy(), now))
    if crl.next_update_utc is None:  # said so above
        raise MalformedEvidence(f"{key} never ends.", step=f"collateral.{key.kind}")
    return Piece(key, answer, crl.last_update_utc.timestamp(), crl.next_update_utc.timestamp())


def _check_leaf(key: Key, answer: Answer, issuers: tuple[bytes, ...], now: float) -> Piece:
    chain = _load((*pem_or_der_certificates(answer.body), *issuers))
    _require(key, check_chain(chain, now))
    leaf, (product, hwid, tcb) = read_extensions(chain[0]), tcb_of(key)
    if leaf.product != product or (key.kind == LEAVES[VCEK] and (leaf.hwid or b"").hex() != hwid):
        raise refuse(key, "The certificate is another chip's.", expected=f"{product} {hwid}"[:64])
    if got := {name: leaf.tcb.get(name, -1) for name in tcb if leaf.tcb.get(name, -1) != tcb[name]}:
        raise refuse(key, "The certificate is for other firmware.", expected=_words(tcb), got=_words(got))
    start, end = chain[0].not_valid_before_utc.timestamp(), chain[0].not_valid_after_utc.timestamp()
    return Piece(key, answer, start, end)


def _words(tcb: Mapping[str, int]) -> str:
    return " ".join(f"{SPLS[name]}={value}" for name, value in tcb.items())


def endorsed(pieces: Pieces) -> tuple[tuple[bytes, ...], bytes | None]:
    """The certificate chain, leaf first, and the revocation list, as `endorsements` holds them."""
    by_end = {piece.key.kind.partition("-")[2] or "leaf": piece.answer.body for piece in pieces.values()}
    leaf = pem_or_der_certificates(by_end["leaf"])
    return (*leaf, *pem_or_der_certificates(by_end["ca"])), by_end["crl"]


def answers_of(endorsements: Endorsements) -> Mapping[str, Answer]:
    """What a document carries, kind -> answer, under either kind of leaf."""
    return dict(_answers(endorsements))


def _answers(endorsements: Endorsements) -> Iterator[tuple[str, Answer]]:
    leaf, issuers = endorsements.amd[:1], endorsements.amd[1:]
    for kind in LEAVES.values():
        if leaf:
            yield kind, Answer(leaf[0])
        if issuers:
            yield kind + CA, Answer("".join(map(ssl.DER_cert_to_PEM_cert, issuers)).encode())
        if endorsements.amd_crl is not None:
            yield kind + CRL, Answer(endorsements.amd_crl)
