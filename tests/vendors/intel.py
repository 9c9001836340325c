"""A whole synthetic Intel: root, PCK and TCB authorities, collateral and quotes; anything about them can be set wrong."""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

NOW = 1_800_000_000.0
DAY = 86400.0
HOUR = 3600.0

SGX_EXTENSION = "1.2.840.113741.1.13.1"
FMSPC = bytes.fromhex("00906ed50000")
PPID = bytes(range(16))
MR_ENCLAVE, MR_SIGNER, QE_SIGNER = b"\xe1" * 32, b"\xe2" * 32, b"\xe3" * 32
REPORT_DATA = bytes(range(64, 128))
CPU_SVN = bytes([5] * 16)
TEE_TCB_SVN = bytes([5, 1, 5, *([0] * 13)])
TD_ATTRIBUTES = (1 << 28).to_bytes(8, "little")
XFAM = (0x602E7).to_bytes(8, "little")

CERTIFICATES = ("root", "pck_ca", "pck", "tcb")
_SUBJECTS = {
    "root": "Intel SGX Root CA",
    "pck_ca": "Intel SGX PCK Platform CA",
    "pck": "Intel SGX PCK Certificate",
    "tcb": "Intel SGX TCB Signing",
}
_ISSUERS = {"root": "root", "pck_ca": "root", "pck": "pck_ca", "tcb": "root"}


def svns(value: int | bytes) -> list[dict[str, int]]:
    return [{"svn": svn} for svn in (bytes([value] * 16) if isinstance(value, int) else value)]


def level(
    status: str = "UpToDate", *, svn: int = 5, pce: int = 11, tdx: bytes | None = None, **more: Any
) -> dict[str, Any]:
    """A TCB level of the platform."""
    tcb: dict[str, Any] = {"sgxtcbcomponents": svns(svn), "pcesvn": pce}
    if tdx is not None:
        tcb["tdxtcbcomponents"] = svns(tdx)
    return {"tcb": tcb, "tcbDate": "2026-11-01T00:00:00Z", "tcbStatus": status, **more}


