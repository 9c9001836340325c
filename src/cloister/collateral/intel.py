"""Intel's collateral for SGX and TDX: what a quote needs, and whether an answer is Intel's own.

Intel "SGX and TDX Provisioning Certification Service API", version 4. TCB info and enclave identity are signed as they
stand, so their texts are cut out of the answer and never written anew.
"""

import hashlib
import json
import re
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding

from cloister.collateral.lists import check_list
from cloister.collateral.pieces import Answer, Key, Piece, Pieces, check_form, check_fresh, refuse
from cloister.errors import MalformedEvidence
from cloister.evidence.intel import PCK_CHAIN, TEE_TDX, Quote, parse_pem_chain, parse_quote
from cloister.evidence.intel_collateral import parse_collateral, parse_qe_identity, parse_tcb_info
from cloister.evidence.strict_json import load_object
from cloister.verify.certificates import load_certificate
from cloister.verify.intel import INTEL_ROOT_SHA256
from cloister.verify.intel_chain import signs
from cloister.verify.intel_library import read_pck_extension

__all__ = [
    "EARLY",
    "PCK_CRL",
    "QE_IDENTITY",
    "ROOT_CRL",
    "TCB_INFO",
    "VENDOR",
    "answers_of",
    "check",
    "collateral_json",
    "keys_of",
]

VENDOR = "intel"
PCK_CRL, ROOT_CRL, TCB_INFO, QE_IDENTITY = "pck-crl", "root-crl", "tcb-info", "qe-identity"
EARLY = "-early"

_MEMBERS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {TCB_INFO: ("tcbInfo", "tcb_info"), QE_IDENTITY: ("enclaveIdentity", "qe_identity")}
)
"""Kind -> the member that the service's answer is about, and its name in a document's endorsements."""

_CAS = MappingProxyType({"Intel SGX PCK Processor CA": "processor", "Intel SGX PCK Platform CA": "platform"})
_TCB_SIGNER = "Intel SGX TCB Signing"
_SIGNATURE = re.compile(r'\s*,\s*"signature"\s*:\s*"([0-9a-fA-F]{128})"\s*\}\s*')
_FORM = re.compile(
    r"pck-crl (processor|platform)|root-crl sgx|tcb-info(-early)? (sgx|tdx)-[0-9a-f]{12}|qe-identity(-early)? (sgx|tdx)"
)


def keys_of(quote: bytes, *, early: bool = False) -> tuple[Key, ...]:
    """What judging this quote needs, in the order in which it can be checked. `early`: Intel's early update set, which
    names tomorrow's requirements, in place of the standard one.

    Raises: MalformedEvidence for no quote, or one that names its PCK certificate without holding it.
    """
    step, parsed = "evidence.chain", parse_quote(quote)
    pck = load_certificate(_pck_chain(parsed)[0], what=step)
    try:
        fmspc = bytes(read_pck_extension(pck.public_bytes(Encoding.PEM)).fmspc)
    except ValueError as error:
        raise MalformedEvidence("The PCK certificate names no platform.", step=step) from error
    ca = _CAS.get(_common_name(pck.issuer))
    if ca is None:
        got = ascii(_common_name(pck.issuer))[:64]
        raise MalformedEvidence("Another CA made the PCK certificate.", step=step, expected=" or ".join(_CAS), got=got)
    tee = "tdx" if parsed.header.tee_type == TEE_TDX else "sgx"
    update = EARLY if early else ""
    return (
        Key(VENDOR, PCK_CRL, ca),
        Key(VENDOR, ROOT_CRL, "sgx"),
        Key(VENDOR, TCB_INFO + update, f"{tee}-{fmspc.hex()}"),
        Key(VENDOR, QE_IDENTITY + update, tee),
    )


def _pck_chain(quote: Quote) -> tuple[bytes, ...]:
    step = "evidence.chain"
    if quote.certification_type != PCK_CHAIN:
        raise MalformedEvidence("The quote names its PCK certificate and does not bring it.", step=step)
    return parse_pem_chain(quote.certification_data, what=step)


