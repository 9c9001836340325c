"""What Intel's hardware said: SGX and TDX quotes, byte by byte, and the PCK certificates inside them.

Byte formats of Intel's "SGX ECDSA Quote Library Reference" (version 3, appendix A) and "TDX DCAP Quoting Library API"
(versions 4 and 5, appendix A), little-endian:

```
quote = header (48 bytes) || [version 5: body type u16 || body size u32] || report || u32 length || signature data
signature data = signature (64) || attestation key (64) || certification data
certification data, version 3    = QE report (384) || its signature (64) || QE data u16-prefixed || PCK data
certification data, versions 4-5 = type 6 u16 || size u32 || the same
PCK data = type u16 || size u32 || bytes; type 5 is the PCK certificate chain, PEM, leaf first
```
"""

import base64
import binascii
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import NoReturn, TypeAlias

from cloister.errors import MalformedEvidence
from cloister.evidence.document import MAX_ITEM

__all__ = [
    "ENCLAVE_REPORT_SIZE",
    "HEADER_SIZE",
    "PCK_CHAIN",
    "TEE_SGX",
    "TEE_TDX",
    "EnclaveReport",
    "Header",
    "Quote",
    "TdReport",
    "parse_enclave_report",
    "parse_pem_chain",
    "parse_quote",
    "parse_td_report",
]

TEE_SGX = 0x00
TEE_TDX = 0x81

HEADER_SIZE = 48
ENCLAVE_REPORT_SIZE = 384
TD_REPORT_SIZES = (584, 648)
"""TD report 1.0, and 1.5, which appends TEE_TCB_SVN2 and MRSERVICETD."""

PCK_CHAIN = 5
"""Certification data type: the PCK certificate chain itself. Other types only name a certificate held elsewhere."""

_QE_CERTIFICATION = 6
_ECDSA_P256 = 2
_INTEL_QE = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
_V5_BODIES = {2: 584, 3: 648}
_MAX_CERTIFICATES = 4
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----\n([A-Za-z0-9+/=\n]{64,16384}?)\n-----END CERTIFICATE-----\n")


@dataclass(frozen=True, slots=True)
class Header:
    """`tee_type` is TEE_SGX or TEE_TDX. `user_data` holds the quoting enclave's own platform id."""

    version: int
    tee_type: int
    qe_svn: int
    pce_svn: int
    qe_vendor_id: bytes
    user_data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class EnclaveReport:
    """The body of REPORT (Intel SDM, volume 3D, "REPORT"); the reserved fields joined in `reserved`."""

    cpu_svn: bytes
    misc_select: int
    isv_ext_prod_id: bytes
    attributes: bytes
    mr_enclave: bytes
    mr_signer: bytes
    config_id: bytes
    isv_prod_id: int
    isv_svn: int
    config_svn: int
    isv_family_id: bytes
    report_data: bytes
    reserved: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TdReport:
    """TD quote body 1.0 and 1.5: measurements have 48 bytes each. `tee_tcb_svn2`, `mr_service_td` None: a 1.0 body."""

    tee_tcb_svn: bytes
    mr_seam: bytes
    mr_signer_seam: bytes
    seam_attributes: bytes
    td_attributes: bytes
    xfam: bytes
    mr_td: bytes
    mr_config_id: bytes
    mr_owner: bytes
    mr_owner_config: bytes
    rtmr: tuple[bytes, bytes, bytes, bytes]
    report_data: bytes
    tee_tcb_svn2: bytes | None = None
    mr_service_td: bytes | None = None


Report: TypeAlias = EnclaveReport | TdReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Quote:
    """`signed` is what `signature` (r || s) by `attestation_key` (x || y) is over; `qe_report` stands here as its signed
    bytes. `padding` is how many zero bytes followed a TDX quote: collectors hand out their whole buffer. `trailing` is
    what followed and was not zero."""

    header: Header
    report: Report
    signed: bytes
    signature: bytes
    attestation_key: bytes
    qe_report: bytes
    qe_report_signature: bytes
    qe_auth_data: bytes
    certification_type: int
    certification_data: bytes
    padding: int = 0
    trailing: bytes = b""


