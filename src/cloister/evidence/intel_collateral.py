"""What Intel says about a platform: TCB info, quoting enclave's identity, revocation lists, and who signed them.

Formats of Intel's "Provisioning Certification Service for ECDSA Attestation", version 4 of its API: TCB info 3, enclave
identity 2. They travel as one JSON object of nine texts, as the services' clients write them (binary values in
hexadecimal); the signed texts stay as they are, byte for byte.
"""

import binascii
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TypeVar

from cloister.errors import MalformedEvidence
from cloister.evidence.document import MAX_LOG
from cloister.evidence.intel import parse_pem_chain
from cloister.evidence.strict_json import Fields, load_object

__all__ = [
    "Collateral",
    "ModuleIdentity",
    "PlatformLevel",
    "QeIdentity",
    "SvnLevel",
    "TcbInfo",
    "parse_collateral",
    "parse_qe_identity",
    "parse_tcb_info",
]

_COMPONENTS = 16
_MAX_LEVELS = 64
_DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
_HEX = re.compile(r"[0-9a-f]*|[0-9A-F]*")
_OPTIONAL = frozenset({"pck_certificate_chain"})

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class SvnLevel:
    """A level of one enclave or of the TDX module: reached from `isv_svn` up. `date` in Unix seconds."""

    isv_svn: int
    date: float
    status: str
    advisories: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PlatformLevel:
    """A level of the platform: reached when every component is at least this. `tdx` is empty in TCB info for SGX."""

    sgx: tuple[int, ...]
    tdx: tuple[int, ...]
    pce_svn: int
    date: float
    status: str
    advisories: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModuleIdentity:
    """The TDX module's signer and attributes; `id` "TDX_01", … by major version, "" for the first generation's."""

    id: str
    mr_signer: bytes
    attributes: bytes
    attributes_mask: bytes
    levels: tuple[SvnLevel, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TcbInfo:
    """`id` "SGX" or "TDX". `levels` from the newest down, as signed. Dates in Unix seconds."""

    id: str
    issue_date: float
    next_update: float
    fmspc: bytes
    pce_id: bytes
    evaluation: int
    levels: tuple[PlatformLevel, ...]
    module: ModuleIdentity | None
    module_identities: tuple[ModuleIdentity, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class QeIdentity:
    """`id` "QE" or "TD_QE". Masks say which bits of the quoting enclave's report must match."""

    id: str
    issue_date: float
    next_update: float
    evaluation: int
    misc_select: int
    misc_select_mask: int
    attributes: bytes
    attributes_mask: bytes
    mr_signer: bytes
    isv_prod_id: int
    levels: tuple[SvnLevel, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Collateral:
    """As transported: the texts are what the signatures (r || s) are over. Chains as DER, leaf first.

    `pck_crl_issuer_chain` is only handed on: the list is checked against the quote's own CA. A `pck_certificate_chain`,
    which some clients add for quotes that lack it, is not read: a quote must bring its own.
    """

    pck_crl_issuer_chain: str
    root_ca_crl: bytes
    pck_crl: bytes
    tcb_info_issuer_chain: str
    tcb_info: str
    tcb_info_signature: bytes
    qe_identity_issuer_chain: str
    qe_identity: str
    qe_identity_signature: bytes

    def tcb_info_issuers(self) -> tuple[bytes, ...]:
        """Raises: MalformedEvidence."""
        return _chain(self.tcb_info_issuer_chain, "tcb_info_issuer_chain")

    def qe_identity_issuers(self) -> tuple[bytes, ...]:
        """Raises: MalformedEvidence."""
        return _chain(self.qe_identity_issuer_chain, "qe_identity_issuer_chain")


_KEPT = 16
"""Texts whose values are kept: one machine's collateral is the same for weeks, and reading it is half of the work."""


def parse_collateral(data: bytes) -> Collateral:
    """Total over bytes. Reads the outer object alone: what its texts hold is read by the functions beside this one.

    Raises: MalformedEvidence for anything but the nine texts, over 1 MiB.
    """
    what = "endorsements.intel"
    texts = load_object(data, max_bytes=MAX_LOG, what=what)
    known = frozenset(Collateral.__slots__)
    if not known <= texts.keys() <= known | _OPTIONAL:
        raise MalformedEvidence("Intel's collateral lacks a part, or has an unknown one.", step=what)
    for name in known:
        if not isinstance(texts[name], str):
            raise MalformedEvidence(f"{what}.{name} is not text.", step=f"{what}.{name}")
    return Collateral(
        pck_crl_issuer_chain=_unread(texts["pck_crl_issuer_chain"]),
        root_ca_crl=_hex(texts["root_ca_crl"], "root_ca_crl"),
        pck_crl=_hex(texts["pck_crl"], "pck_crl"),
        tcb_info_issuer_chain=texts["tcb_info_issuer_chain"],
        tcb_info=texts["tcb_info"],
        tcb_info_signature=_hex(texts["tcb_info_signature"], "tcb_info_signature", size=64),
        qe_identity_issuer_chain=texts["qe_identity_issuer_chain"],
        qe_identity=texts["qe_identity"],
        qe_identity_signature=_hex(texts["qe_identity_signature"], "qe_identity_signature", size=64),
    )


@lru_cache(_KEPT)
def parse_tcb_info(text: str) -> TcbInfo:
    """TCB info version 3. Members that Intel may add are left out of account. Raises: MalformedEvidence."""
    fields = _fields(text, "tcb_info")
    fields.integer("version", low=3, high=3)
    identity = fields.one_of("id", ("SGX", "TDX"))
    tdx = identity == "TDX"
    return TcbInfo(
        id=identity,
        issue_date=_date(fields, "issueDate"),
        next_update=_date(fields, "nextUpdate"),
        fmspc=_bytes(fields, "fmspc", 6),
        pce_id=_bytes(fields, "pceId", 2),
        evaluation=fields.integer("tcbEvaluationDataNumber", high=2**32 - 1),
        levels=_each(fields, "tcbLevels", lambda level: _platform_level(level, tdx)),
        module=_module(fields.take("tdxModule"), "") if tdx else None,
        module_identities=_each(fields, "tdxModuleIdentities", _module_identity)
        if tdx and fields.has("tdxModuleIdentities")
        else (),
    )


@lru_cache(_KEPT)
def parse_qe_identity(text: str) -> QeIdentity:
    """Enclave identity version 2. Members that Intel may add are left out of account. Raises: MalformedEvidence."""
    fields = _fields(text, "qe_identity")
    fields.integer("version", low=2, high=2)
    return QeIdentity(
        id=fields.one_of("id", ("QE", "TD_QE")),
        issue_date=_date(fields, "issueDate"),
        next_update=_date(fields, "nextUpdate"),
        evaluation=fields.integer("tcbEvaluationDataNumber", high=2**32 - 1),
        misc_select=int.from_bytes(_bytes(fields, "miscselect", 4), "little"),
        misc_select_mask=int.from_bytes(_bytes(fields, "miscselectMask", 4), "little"),
        attributes=_bytes(fields, "attributes", 16),
        attributes_mask=_bytes(fields, "attributesMask", 16),
        mr_signer=_bytes(fields, "mrsigner", 32),
        isv_prod_id=fields.integer("isvprodid", high=2**16 - 1),
        levels=_each(fields, "tcbLevels", _svn_level),
    )


def _unread(chain: str) -> str:
    """PEM is ASCII; a lone surrogate could not even be handed on."""
    if not chain.isascii():
        what = "endorsements.intel.pck_crl_issuer_chain"
        raise MalformedEvidence(f"{what} is not a chain of PEM certificates.", step=what)
    return chain


def _chain(text: str, name: str) -> tuple[bytes, ...]:
    """Some services set a blank line between certificates."""
    what = f"endorsements.intel.{name}"
    try:
        encoded = text.encode("ascii")
    except UnicodeEncodeError as error:
        raise MalformedEvidence(f"{what} is not a chain of PEM certificates.", step=what) from error
    return parse_pem_chain(encoded.replace(b"-----\n\n-----", b"-----\n-----"), what=what)


def _hex(text: str, name: str, *, size: int | None = None) -> bytes:
    what = f"endorsements.intel.{name}"
    try:
        data = binascii.unhexlify(text) if _HEX.fullmatch(text) else None
    except ValueError:
        data = None
    if data is None or len(data) != (len(data) if size is None else size):
        raise MalformedEvidence(f"{what} is not hexadecimal of the right length.", step=what)
    return data


def _fields(text: str, name: str) -> Fields:
    what = f"endorsements.intel.{name}"
    return Fields(load_object(text.encode("utf-8", "surrogatepass"), max_bytes=MAX_LOG, what=what), what=what)


def _inner(value: object, name: str) -> Fields:
    return Fields(value, what=f"endorsements.intel.{name}")


def _date(fields: Fields, name: str) -> float:
    text = fields.matching(name, _DATE, "a date and time in UTC")
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError as error:
        raise MalformedEvidence(f"{name} is no date.", step=f"endorsements.intel.{name}") from error


def _bytes(fields: Fields, name: str, size: int) -> bytes:
    pattern = re.compile(rf"(?:[0-9a-fA-F]{{2}}){{{size}}}")
    return bytes.fromhex(fields.matching(name, pattern, f"{size} bytes in hexadecimal"))


def _each(fields: Fields, name: str, parse: Callable[[object], _T]) -> tuple[_T, ...]:
    return tuple(parse(item) for item in fields.items(name, max_items=_MAX_LEVELS))


def _verdict(fields: Fields) -> tuple[float, str, tuple[str, ...]]:
    advisories = fields.texts("advisoryIDs", max_items=256) if fields.has("advisoryIDs") else ()
    return _date(fields, "tcbDate"), fields.text("tcbStatus"), advisories


def _platform_level(value: object, tdx: bool) -> PlatformLevel:
    fields = _inner(value, "tcb_info.tcbLevels")
    tcb = _inner(fields.take("tcb"), "tcb_info.tcbLevels.tcb")
    return PlatformLevel(
        _svns(tcb, "sgxtcbcomponents"),
        _svns(tcb, "tdxtcbcomponents") if tdx else (),
        tcb.integer("pcesvn", high=2**16 - 1),
        *_verdict(fields),
    )


def _svns(tcb: Fields, name: str) -> tuple[int, ...]:
    components = tcb.items(name, max_items=_COMPONENTS)
    if len(components) != _COMPONENTS:
        raise MalformedEvidence(f"{name} are not 16.", step=f"endorsements.intel.{name}")
    return tuple(_svn(component, name) for component in components)


def _svn(component: object, name: str) -> int:
    svn = component.get("svn") if isinstance(component, dict) else None
    if type(svn) is not int or not 0 <= svn <= 255:
        raise MalformedEvidence(f"{name} have no SVN.", step=f"endorsements.intel.{name}")
    return svn


def _svn_level(value: object) -> SvnLevel:
    fields = _inner(value, "tcbLevels")
    tcb = _inner(fields.take("tcb"), "tcbLevels.tcb")
    return SvnLevel(tcb.integer("isvsvn", high=2**16 - 1), *_verdict(fields))


def _module_identity(value: object) -> ModuleIdentity:
    fields = _inner(value, "tcb_info.tdxModuleIdentities")
    return _module(value, fields.text("id"))


def _module(value: object, identity: str) -> ModuleIdentity:
    fields = _inner(value, "tcb_info.tdxModule")
    return ModuleIdentity(
        identity,
        _bytes(fields, "mrsigner", 48),
        _bytes(fields, "attributes", 8),
        _bytes(fields, "attributesMask", 8),
        _each(fields, "tcbLevels", _svn_level) if fields.has("tcbLevels") else (),
    )