def _common_name(name: x509.Name) -> str:
    found = name.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return str(found[0].value) if len(found) == 1 else ""


def check(key: Key, answer: Answer, *, found: Pieces, root: bytes | None, now: float) -> Piece:
    """One answer, checked.

    (1) its issuers lead in one step to the pinned root, are valid now, of the right kind, and not revoked by the root
    (2) the issuer's key signed it, or, the root's revocation list, the root's
    (3) it is about what was asked for
    (4) it was issued, and its next issue is still to come

    `found` holds the pieces before in the order of `keys_of`. `root`: a root certificate (DER) in place of Intel's, for
    tests. Does not check any quote, nor how well a platform fares under it.

    Raises: MalformedEvidence, NotTrusted.
    """
    check_form(key, _FORM)
    if key.kind == PCK_CRL:
        issuer, _ = _issuers(key, answer, root, now)  # (1)
        if _CAS.get(_common_name(issuer.subject)) != key.platform:  # (3)
            raise refuse(key, f"{key} is another CA's.", expected=key.platform, got=_common_name(issuer.subject))
        return check_list(key, answer, issuer, now)  # (2) (4)
    if key.kind == ROOT_CRL:
        ca, own_root = _issuers(key, _before(key, found, PCK_CRL).answer, root, now)
        piece = check_list(key, answer, own_root, now)  # (2) (4)
        _check_not_revoked(key, ca, piece)  # (1)
        return piece
    issuer, _ = _issuers(key, answer, root, now)  # (1)
    _check_not_revoked(key, issuer, _before(key, found, ROOT_CRL))  # (1)
    if (name := _common_name(issuer.subject)) != _TCB_SIGNER:
        raise refuse(key, f"{key} is signed by another than its signer.", expected=_TCB_SIGNER, got=name)
    return _check_text(key, answer, issuer, now)  # (2) (3) (4)


def _before(key: Key, found: Pieces, kind: str) -> Piece:
    piece = found.get(kind)
    if piece is None:
        raise refuse(
            key, f"Nothing was found that {key} could be checked with.", expected=kind, hint="Fetch it afresh."
        )
    return piece


def _issuers(key: Key, answer: Answer, root: bytes | None, now: float) -> tuple[x509.Certificate, x509.Certificate]:
    step = f"collateral.{key.kind}"
    ders = parse_pem_chain(answer.chain, what=step)
    if len(ders) != 2:
        raise MalformedEvidence("The issuers are not one certificate and the root.", step=step, got=str(len(ders)))
    pinned = INTEL_ROOT_SHA256 if root is None else hashlib.sha256(root).hexdigest()
    if (got := hashlib.sha256(ders[1]).hexdigest()) != pinned:
        raise refuse(key, f"{key} comes from another root than Intel's.", expected=pinned, got=got)
    issuer, own_root = (load_certificate(der, what=step) for der in ders)
    try:
        issuer.verify_directly_issued_by(own_root)
    except (InvalidSignature, ValueError, TypeError) as error:
        raise refuse(key, f"The root did not sign the issuer of {key}.") from error
    for certificate in (issuer, own_root):
        start, end = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
        check_fresh(key, start, end, now)
    return issuer, own_root


def _check_not_revoked(key: Key, issuer: x509.Certificate, revocations: Piece) -> None:
    if issuer.serial_number in revocations.revoked:
        hint = "`cloister collateral fetch` asks Intel for what is signed by its successor."
        raise refuse(key, "Intel has revoked an issuer.", got=f"serial {issuer.serial_number:x}", hint=hint)


@dataclass(frozen=True, slots=True)
class _Signed:
    """`text`: the signed JSON exactly as it stood."""

    text: str
    signature: bytes