class _Reader:
    """Consumes exact lengths; what runs out is malformed."""

    def __init__(self, data: bytes, what: str) -> None:
        self._data = data
        self._at = 0
        self._what = what

    @property
    def at(self) -> int:
        return self._at

    def take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            _refuse(f"{self._what} ends early.", expected=f"{self._at + size} bytes", got=str(len(self._data)))
        piece = self._data[self._at : self._at + size]
        self._at += size
        return piece

    def integer(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def rest(self) -> bytes:
        return self.take(len(self._data) - self._at)

    def end(self) -> None:
        if self._at != len(self._data):
            _refuse(f"{self._what} has bytes left over.", expected=str(self._at), got=str(len(self._data)))


def _refuse(message: str, *, expected: str | None = None, got: str | None = None) -> NoReturn:
    raise MalformedEvidence(message, step="evidence.quote", expected=expected, got=got)


def parse_quote(data: bytes) -> Quote:
    """Total over bytes. Accepted are SGX quotes of version 3 and TDX quotes of versions 4 and 5 (TD report 1.0 or 1.5).

    Every length is exact. An SGX quote ends where its signature data ends; a TDX quote may be followed by anything, kept
    in `padding` and `trailing` for the verifier. Does not check any signature, nor reads certificates.

    Raises: MalformedEvidence for anything else, more than 64 KiB, another attestation key type than ECDSA P-256,
    another quoting enclave's vendor than Intel.
    """
    if len(data) > MAX_ITEM:
        _refuse("The quote is too long.", expected=f"{MAX_ITEM} bytes", got=str(len(data)))
    reader = _Reader(data, "The quote")
    header = _header(reader)
    report = _report(header, reader)
    signed = data[: reader.at]
    signature_data = _Reader(reader.take(reader.integer(4)), "The signature data")
    after = reader.rest()
    if after and header.tee_type == TEE_SGX:
        _refuse("The quote has bytes left over.", expected=str(len(data) - len(after)), got=str(len(data)))
    return _signature_data(signature_data, header, report, signed, after)


def _header(reader: _Reader) -> Header:
    version = reader.integer(2)
    key_type = reader.integer(2)
    header = Header(
        version=version,
        tee_type=reader.integer(4),
        qe_svn=reader.integer(2),
        pce_svn=reader.integer(2),
        qe_vendor_id=reader.take(16),
        user_data=reader.take(20),
    )
    if (header.version, header.tee_type) not in {(3, TEE_SGX), (4, TEE_TDX), (5, TEE_TDX)}:
        got = f"version {header.version}, TEE type {header.tee_type:#x}"
        _refuse("The quote is of an unknown kind.", expected="SGX version 3, TDX version 4 or 5", got=got)
    if key_type != _ECDSA_P256:
        _refuse("The quote's attestation key is of an unknown type.", expected="2 (ECDSA P-256)", got=str(key_type))
    if header.qe_vendor_id != _INTEL_QE:
        _refuse(
            "Another vendor's quoting enclave made the quote.", expected=_INTEL_QE.hex(), got=header.qe_vendor_id.hex()
        )
    return header


def _report(header: Header, reader: _Reader) -> Report:
    if header.version == 3:
        return parse_enclave_report(reader.take(ENCLAVE_REPORT_SIZE))
    if header.version == 4:
        return parse_td_report(reader.take(TD_REPORT_SIZES[0]))
    body_type, size = reader.integer(2), reader.integer(4)
    if _V5_BODIES.get(body_type) != size:
        _refuse("The quote's body is of an unknown kind.", expected="2 (584) or 3 (648)", got=f"{body_type} ({size})")
    return parse_td_report(reader.take(size))


def parse_enclave_report(data: bytes) -> EnclaveReport:
    """Exactly 384 bytes. Raises: MalformedEvidence."""
    reader = _Reader(data, "The enclave report")
    cpu_svn, misc_select, reserved1 = reader.take(16), reader.integer(4), reader.take(12)
    isv_ext_prod_id, attributes, mr_enclave, reserved2 = (reader.take(size) for size in (16, 16, 32, 32))
    mr_signer, reserved3, config_id = reader.take(32), reader.take(32), reader.take(64)
    isv_prod_id, isv_svn, config_svn = reader.integer(2), reader.integer(2), reader.integer(2)
    reserved4, isv_family_id, report_data = reader.take(42), reader.take(16), reader.take(64)
    reader.end()
    return EnclaveReport(
        cpu_svn=cpu_svn,
        misc_select=misc_select,
        isv_ext_prod_id=isv_ext_prod_id,
        attributes=attributes,
        mr_enclave=mr_enclave,
        mr_signer=mr_signer,
        config_id=config_id,
        isv_prod_id=isv_prod_id,
        isv_svn=isv_svn,
        config_svn=config_svn,
        isv_family_id=isv_family_id,
        report_data=report_data,
        reserved=reserved1 + reserved2 + reserved3 + reserved4,
    )


def parse_td_report(data: bytes) -> TdReport:
    """Exactly 584 (1.0) or 648 bytes (1.5). Raises: MalformedEvidence."""
    if len(data) not in TD_REPORT_SIZES:
        _refuse("The TD report has an unknown length.", expected="584 or 648", got=str(len(data)))
    reader = _Reader(data, "The TD report")
    tee_tcb_svn, mr_seam, mr_signer_seam = reader.take(16), reader.take(48), reader.take(48)
    seam_attributes, td_attributes, xfam = reader.take(8), reader.take(8), reader.take(8)
    mr_td, mr_config_id, mr_owner, mr_owner_config = (reader.take(48) for _ in range(4))
    rtmr = (reader.take(48), reader.take(48), reader.take(48), reader.take(48))
    report_data = reader.take(64)
    newer = len(data) == TD_REPORT_SIZES[1]
    tee_tcb_svn2 = reader.take(16) if newer else None
    mr_service_td = reader.take(48) if newer else None
    return TdReport(
        tee_tcb_svn=tee_tcb_svn,
        mr_seam=mr_seam,
        mr_signer_seam=mr_signer_seam,
        seam_attributes=seam_attributes,
        td_attributes=td_attributes,
        xfam=xfam,
        mr_td=mr_td,
        mr_config_id=mr_config_id,
        mr_owner=mr_owner,
        mr_owner_config=mr_owner_config,
        rtmr=rtmr,
        report_data=report_data,
        tee_tcb_svn2=tee_tcb_svn2,
        mr_service_td=mr_service_td,
    )


def _signature_data(reader: _Reader, header: Header, report: Report, signed: bytes, after: bytes) -> Quote:
    signature, attestation_key = reader.take(64), reader.take(64)
    inner = reader
    if header.version > 3:
        kind = reader.integer(2)
        if kind != _QE_CERTIFICATION:
            _refuse("The quote's certification is of an unknown type.", expected=str(_QE_CERTIFICATION), got=str(kind))
        inner = _Reader(reader.take(reader.integer(4)), "The certification data")
        reader.end()
    qe_report, qe_report_signature = inner.take(ENCLAVE_REPORT_SIZE), inner.take(64)
    qe_auth_data = inner.take(inner.integer(2))
    certification_type = inner.integer(2)
    certification_data = inner.take(inner.integer(4))
    inner.end()
    trailing = after.lstrip(b"\0")
    return Quote(
        header=header,
        report=report,
        signed=signed,
        signature=signature,
        attestation_key=attestation_key,
        qe_report=qe_report,
        qe_report_signature=qe_report_signature,
        qe_auth_data=qe_auth_data,
        certification_type=certification_type,
        certification_data=certification_data,
        padding=len(after) - len(trailing),
        trailing=trailing,
    )


@lru_cache(16)  # the same chains come with every quote of a machine
def parse_pem_chain(text: bytes, *, what: str) -> tuple[bytes, ...]:
    """One to four certificates as DER, leaf first, from PEM in its one canonical spelling (RFC 7468, section 3, strict;
    64 columns), so that no byte of a chain can be changed unnoticed. A missing last line feed, or one NUL after the
    text, is left out of account: quoting libraries and services differ in it.

    Raises: MalformedEvidence.
    """
    rest = text.removesuffix(b"\0").removesuffix(b"\n") + b"\n"
    chain: list[bytes] = []
    while rest and len(chain) <= _MAX_CERTIFICATES:
        match = _PEM.match(rest)
        if match is None:
            raise MalformedEvidence(f"{what} is not a chain of PEM certificates.", step=what)
        chain.append(_der(match[1], what))
        rest = rest[match.end() :]
    if not 0 < len(chain) <= _MAX_CERTIFICATES:
        raise MalformedEvidence(f"{what} has too many certificates.", step=what, expected=f"1 to {_MAX_CERTIFICATES}")
    return tuple(chain)


def _der(body: bytes, what: str) -> bytes:
    try:
        der = base64.b64decode(body.replace(b"\n", b""), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MalformedEvidence(f"{what} is not base64.", step=what) from error
    encoded = base64.b64encode(der)
    if b"\n".join(encoded[i : i + 64] for i in range(0, len(encoded), 64)) != body:
        raise MalformedEvidence(f"{what} is not canonical PEM.", step=what)
    return der