def svn_level(status: str = "UpToDate", svn: int = 4, **more: Any) -> dict[str, Any]:
    """A TCB level of the quoting enclave or of the TDX module."""
    return {"tcb": {"isvsvn": svn}, "tcbDate": "2026-10-01T00:00:00Z", "tcbStatus": status, **more}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to make. Names in `validity`, `revoked`, `signed_by`: root, pck_ca, pck, tcb; in `signed_by` also pck_crl,
    root_crl, tcb_info, qe_identity, qe_report, quote; its values are names of keys, "other" among them.

    `certificates` the PEM text inside the quote, where it is not the right chain; `attestation_key` x || y, likewise.
    `tcb_info`, `qe_identity` members to replace; `report`, `qe_report` fields of the reports, by the parser's names.
    """

    platform: str = "sgx"
    version: int = 3
    td15: bool = False
    validity: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    revoked: frozenset[str] = frozenset()
    signed_by: Mapping[str, str] = field(default_factory=dict)
    subjects: Mapping[str, str] = field(default_factory=dict)
    crl_dates: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    crl_number: int = 7
    crl_critical: bool = False
    no_ca: frozenset[str] = frozenset()
    tcb_info: Mapping[str, Any] = field(default_factory=dict)
    qe_identity: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    qe_report: Mapping[str, Any] = field(default_factory=dict)
    cpu_svn: bytes = CPU_SVN
    pce_svn: int = 11
    pck_extension: bool = True
    certification_type: int = 5
    certificates: str | None = None
    qe_auth_data: bytes = bytes(range(32))
    attestation_key: bytes | None = None
    after: bytes = b""


@dataclass(frozen=True)
class Evidence:
    """`root` is the DER that a test trusts. `parts` the collateral by name, before JSON."""

    quote: bytes
    parts: Mapping[str, str]
    root: bytes

    @property
    def collateral(self) -> bytes:
        return json.dumps(dict(self.parts)).encode()

    def with_parts(self, **changes: str) -> "Evidence":
        return Evidence(self.quote, {**self.parts, **changes}, self.root)


class Intel:
    """One throw-away vendor with its own keys. Certificates that are alike are made once."""

    def __init__(self) -> None:
        names = (*CERTIFICATES, "attestation", "other")
        self.keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in names}
        self._certificates: dict[tuple[Any, ...], x509.Certificate] = {}

    def certificate(self, name: str, settings: Settings) -> x509.Certificate:
        since, until = settings.validity.get(name, (NOW - 300 * DAY, NOW + 300 * DAY))
        signer = settings.signed_by.get(name, _ISSUERS[name])
        subject = settings.subjects.get(name, _SUBJECTS[name])
        issuer = settings.subjects.get(_ISSUERS[name], _SUBJECTS[_ISSUERS[name]])
        extension = _sgx_extension(settings) if name == "pck" and settings.pck_extension else b""
        ca = name in ("root", "pck_ca") and name not in settings.no_ca
        wanted = (name, since, until, signer, subject, issuer, extension, ca)
        if wanted not in self._certificates:
            self._certificates[wanted] = self._make(*wanted)
        return self._certificates[wanted]

    def _make(
        self, name: str, since: float, until: float, signer: str, subject: str, issuer: str, extension: bytes, ca: bool
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(subject))
            .issuer_name(_name(issuer))
            .public_key(self.keys[name].public_key())
            .serial_number(serial(name))
            .not_valid_before(_date(since))
            .not_valid_after(_date(until))
            .add_extension(x509.BasicConstraints(ca, None), critical=True)
            .add_extension(_usage(ca), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.keys[name].public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.keys[_ISSUERS[name]].public_key()),
                critical=False,
            )
        )
        if extension:
            oid = x509.ObjectIdentifier(SGX_EXTENSION)
            builder = builder.add_extension(x509.UnrecognizedExtension(oid, extension), critical=False)
        return builder.sign(self.keys[signer], hashes.SHA256())

    def crl(self, name: str, settings: Settings) -> bytes:
        issuer, listed = ("pck_ca", {"pck"}) if name == "pck_crl" else ("root", {"root", "pck_ca", "tcb"})
        since, until = settings.crl_dates.get(name, (NOW - DAY, NOW + 29 * DAY))
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(_name(settings.subjects.get(name, settings.subjects.get(issuer, _SUBJECTS[issuer]))))
            .last_update(_date(since))
            .next_update(_date(until))
            .add_extension(x509.CRLNumber(settings.crl_number), critical=settings.crl_critical)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.keys[issuer].public_key()), critical=False
            )
        )
        for number in (serial("somebody else's"), *(serial(name) for name in sorted(settings.revoked & listed))):
            entry = x509.RevokedCertificateBuilder().serial_number(number).revocation_date(_date(since))
            builder = builder.add_revoked_certificate(entry.build())
        key = self.keys[settings.signed_by.get(name, issuer)]
        return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)

    def chain(self, settings: Settings, *names: str) -> str:
        return "".join(self.certificate(name, settings).public_bytes(Encoding.PEM).decode() for name in names)

    def sign(self, key: str, message: bytes) -> bytes:
        r, s = decode_dss_signature(self.keys[key].sign(message, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")

    def collateral(self, settings: Settings) -> dict[str, str]:
        tcb_info = json.dumps(_tcb_info(settings), separators=(",", ":"))
        identity = json.dumps(_qe_identity(settings), separators=(",", ":"))
        signers = settings.signed_by
        return {
            "pck_crl_issuer_chain": self.chain(settings, "pck_ca", "root"),
            "root_ca_crl": self.crl("root_crl", settings).hex(),
            "pck_crl": self.crl("pck_crl", settings).hex(),
            "tcb_info_issuer_chain": self.chain(settings, "tcb", "root"),
            "tcb_info": tcb_info,
            "tcb_info_signature": self.sign(signers.get("tcb_info", "tcb"), tcb_info.encode()).hex(),
            "qe_identity_issuer_chain": self.chain(settings, "tcb", "root"),
            "qe_identity": identity,
            "qe_identity_signature": self.sign(signers.get("qe_identity", "tcb"), identity.encode()).hex(),
        }

    def quote(self, settings: Settings) -> bytes:
        tdx = settings.platform == "tdx"
        body = _td_report(settings) if tdx else enclave_report(**settings.report)
        if settings.version == 5:
            body = struct.pack("<HI", 3 if settings.td15 else 2, len(body)) + body
        signed = header(settings.version, tdx=tdx) + body
        point = self.keys["attestation"].public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]
        point = settings.attestation_key or point
        auth = settings.qe_auth_data
        qe = enclave_report(
            **{
                "attributes": bytes([0x15, *([0] * 7), 0xE7, *([0] * 7)]),
                "mr_signer": QE_SIGNER,
                "isv_prod_id": 2 if tdx else 1,
                "isv_svn": 4,
                "report_data": hashlib.sha256(point + auth).digest() + bytes(32),
                **settings.qe_report,
            }
        )
        chain = settings.certificates
        pem = (self.chain(settings, "pck", "pck_ca", "root") if chain is None else chain).encode() + b"\0"
        certification = (
            qe
            + self.sign(settings.signed_by.get("qe_report", "pck"), qe)
            + struct.pack("<H", len(auth))
            + auth
            + struct.pack("<HI", settings.certification_type, len(pem))
            + pem
        )
        if tdx:
            certification = struct.pack("<HI", 6, len(certification)) + certification
        data = self.sign(settings.signed_by.get("quote", "attestation"), signed) + point + certification
        return signed + struct.pack("<I", len(data)) + data + settings.after

    def make(self, settings: Settings | None = None, **changes: Any) -> Evidence:
        settings = Settings(**changes) if settings is None else settings
        root = self.certificate("root", settings).public_bytes(Encoding.DER)
        return Evidence(self.quote(settings), self.collateral(settings), root)


@cache
def intel() -> Intel:
    """The one that tests trust."""
    return Intel()


@cache
def other_intel() -> Intel:
    """An attacker's own."""
    return Intel()


