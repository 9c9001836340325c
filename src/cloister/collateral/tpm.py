"""Revocation lists of TPM keys' certificates, from where these say that they are published (RFC 5280, section 4.2.1.13)."""

import base64
import re
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from urllib.parse import urlsplit

from cryptography import x509

from cloister.collateral.lists import check_list
from cloister.collateral.pieces import Answer, Key, Piece, check_form, refuse, text_of
from cloister.errors import MalformedEvidence
from cloister.evidence.intel import parse_pem_chain
from cloister.verify.certificates import MALFORMED, load_certificate
from cloister.verify.policy import Limits, Policy
from cloister.verify.tpm_certificates import ATTESTATION_KEY, judge_chain

__all__ = ["CRL", "VENDOR", "Point", "address_of", "check", "points_of"]

VENDOR, CRL = "tpm", "crl"

_FORM = re.compile(r"crl [a-z2-7]{1,240}")
_MAX_ADDRESS = 150  # bytes: as a key, it is a file's name
_LISTS_ASIDE = Policy(limits=Limits(dangerously_allow_missing_crl=True))


@dataclass(frozen=True, slots=True)
class Point:
    """Where one list is published. `chain`: the certificates that name it, as PEM, the attestation key's own first."""

    key: Key
    issuer: x509.Certificate
    chain: bytes

    def own(self, lists: Sequence[bytes]) -> Answer | None:
        """The list that this issuer signed, by its name alone."""
        found = next((each for each in lists if _issuer_of(each) == self.issuer.subject), None)
        return Answer(found) if found is not None else None


def points_of(certificates: Sequence[bytes], *, roots: frozenset[str], now: float) -> tuple[Point, ...]:
    """Every list that these certificates (DER, the attestation key's first, the root last) name, each but once. A chain
    that is not good names none: whoever made it up would choose whom we ask.

    Raises: MalformedEvidence for certificates that are none.
    """
    judged = judge_chain(certificates, (), purpose=ATTESTATION_KEY, roots=roots, policy=_LISTS_ASIDE, now=now)
    if any(factor.verdict == "fail" for factor in judged.factors):
        return ()
    chain = "".join(map(ssl.DER_cert_to_PEM_cert, certificates)).encode("ascii")
    loaded = [load_certificate(der, what="tpm.certificates") for der in certificates]
    named = {address: issuer for certificate, issuer in pairwise(loaded) for address in _addresses(certificate)}
    return tuple(Point(_key(address), issuer, chain) for address, issuer in named.items())


def _addresses(certificate: x509.Certificate) -> Iterator[str]:
    """The first one that can be asked: several are copies of one list."""
    try:
        points = certificate.extensions.get_extension_for_class(x509.CRLDistributionPoints).value
    except x509.ExtensionNotFound:
        return
    names = [name.value for point in points for name in point.full_name or ()]
    yield from [name for name in names if isinstance(name, str) and _can_be_asked(name)][:1]


def _can_be_asked(address: str) -> bool:
    try:
        parts = urlsplit(address)
        _, host = parts.port, parts.hostname
    except ValueError:
        return False
    plain = len(address) <= _MAX_ADDRESS and all("!" <= letter <= "~" for letter in address)
    return bool(plain and host and parts.username is None and parts.scheme in ("http", "https"))


def _key(address: str) -> Key:
    return Key(VENDOR, CRL, base64.b32encode(address.encode("ascii")).decode().rstrip("=").lower())


def address_of(key: Key) -> str:
    """Raises: MalformedEvidence for a key that is no list's."""
    check_form(key, _FORM)
    address = text_of(key.platform)
    if not _can_be_asked(address):
        raise MalformedEvidence("This names no revocation list.", step=f"collateral.{CRL}")
    return address


def check(key: Key, answer: Answer, *, roots: frozenset[str], now: float) -> Piece:
    """One list, checked. `answer.chain` holds the certificates that name it.

    (1) they are good, lead to a pinned root, and name this list
    (2) it is signed by its issuer among them, of unlimited scope, and fresh

    Whom it revokes is for `cloister.verify` to judge.

    Raises: MalformedEvidence, NotTrusted.
    """
    address_of(key)
    certificates = parse_pem_chain(answer.chain, what="collateral.crl")
    point = next((one for one in points_of(certificates, roots=roots, now=now) if one.key == key), None)  # (1)
    if point is None:
        raise refuse(key, f"No certificate that can be believed names {key}.")
    return check_list(key, answer, point.issuer, now)  # (2)


def _issuer_of(crl: bytes) -> x509.Name | None:
    try:
        return x509.load_der_x509_crl(crl).issuer
    except MALFORMED:
        return None