def _check_text(key: Key, answer: Answer, issuer: x509.Certificate, now: float) -> Piece:
    signed = _cut_out(key, answer.body)
    if not signs(issuer.public_key(), signed.signature, signed.text.encode()):
        raise refuse(key, f"{key} is not signed by Intel.")
    tee, _, fmspc = key.platform.partition("-")
    if _base(key) == TCB_INFO:
        info = parse_tcb_info(signed.text)
        about, wanted = f"{info.id} {info.fmspc.hex()}", f"{tee.upper()} {fmspc}"
        dates = info.issue_date, info.next_update
    else:
        identity = parse_qe_identity(signed.text)
        about, wanted = identity.id, "TD_QE" if tee == "tdx" else "QE"
        dates = identity.issue_date, identity.next_update
    if about != wanted:
        raise refuse(key, f"{key} is about another platform.", expected=wanted, got=about)
    check_fresh(key, *dates, now)
    return Piece(key, answer, *dates)


def _base(key: Key) -> str:
    return key.kind.removesuffix(EARLY)


def _cut_out(key: Key, body: bytes) -> _Signed:
    """`{"tcbInfo": … ,"signature":"hex"}` (PCS API, "Get TCB info"): read once for its form, and cut where the value
    ends."""
    member, step = _MEMBERS[_base(key)][0], f"collateral.{key.kind}"
    load_object(body, max_bytes=len(body), what=step)
    text = body.decode("utf-8")
    opened = re.match(rf'\s*\{{\s*"{member}"\s*:\s*(?=\{{)', text)
    if opened is None:
        raise MalformedEvidence(f"{key} does not begin with {member}.", step=step)
    _, end = json.JSONDecoder().raw_decode(text, opened.end())
    closed = _SIGNATURE.fullmatch(text, end)
    if closed is None:
        raise MalformedEvidence(f"{key} does not end with a signature.", step=step)
    return _Signed(text[opened.end() : end], bytes.fromhex(closed[1]))


def collateral_json(pieces: Pieces) -> bytes:
    """The pieces as `endorsements.intel` holds them: the nine texts of `evidence.intel_collateral`."""
    by_kind = {_base(piece.key): piece for piece in pieces.values()}
    texts = {
        "pck_crl_issuer_chain": by_kind[PCK_CRL].answer.chain.decode("ascii"),
        "root_ca_crl": by_kind[ROOT_CRL].answer.body.hex(),
        "pck_crl": by_kind[PCK_CRL].answer.body.hex(),
    }
    for kind, (_, name) in _MEMBERS.items():
        piece = by_kind[kind]
        signed = _cut_out(piece.key, piece.answer.body)
        texts[f"{name}_issuer_chain"] = piece.answer.chain.decode("ascii")
        texts[name] = signed.text
        texts[f"{name}_signature"] = signed.signature.hex()
    return json.dumps(texts, separators=(",", ":")).encode("ascii")


def answers_of(collateral: bytes, quote: bytes) -> Mapping[str, Answer]:
    """`endorsements.intel` apart, kind -> answer, as if Intel's service had said each. As verifiers do, it takes the
    issuers of the PCK revocation list from the quote.

    Raises: MalformedEvidence.
    """
    issuers = "".join(map(ssl.DER_cert_to_PEM_cert, _pck_chain(parse_quote(quote))[1:]))
    return dict(_answers(collateral, issuers))


def _answers(collateral: bytes, issuers: str) -> Iterator[tuple[str, Answer]]:
    texts = parse_collateral(collateral)
    yield PCK_CRL, Answer(texts.pck_crl, issuers.encode())
    yield ROOT_CRL, Answer(texts.root_ca_crl)
    for kind, (member, name) in _MEMBERS.items():
        signature = getattr(texts, f"{name}_signature").hex()
        body = f'{{"{member}":{getattr(texts, name)},"signature":"{signature}"}}'
        yield kind, Answer(body.encode("utf-8", "replace"), _pem(getattr(texts, f"{name}_issuer_chain")))


def _pem(chain: str) -> bytes:
    """Some services set a blank line between certificates."""
    return chain.encode("ascii", "replace").replace(b"-----\n\n-----", b"-----\n-----")