def sgx(**changes: Any) -> Evidence:
    return intel().make(Settings(**changes))


def tdx(**changes: Any) -> Evidence:
    return intel().make(Settings(**{"platform": "tdx", "version": 4, **changes}))


def serial(name: str) -> int:
    return 0x1000 + CERTIFICATES.index(name) if name in CERTIFICATES else 0x2000


def header(version: int, *, tdx: bool) -> bytes:
    vendor = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
    return struct.pack("<HHIHH", version, 2, 0x81 if tdx else 0, 0, 0) + vendor + bytes(20)


def enclave_report(**fields: Any) -> bytes:
    """384 bytes; `flags` (an integer) may stand for `attributes`, which stay 64-bit, initialised, x87 to AMX."""
    flags = fields.pop("flags", 0x05)
    values = {
        "cpu_svn": CPU_SVN,
        "misc_select": 0,
        "isv_ext_prod_id": bytes(16),
        "attributes": struct.pack("<QQ", flags, fields.pop("xfrm", 0xE7)),
        "mr_enclave": MR_ENCLAVE,
        "mr_signer": MR_SIGNER,
        "config_id": bytes(64),
        "isv_prod_id": 3,
        "isv_svn": 9,
        "config_svn": 0,
        "isv_family_id": bytes(16),
        "report_data": REPORT_DATA,
        **fields,
    }
    layout = "<16sI12x16s16s32s32x32s32x64sHHH42x16s64s"
    return struct.pack(layout, *values.values())


def td_report(**fields: Any) -> bytes:
    """584 bytes; 648 with `tee_tcb_svn2` and `mr_service_td`."""
    values = {
        "tee_tcb_svn": TEE_TCB_SVN,
        "mr_seam": b"\xd1" * 48,
        "mr_signer_seam": bytes(48),
        "seam_attributes": bytes(8),
        "td_attributes": TD_ATTRIBUTES,
        "xfam": XFAM,
        "mr_td": b"\xd2" * 48,
        "mr_config_id": bytes(48),
        "mr_owner": b"\xd3" * 48,
        "mr_owner_config": b"\xd4" * 48,
        **{f"rtmr{index}": bytes([0xA0 + index]) * 48 for index in range(4)},
        "report_data": REPORT_DATA,
    }
    return b"".join({**values, **fields}.values())


def _td_report(settings: Settings) -> bytes:
    newer = {"tee_tcb_svn2": TEE_TCB_SVN, "mr_service_td": bytes(48)} if settings.td15 else {}
    return td_report(**{**newer, **settings.report})


def _tcb_info(settings: Settings) -> dict[str, Any]:
    tdx = settings.platform == "tdx"
    module = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
    info: dict[str, Any] = {
        "id": "TDX" if tdx else "SGX",
        "version": 3,
        "issueDate": iso(NOW - DAY),
        "nextUpdate": iso(NOW + 29 * DAY),
        "fmspc": FMSPC.hex(),
        "pceId": "0000",
        "tcbType": 0,
        "tcbEvaluationDataNumber": 18,
    }
    if tdx:
        info["tdxModule"] = module
        info["tdxModuleIdentities"] = [{"id": "TDX_01", **module, "tcbLevels": [svn_level(svn=3)]}]
    info["tcbLevels"] = [level(tdx=bytes([5, 0, 5, *([0] * 13)]) if tdx else None)]
    return {**info, **settings.tcb_info}


def _qe_identity(settings: Settings) -> dict[str, Any]:
    tdx = settings.platform == "tdx"
    identity = {
        "id": "TD_QE" if tdx else "QE",
        "version": 2,
        "issueDate": iso(NOW - DAY),
        "nextUpdate": iso(NOW + 29 * DAY),
        "tcbEvaluationDataNumber": 18,
        "miscselect": "00000000",
        "miscselectMask": "FFFFFFFF",
        "attributes": "11" + "00" * 15,
        "attributesMask": "FBFFFFFFFFFFFFFF0000000000000000",
        "mrsigner": QE_SIGNER.hex().upper(),
        "isvprodid": 2 if tdx else 1,
        "tcbLevels": [svn_level()],
    }
    return {**identity, **settings.qe_identity}


def iso(at: float) -> str:
    return _date(at).strftime("%Y-%m-%dT%H:%M:%SZ")


def _date(at: float) -> datetime:
    return datetime.fromtimestamp(at, UTC)


def _name(common_name: str) -> x509.Name:
    organisation = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Synthetic Corporation")
    return x509.Name([organisation, x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _usage(ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _der(tag: int, content: bytes) -> bytes:
    size = len(content)
    length = bytes([size]) if size < 128 else bytes([0x82]) + size.to_bytes(2, "big")
    return bytes([tag]) + length + content


def _oid(*last: int) -> bytes:
    return _der(0x06, bytes.fromhex("2a864886f84d010d01") + bytes(last))


def _entry(value: bytes, *last: int) -> bytes:
    return _der(0x30, _oid(*last) + value)


def _integer(value: int) -> bytes:
    return _der(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def _sgx_extension(settings: Settings) -> bytes:
    """PCK Certificate Profile, section 1.3.5: PPID, TCB, PCE id, FMSPC, SGX type, platform instance, configuration."""
    components = b"".join(_entry(_integer(svn), 2, index) for index, svn in enumerate(settings.cpu_svn, 1))
    tcb = components + _entry(_integer(settings.pce_svn), 2, 17) + _entry(_der(0x04, settings.cpu_svn), 2, 18)
    flags = b"".join(_entry(_der(0x01, b"\xff"), 7, index) for index in (1, 2, 3))
    return _der(
        0x30,
        _entry(_der(0x04, PPID), 1)
        + _entry(_der(0x30, tcb), 2)
        + _entry(_der(0x04, bytes(2)), 3)
        + _entry(_der(0x04, FMSPC), 4)
        + _entry(_der(0x0A, b"\x01"), 5)
        + _entry(_der(0x04, bytes(range(16))), 6)
        + _entry(_der(0x30, flags), 7),
    )
