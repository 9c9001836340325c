import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import dcap_qvl  # type: ignore[import-untyped]
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from tests.vendors import intel as vendor
from tests.vendors.intel import DAY, HOUR, NOW, Evidence, intel, other_intel
from tests.vendors.nvidia import der

from cloister.errors import MalformedEvidence, WrongUse
from cloister.evidence.intel import parse_pem_chain, parse_quote
from cloister.evidence.intel_collateral import parse_collateral
from cloister.verify import intel as verifier
from cloister.verify import intel_chain
from cloister.verify.intel import INTEL_ROOT_SHA256, judge_sgx, judge_tdx
from cloister.verify.intel_library import ask_library, library_policy
from cloister.verify.intel_tcb import check_status, join
from cloister.verify.platform import Appraisal, TcbLevel
from cloister.verify.policy import TCB_STATUSES, Limits, Policy, Tcb

VECTORS = Path(__file__).resolve().parents[2].parent / "shared" / "vectors"

TCB_SIGNER = "Intel SGX TCB Signing"
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551

ROOT = intel().make().root
TDX_LEVEL = bytes([5, 0, 5, *([0] * 13)])
MODULE = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}


class Credulous:
    """A library that believes everything: what is still refused, our own steps refuse."""

    def __init__(self, root: bytes | None = None) -> None:
        pass

    def verify_with_policy(self, *_: object) -> "Credulous":
        return self

    def to_json(self) -> str:
        return json.dumps({"tcb": {"status": "UpToDate", "advisory_ids": []}})


@pytest.fixture
def credulous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcap_qvl, "QuoteVerifier", Credulous)


def judge(evidence: Evidence, policy: Policy | None = None, *, now: float = NOW, **more: Any) -> Appraisal:
    """By the quote's own kind, under the vendor that tests trust."""
    which: Callable[..., Appraisal] = judge_tdx if evidence.quote[4] == 0x81 else judge_sgx
    return which(evidence.quote, evidence.collateral, policy=policy or Policy(), now=now, **{"root": ROOT, **more})


def failures(appraisal: Appraisal) -> set[str]:
    assert all(
        factor.expected and factor.got and factor.hint for factor in appraisal.factors if factor.verdict == "fail"
    )
    return {factor.step for factor in appraisal.factors if factor.verdict == "fail"}


def passes(appraisal: Appraisal) -> set[str]:
    return {factor.step for factor in appraisal.factors if factor.verdict == "pass"} - failures(appraisal)


GOOD = {
    "sgx": vendor.sgx(),
    "tdx 4": vendor.tdx(),
    "tdx 5": vendor.tdx(version=5),
    "tdx 5, report 1.5": vendor.tdx(version=5, td15=True),
    "tdx 4, padded": vendor.tdx(after=bytes(70)),
}
ALWAYS = {
    "evidence.root",
    "evidence.chain",
    "evidence.expired",
    "evidence.crl",
    "evidence.revoked",
    "evidence.collateral",
    "evidence.qe",
    "evidence.signature",
    "evidence.debug",
    "evidence.attributes",
    "evidence.agreement",
    "tcb.level",
    "tcb.status",
    "tcb.advisories",
    "tcb.evaluation",
}


@pytest.mark.parametrize("name", GOOD)
def test_genuine_evidence_passes_every_step(name: str) -> None:
    appraisal = judge(GOOD[name])
    steps = {"sgx": {"evidence.xfrm"}, "tdx": {"evidence.xfam", "evidence.sept-ve", "evidence.seam"}}[name[:3]]
    if "1.5" in name:
        steps.add("evidence.service-td")
    assert (failures(appraisal), passes(appraisal)) == (set(), ALWAYS | steps)
    assert (appraisal.report_data, appraisal.platform_id) == (vendor.REPORT_DATA, vendor.PPID.hex())
    assert (appraisal.platform, appraisal.simulated, appraisal.engine) == (name[:3], False, None)


@pytest.mark.parametrize("name", GOOD)
def test_a_genuine_quote_with_one_bit_flipped_is_refused(name: str) -> None:
    good = GOOD[name]
    for at in (100, 300, 450):
        quote = good.quote[:at] + bytes([good.quote[at] ^ 1]) + good.quote[at + 1 :]
        assert "evidence.signature" in failures(judge(replace(good, quote=quote)))


def test_measurements_of_an_enclave() -> None:
    assert dict(judge(GOOD["sgx"]).measurement) == {
        "mr_enclave": "e1" * 32,
        "mr_signer": "e2" * 32,
        "isv_prod_id": "3",
        "isv_svn": "9",
    }
    assert judge(GOOD["sgx"]).launch_sha256 is None


def test_measurements_of_a_trust_domain() -> None:
    assert dict(judge(GOOD["tdx 4"]).measurement) == {
        "mr_td": "d2" * 48,
        "mr_seam": "d1" * 48,
        "rtmr0": "a0" * 48,
        "rtmr1": "a1" * 48,
        "rtmr2": "a2" * 48,
        "rtmr3": "a3" * 48,
        "mr_config_id": "00" * 48,
        "mr_owner": "d3" * 48,
        "mr_owner_config": "d4" * 48,
        "td_attributes": vendor.TD_ATTRIBUTES.hex(),
        "xfam": vendor.XFAM.hex(),
    }


def test_says_what_ends_when_and_what_only_grows() -> None:
    evidence = vendor.tdx(
        validity={"pck": (NOW - DAY, NOW + DAY)},
        crl_dates={"pck_crl": (NOW - DAY, NOW + 3 * DAY)},
        qe_identity={"nextUpdate": vendor.iso(NOW + 2 * DAY), "tcbEvaluationDataNumber": 17},
        crl_number=12,
    )
    appraisal = judge(evidence)
    at = {expiry.what: (expiry.at - NOW) / DAY for expiry in appraisal.expiries}
    assert at == {
        "PCK certificate": 1,
        "PCK CA certificate": 300,
        "TCB signing certificate": 300,
        "root certificate": 300,
        "TCB info": 29,
        "QE identity": 2,
        "PCK revocation list": 3,
        "root revocation list": 29,
    }
    assert dict(appraisal.counters) == {
        "tcb-evaluation-data-number": 17,
        "pck-crl-platform": 12,
        "pck-crl-platform-issued": NOW - DAY,
        "root-crl": 12,
        "root-crl-issued": NOW - DAY,
    }
    assert appraisal.tcb is not None
    assert appraisal.tcb.date == 1793491200.0  # 2026-11-01: the level's own date


def test_a_revocation_list_that_goes_back_is_noticed_per_ca_though_its_number_stays() -> None:
    """As Intel numbers them: every list is number 1."""

    def counted(ca: str, since: float) -> dict[str, int]:
        dates = dict.fromkeys(("pck_crl", "root_crl"), (since, NOW + DAY))
        subjects = dict.fromkeys(("pck_ca", "pck_crl"), f"Intel SGX PCK {ca} CA")
        appraisal = judge(vendor.sgx(crl_number=1, crl_dates=dates, subjects=subjects))
        assert failures(appraisal) == set()
        return dict(appraisal.counters)

    newer, older = counted("Platform", NOW - DAY), counted("Platform", NOW - 2 * DAY)
    assert {name: seen - older[name] for name, seen in newer.items() if seen > older[name]} == {
        "pck-crl-platform-issued": DAY,
        "root-crl-issued": DAY,
    }
    assert counted("Processor", NOW - 3 * DAY).keys() - newer.keys() == {
        "pck-crl-processor",
        "pck-crl-processor-issued",
    }


@dataclass(frozen=True)
class Wrong:
    """What is set wrong, and exactly the steps that fail for it."""

    name: str
    steps: set[str]
    settings: dict[str, Any] = field(default_factory=dict)
    platforms: tuple[str, ...] = ("sgx", "tdx")
    parts: Callable[[Evidence], dict[str, str]] | None = None

    def evidence(self, platform: str) -> Evidence:
        made = (vendor.tdx if platform == "tdx" else vendor.sgx)(**self.settings)
        return made if self.parts is None else made.with_parts(**self.parts(made))


def chain(*names: str, **settings: Any) -> str:
    return intel().chain(vendor.Settings(**settings), *names)


def flipped(name: str) -> Callable[[Evidence], dict[str, str]]:
    def change(evidence: Evidence) -> dict[str, str]:
        text = evidence.parts[name]
        return {name: text[:-2] + f"{int(text[-2:], 16) ^ 1:02x}"}

    return change


def signed_in_an_unknown_way(evidence: Evidence) -> dict[str, str]:
    known = "06082a8648ce3d040302"
    assert evidence.parts["pck_crl"].count(known) == 2
    return {"pck_crl": evidence.parts["pck_crl"].replace(known, known[:-2] + "7f")}


def without_end(evidence: Evidence) -> dict[str, str]:
    """RFC 5280 lets nextUpdate be left out; pyca makes no such list."""
    tbs = x509.load_der_x509_crl(bytes.fromhex(evidence.parts["pck_crl"])).tbs_certlist_bytes
    time = b"\x17\x0d"
    second = tbs.index(time, tbs.index(time) + 2)
    tbs = der(0x30, tbs[2 + (tbs[1] & 0x7F) : second] + tbs[second + 15 :])
    algorithm = bytes.fromhex("300a06082a8648ce3d040302")
    signature = intel().keys["pck_ca"].sign(tbs, ec.ECDSA(hashes.SHA256()))
    return {"pck_crl": der(0x30, tbs, algorithm, der(0x03, b"\0" + signature)).hex()}


def tdx_report(**fields: bytes) -> dict[str, Any]:
    return {"settings": {"report": fields}, "platforms": ("tdx",)}


def sgx_report(**fields: Any) -> dict[str, Any]:
    return {"settings": {"report": fields}, "platforms": ("sgx",)}


def td_attributes(*bits: int) -> bytes:
    return sum(1 << bit for bit in bits).to_bytes(8, "little")


def td15(**fields: bytes) -> dict[str, Any]:
    return {"settings": {"version": 5, "td15": True, "report": fields}, "platforms": ("tdx",)}


OTHER_POINT = (
    ec.derive_private_key(7, ec.SECP256R1())
    .public_key()
    .public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]
)
QE_ATTRIBUTES = bytes([0x15, *([0] * 7), 0xE7, *([0] * 7)])

WRONG = [
    Wrong("PCK revoked", {"evidence.revoked"}, {"revoked": frozenset({"pck"})}),
    Wrong("PCK CA revoked", {"evidence.revoked"}, {"revoked": frozenset({"pck_ca"})}),
    Wrong("TCB signer revoked", {"evidence.revoked"}, {"revoked": frozenset({"tcb"})}),
    Wrong("root revoked", {"evidence.revoked"}, {"revoked": frozenset({"root"})}),
    Wrong("PCK signed by another", {"evidence.chain"}, {"signed_by": {"pck": "other"}}),
    Wrong("PCK signed by the root", {"evidence.chain"}, {"signed_by": {"pck": "root"}}),
    Wrong("PCK CA signed by another", {"evidence.chain"}, {"signed_by": {"pck_ca": "other"}}),
    Wrong("TCB signer signed by another", {"evidence.chain"}, {"signed_by": {"tcb": "other"}}),
    Wrong("TCB signer signed by the PCK CA", {"evidence.chain"}, {"signed_by": {"tcb": "pck_ca"}}),
    Wrong("PCK CA of another kind", {"evidence.chain"}, {"subjects": {"pck_ca": "Intel SGX TCB Signing"}}),
    Wrong("TCB signer of another kind", {"evidence.chain"}, {"subjects": {"tcb": "Intel SGX PCK Certificate"}}),
    Wrong("PCK without SGX extension", {"evidence.chain"}, {"pck_extension": False}),
    Wrong("PCK chain without root", {"evidence.chain"}, {"certificates": chain("pck", "pck_ca")}),
    Wrong(
        "PCK chain out of order",
        {"evidence.chain", "evidence.root", "evidence.crl", "evidence.qe"},
        {"certificates": chain("root", "pck_ca", "pck")},
    ),
    Wrong("PCK chain that is no PEM", {"evidence.chain"}, {"certificates": "-----BEGIN"}),
    Wrong("certification data of another type", {"evidence.chain"}, {"certification_type": 3}),
    Wrong("PCK CRL of another CA", {"evidence.crl"}, {"signed_by": {"pck_crl": "root"}}),
    Wrong("root CRL of another CA", {"evidence.crl"}, {"signed_by": {"root_crl": "pck_ca"}}),
    Wrong("PCK CRL in another name", {"evidence.crl"}, {"subjects": {"pck_crl": "Intel SGX PCK Processor CA"}}),
    Wrong("CRLs of limited scope", {"evidence.crl"}, {"crl_critical": True}),
    Wrong("a CRL signed in an unknown way", {"evidence.crl"}, parts=signed_in_an_unknown_way),
    Wrong("a CRL that never ends", {"evidence.crl"}, parts=without_end),
    Wrong(
        "TCB signer that is a CA",
        {"evidence.chain"},
        {"signed_by": {"tcb_info": "pck_ca"}},
        parts=lambda _: {"tcb_info_issuer_chain": chain("pck_ca", "root", subjects={"pck_ca": TCB_SIGNER})},
    ),
    Wrong("TCB chain without root", {"evidence.chain"}, parts=lambda _: {"tcb_info_issuer_chain": chain("tcb")}),
    Wrong("QE chain without root", {"evidence.chain"}, parts=lambda _: {"qe_identity_issuer_chain": chain("tcb")}),
    Wrong("PCK CA that is no CA", {"evidence.chain"}, {"no_ca": frozenset({"pck_ca"})}),
    Wrong("no PCK CRL", {"evidence.crl"}, parts=lambda _: {"pck_crl": ""}),
    Wrong("no root CRL", {"evidence.crl"}, parts=lambda _: {"root_ca_crl": ""}),
    Wrong("CRLs exchanged", {"evidence.crl"}, parts=lambda e: {"root_ca_crl": e.parts["pck_crl"]}),
    Wrong("CRL with a flipped bit", {"evidence.crl"}, parts=flipped("pck_crl")),
    Wrong("TCB info signed by another", {"evidence.collateral"}, {"signed_by": {"tcb_info": "other"}}),
    Wrong("TCB info signed by the PCK", {"evidence.collateral"}, {"signed_by": {"tcb_info": "pck"}}),
    Wrong("TCB info's signature flipped", {"evidence.collateral"}, parts=flipped("tcb_info_signature")),
    Wrong("TCB info's signature zero", {"evidence.collateral"}, parts=lambda _: {"tcb_info_signature": "00" * 64}),
    Wrong("QE identity signed by another", {"evidence.collateral"}, {"signed_by": {"qe_identity": "other"}}),
    Wrong("QE identity's signature flipped", {"evidence.collateral"}, parts=flipped("qe_identity_signature")),
    Wrong("TCB info version 2", {"evidence.collateral"}, {"tcb_info": {"version": 2}}),
    Wrong("TCB info that is no JSON", {"evidence.collateral"}, parts=lambda _: {"tcb_info": "{"}),
    Wrong("QE identity that is no JSON", {"evidence.collateral"}, parts=lambda _: {"qe_identity": "\ud800"}),
    Wrong("TCB issuers that are no PEM", {"evidence.collateral"}, parts=lambda _: {"tcb_info_issuer_chain": "é"}),
    Wrong("another FMSPC", {"evidence.collateral"}, {"tcb_info": {"fmspc": "00906ed50001"}}),
    Wrong("another PCE", {"evidence.collateral"}, {"tcb_info": {"pceId": "0100"}}),
    Wrong("the other platform's QE identity", {"evidence.collateral"}, {"qe_identity": {"id": "TD_QE"}}, ("sgx",)),
    Wrong("the other platform's QE identity", {"evidence.collateral"}, {"qe_identity": {"id": "QE"}}, ("tdx",)),
    Wrong("QE report signed by another", {"evidence.qe"}, {"signed_by": {"qe_report": "other"}}),
    Wrong("another QE's signer", {"evidence.qe"}, {"qe_report": {"mr_signer": bytes(32)}}),
    Wrong("another QE product", {"evidence.qe"}, {"qe_report": {"isv_prod_id": 9}}),
    Wrong("QE with MISCSELECT", {"evidence.qe"}, {"qe_report": {"misc_select": 1}}),
    Wrong("QE in debug mode", {"evidence.qe"}, {"qe_report": {"attributes": bytes([0x17]) + QE_ATTRIBUTES[1:]}}),
    Wrong(
        "QE in debug mode, which its identity does not mask",
        {"evidence.qe"},
        {
            "qe_report": {"attributes": bytes([0x17]) + QE_ATTRIBUTES[1:]},
            "qe_identity": {"attributesMask": "00" * 16},
        },
    ),
    Wrong("QE without provisioning key", {"evidence.qe"}, {"qe_report": {"attributes": b"\x05" + QE_ATTRIBUTES[1:]}}),
    Wrong("QE report names another key", {"evidence.qe"}, {"qe_report": {"report_data": bytes(64)}}),
    Wrong("another attestation key", {"evidence.signature"}, {"attestation_key": OTHER_POINT}),
    Wrong("attestation key off the curve", {"evidence.signature"}, {"attestation_key": b"\1" * 64}),
    Wrong("quote signed by another", {"evidence.signature"}, {"signed_by": {"quote": "other"}}),
    Wrong("quote signed by the PCK", {"evidence.signature"}, {"signed_by": {"quote": "pck"}}),
    Wrong("TCB revoked", {"evidence.revoked"}, {"tcb_info": {"tcbLevels": [vendor.level("Revoked")]}}, ("sgx",)),
    Wrong(
        "TCB revoked",
        {"evidence.revoked"},
        {"tcb_info": {"tcbLevels": [vendor.level("Revoked", tdx=TDX_LEVEL)]}},
        ("tdx",),
    ),
    Wrong("QE revoked", {"evidence.revoked"}, {"qe_identity": {"tcbLevels": [vendor.svn_level("Revoked")]}}),
    Wrong("QE below all", {"tcb.level"}, {"qe_identity": {"tcbLevels": [vendor.svn_level(svn=5)]}}),
    Wrong("CPU below all", {"tcb.level"}, {"cpu_svn": bytes([5] * 15 + [4])}),
    Wrong("PCE below all", {"tcb.level"}, {"pce_svn": 10}),
    Wrong("no level", {"tcb.level"}, {"tcb_info": {"tcbLevels": []}}),
    Wrong("debug enclave", {"evidence.debug"}, **sgx_report(flags=0x07)),
    Wrong("enclave not initialised", {"evidence.attributes"}, **sgx_report(flags=0x04)),
    Wrong("32-bit enclave", {"evidence.attributes"}, **sgx_report(flags=0x01)),
    Wrong("enclave with provisioning key", {"evidence.attributes"}, **sgx_report(flags=0x15)),
    Wrong("enclave with launch key", {"evidence.attributes"}, **sgx_report(flags=0x25)),
    Wrong("enclave with a reserved attribute", {"evidence.attributes"}, **sgx_report(flags=0x0D)),
    Wrong("enclave without SSE", {"evidence.xfrm"}, **sgx_report(xfrm=0x01)),
    Wrong("enclave with unknown features", {"evidence.xfrm"}, **sgx_report(xfrm=1 << 40 | 3)),
    Wrong("debug domain", {"evidence.debug"}, **tdx_report(td_attributes=td_attributes(0, 28))),
    Wrong("profiled domain", {"evidence.debug"}, **tdx_report(td_attributes=td_attributes(5, 28))),
    Wrong("SEPT_VE_DISABLE clear", {"evidence.sept-ve"}, **tdx_report(td_attributes=td_attributes(30))),
    Wrong("migratable domain", {"evidence.attributes"}, **tdx_report(td_attributes=td_attributes(28, 29))),
    Wrong("reserved attribute", {"evidence.attributes"}, **tdx_report(td_attributes=td_attributes(28, 12))),
    Wrong("reserved high attribute", {"evidence.attributes"}, **tdx_report(td_attributes=td_attributes(28, 40))),
    Wrong("XFAM without SSE", {"evidence.xfam"}, **tdx_report(xfam=b"\x01" + bytes(7))),
    Wrong("XFAM unknown", {"evidence.xfam"}, **tdx_report(xfam=b"\xe7" + bytes(6) + b"\x01")),
    Wrong("service TD", {"evidence.service-td"}, **td15(mr_service_td=b"\1" + bytes(47))),
    Wrong("another module's signer", {"evidence.seam"}, **tdx_report(mr_signer_seam=b"\1" * 48)),
    Wrong("debug module", {"evidence.seam"}, **tdx_report(seam_attributes=b"\1" + bytes(7))),
    Wrong(
        "module attribute outside the mask",
        {"evidence.seam"},
        {
            "report": {"seam_attributes": b"\1" + bytes(7)},
            "tcb_info": {
                "tdxModuleIdentities": [
                    {"id": "TDX_01", **MODULE, "attributesMask": "00" * 8, "tcbLevels": [vendor.svn_level(svn=3)]}
                ]
            },
        },
        ("tdx",),
    ),
    Wrong("unknown module", {"evidence.seam", "tcb.level"}, **tdx_report(tee_tcb_svn=bytes([5, 9, 5]) + bytes(13))),
    Wrong("module below all", {"tcb.level"}, **tdx_report(tee_tcb_svn=bytes([2, 1, 5]) + bytes(13))),
    Wrong("TDX microcode below all", {"tcb.level"}, **tdx_report(tee_tcb_svn=bytes([5, 1, 4]) + bytes(13))),
    Wrong("first module below all", {"tcb.level"}, **tdx_report(tee_tcb_svn=bytes([4, 0, 5]) + bytes(13))),
    Wrong("running TCB below all", {"tcb.level"}, **td15(tee_tcb_svn2=bytes([5, 1, 4]) + bytes(13))),
    Wrong("running module below all", {"tcb.level"}, **td15(tee_tcb_svn2=bytes([2, 1, 5]) + bytes(13))),
    Wrong("running module unknown", {"tcb.level"}, **td15(tee_tcb_svn2=bytes([5, 9, 5]) + bytes(13))),
    Wrong("bytes after the quote", {"evidence.trailing"}, {"after": bytes(8) + b"x"}, ("tdx",)),
]
CASES = [
    pytest.param(wrong, platform, id=f"{platform}: {wrong.name}") for wrong in WRONG for platform in wrong.platforms
]


@pytest.mark.parametrize(("wrong", "platform"), CASES)
@pytest.mark.usefixtures("credulous")
def test_each_fault_fails_in_its_own_step_whatever_the_library_says(wrong: Wrong, platform: str) -> None:
    assert failures(judge(wrong.evidence(platform))) == wrong.steps


@pytest.mark.usefixtures("credulous")
def test_one_more_chain_of_another_vendor_fails_as_root_alone() -> None:
    """A self-made chain is right in itself; only the pinned root tells."""
    evidence = other_intel().make(vendor.Settings())
    assert failures(judge(evidence, root=evidence.root)) == set()
    assert failures(judge(evidence)) == {"evidence.root"}
    assert failures(judge(evidence, root=None)) == {"evidence.root"}


def test_a_root_of_another_vendor_fails_before_the_library_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcap_qvl, "QuoteVerifier", None)
    assert failures(judge(GOOD["sgx"], root=None)) == {"evidence.root"}


@pytest.mark.parametrize("text", ["\ud800", "é"])
def test_a_chain_that_is_only_handed_on_is_text_of_certificates(text: str) -> None:
    evidence = GOOD["sgx"].with_parts(pck_crl_issuer_chain=text)
    with pytest.raises(MalformedEvidence, match="pck_crl_issuer_chain"):
        judge(evidence)


def test_what_the_library_cannot_even_take_it_refuses() -> None:
    collateral = replace(parse_collateral(GOOD["sgx"].collateral), pck_crl_issuer_chain="\ud800")
    factor, level = ask_library(GOOD["sgx"].quote, collateral, None, now=NOW, root=GOOD["sgx"].root)
    assert (factor.step, factor.verdict, level) == ("evidence.agreement", "fail", None)


@pytest.mark.parametrize("name", ["tcb_info_issuer_chain", "qe_identity_issuer_chain"])
@pytest.mark.usefixtures("credulous")
def test_collateral_under_another_root_fails(name: str) -> None:
    other = other_intel().make(vendor.Settings())
    signed = {name: other.parts[name]}
    piece = name.removesuffix("_issuer_chain")
    for part in (piece, f"{piece}_signature"):
        signed[part] = other.parts[part]
    got = failures(judge(GOOD["sgx"].with_parts(**signed)))
    assert got == {"evidence.root", "evidence.chain"}


@pytest.mark.usefixtures("credulous")
def test_a_pck_key_cannot_sign_collateral() -> None:
    """Whoever extracted one platform's key would rate all platforms: the chain is genuine, its kind is not."""
    evidence = vendor.sgx(signed_by={"tcb_info": "pck"})
    stolen = {"tcb_info_issuer_chain": chain("pck", "root")}
    assert failures(judge(evidence.with_parts(**stolen))) == {"evidence.chain"}
    stolen = {"tcb_info_issuer_chain": chain("pck", "pck_ca")}
    assert failures(judge(evidence.with_parts(**stolen))) == {"evidence.root", "evidence.chain"}


@pytest.mark.usefixtures("credulous")
def test_another_platforms_leaf_does_not_fit() -> None:
    swapped = intel().chain(vendor.Settings(), "tcb", "pck_ca", "root")
    assert failures(judge(vendor.sgx(certificates=swapped))) == {"evidence.chain", "evidence.qe"}


@pytest.mark.parametrize("signature", ["quote", "qe_report"])
@pytest.mark.parametrize("name", ["sgx", "tdx 4"])
@pytest.mark.usefixtures("credulous")
def test_a_zero_signature_is_refused(signature: str, name: str) -> None:
    quote = bytearray(GOOD[name].quote)
    start = len(parse_quote(bytes(quote)).signed) + 4
    at = start if signature == "quote" else quote.index(parse_quote(bytes(quote)).qe_report_signature)
    quote[at : at + 64] = bytes(64)
    step = "evidence.signature" if signature == "quote" else "evidence.qe"
    assert failures(judge(replace(GOOD[name], quote=bytes(quote)))) == {step}


@pytest.mark.usefixtures("credulous")
def test_certificates_on_another_curve_are_refused() -> None:
    for name in ("pck", "pck_ca", "tcb"):
        maker = vendor.Intel()
        maker.keys[name] = ec.generate_private_key(ec.SECP384R1())
        settings = vendor.Settings(signed_by={"qe_report": "other", "tcb_info": "other", "qe_identity": "other"})
        evidence = maker.make(settings)
        assert "evidence.chain" in failures(judge(evidence, root=evidence.root))


@pytest.mark.usefixtures("credulous")
def test_keys_of_another_kind_are_refused() -> None:
    """Even where what they signed is right: nothing but ECDSA on P-256 is Intel's."""
    maker, other = vendor.Intel(), rsa.generate_private_key(65537, 2048)
    maker.keys["pck_ca"] = other  # type: ignore[assignment]
    evidence = maker.make(vendor.Settings())
    assert failures(judge(evidence, root=evidence.root)) == {"evidence.chain", "evidence.crl"}


@pytest.mark.usefixtures("credulous")
def test_the_qe_identity_may_have_a_signer_of_its_own_which_has_its_time() -> None:
    own = chain("tcb", "root", validity={"tcb": (NOW - HOUR, NOW + HOUR)})
    evidence = GOOD["sgx"].with_parts(qe_identity_issuer_chain=own)
    assert failures(judge(evidence)) == set()
    late = judge(evidence, now=NOW + HOUR)
    (factor,) = [factor for factor in late.factors if factor.verdict == "fail"]
    assert (factor.step, factor.expected) == ("evidence.expired", "QE identity signing certificate valid now")


# All at once


def forged(platform: str, *, root: bool = True, revoked: bool = True, old: bool = True, zero: bool = True) -> Evidence:
    """A chain under a root of its own inside the quote, a revoked TCB, TCB info of 900 days ago, a zero signature."""
    level = vendor.level("Revoked", tdx=TDX_LEVEL if platform == "tdx" else None)
    tcb_info: dict[str, Any] = {"tcbLevels": [level]} if revoked else {}
    if old:
        tcb_info |= {"issueDate": vendor.iso(NOW - 930 * DAY), "nextUpdate": vendor.iso(NOW - 900 * DAY)}
    maker, version = other_intel() if root else intel(), 4 if platform == "tdx" else 3
    made = maker.make(vendor.Settings(platform=platform, version=version, tcb_info=tcb_info))
    at = len(parse_quote(made.quote).signed) + 4
    return replace(made, quote=made.quote[:at] + bytes(64) + made.quote[at + 64 :]) if zero else made


FAULTS = {
    "root": "evidence.root",
    "revoked": "evidence.revoked",
    "old": "evidence.expired",
    "zero": "evidence.signature",
}


@pytest.mark.parametrize("platform", ["sgx", "tdx"])
@pytest.mark.parametrize("library", ["asked", "credulous"])
def test_what_others_accepted_all_at_once_is_refused_each_by_its_own_factor(
    request: pytest.FixtureRequest, platform: str, library: str
) -> None:
    if library == "credulous":
        request.getfixturevalue("credulous")
    assert failures(judge(forged(platform))) == set(FAULTS.values())
    for left in FAULTS:
        alone = {name: name == left for name in FAULTS}
        assert failures(judge(forged(platform, **alone))) == {FAULTS[left]}
    appraisal = judge(forged(platform))
    assert "900.0 days ago" in [factor.got for factor in appraisal.factors if factor.step == "evidence.expired"]
    assert failures(judge(forged(platform, **dict.fromkeys(FAULTS, False)))) == set()


# Time


BOUNDED = (*vendor.CERTIFICATES, "pck_crl", "root_crl", "tcb_info", "qe_identity")


def bounded(name: str, since: float, until: float) -> dict[str, Any]:
    if name in vendor.CERTIFICATES:
        return {"validity": {name: (since, until)}}
    if name in ("pck_crl", "root_crl"):
        return {"crl_dates": {name: (since, until)}}
    return {name: {"issueDate": vendor.iso(since), "nextUpdate": vendor.iso(until)}}


@pytest.mark.parametrize("platform", ["sgx", "tdx"])
@pytest.mark.parametrize("name", BOUNDED)
def test_each_piece_is_judged_at_its_own_time(name: str, platform: str) -> None:
    since, until = NOW - HOUR, NOW + HOUR
    make = vendor.tdx if platform == "tdx" else vendor.sgx
    evidence = make(**bounded(name, since, until))
    times = {since - 1: False, since: True, until - 1: True, until - 0.5: True, until: False, until + DAY: False}
    got = {at: failures(judge(evidence, now=at, root=evidence.root)) for at in times}
    assert got == {at: set() if fine else {"evidence.expired"} for at, fine in times.items()}


@pytest.mark.usefixtures("credulous")
def test_collateral_of_900_days_ago_is_refused() -> None:
    got = failures(judge(GOOD["sgx"], now=NOW + 900 * DAY))
    assert got == {"evidence.expired"}


def test_says_each_piece_that_is_over() -> None:
    factors = [f for f in judge(GOOD["tdx 4"], now=NOW + 30 * DAY).factors if f.step == "evidence.expired"]
    pieces = ["TCB info", "QE identity", "PCK revocation list", "root revocation list"]
    assert [(f.expected, f.got) for f in factors] == [(f"{piece} valid now", "1.0 days ago") for piece in pieces]


@pytest.mark.parametrize(("days", "steps"), [(None, set()), (6, set()), (5, set()), (4, {"evidence.crl"})])
@pytest.mark.parametrize("name", ["pck_crl", "root_crl"])
def test_revocation_lists_have_a_greatest_age(name: str, days: int | None, steps: set[str]) -> None:
    evidence = vendor.tdx(crl_dates={name: (NOW - 5 * DAY, NOW + 100 * DAY)})
    assert failures(judge(evidence, Policy(limits=Limits(max_crl_age_days=days)))) == steps


@pytest.mark.parametrize("now", [float("nan"), float("inf"), -1.0, 2.0**41])
def test_a_time_that_is_none_is_wrong_use(now: float) -> None:
    with pytest.raises(WrongUse):
        judge(GOOD["sgx"], now=now)


# TCB


TOLERABLE = ("SWHardeningNeeded", "ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded")
OLD = ("OutOfDate", "OutOfDateConfigurationNeeded")


def rated(platform: str, status: str, **more: Any) -> Evidence:
    level = vendor.level(status, tdx=TDX_LEVEL if platform == "tdx" else None, **more)
    return (vendor.tdx if platform == "tdx" else vendor.sgx)(tcb_info={"tcbLevels": [level]})


@pytest.mark.parametrize("platform", ["sgx", "tdx"])
@pytest.mark.parametrize("status", [*TOLERABLE, *OLD])
def test_a_status_that_is_not_up_to_date_fails_there_alone_unless_tolerated(platform: str, status: str) -> None:
    evidence = rated(platform, status, advisoryIDs=["INTEL-SA-00615"])
    appraisal = judge(evidence)
    assert failures(appraisal) == {"tcb.status"}
    assert appraisal.tcb is not None
    assert (appraisal.tcb.status, appraisal.tcb.advisories) == (status, ("INTEL-SA-00615",))
    assert failures(judge(evidence, Policy(tcb=Tcb(tolerate=frozenset({status}))))) == set()
    other = "ConfigurationNeeded" if status != "ConfigurationNeeded" else "OutOfDate"
    assert failures(judge(evidence, Policy(tcb=Tcb(tolerate=frozenset({other}))))) == {"tcb.status"}


@pytest.mark.parametrize("platform", ["sgx", "tdx"])
def test_revoked_is_never_tolerated(platform: str) -> None:
    appraisal = judge(rated(platform, "Revoked"), Policy(tcb=Tcb(tolerate=frozenset(TCB_STATUSES))))
    assert failures(appraisal) == {"evidence.revoked"}
    assert "tcb.status" not in passes(appraisal)
    tolerant = Tcb(tolerate=frozenset({"Revoked"}))  # which no policy can say
    assert [factor.verdict for factor in check_status(TcbLevel("Revoked"), tolerant)] == ["fail", "pass"]


def test_a_status_that_intel_may_add_counts_as_the_worst() -> None:
    policy = Policy(tcb=Tcb(tolerate=frozenset(TCB_STATUSES)))
    got = failures(judge(rated("sgx", "Novel"), policy))
    assert got == {"tcb.status", "evidence.collateral"}  # the library knows no such word


@pytest.mark.usefixtures("credulous")
def test_an_unknown_status_is_not_covered_by_a_known_one() -> None:
    evidence = vendor.sgx(qe_identity={"tcbLevels": [vendor.svn_level("Novel")]})
    appraisal = judge(evidence)
    assert failures(appraisal) == {"tcb.status"}
    assert appraisal.tcb is not None
    assert appraisal.tcb.status == "Novel"


def test_advisories_are_tolerated_one_by_one() -> None:
    evidence = rated("sgx", "SWHardeningNeeded", advisoryIDs=["INTEL-SA-00001", "INTEL-SA-00002"])
    tolerate = frozenset({"SWHardeningNeeded"})
    one = Policy(tcb=Tcb(tolerate=tolerate, tolerate_advisories=frozenset({"INTEL-SA-00001"})))
    both = Policy(tcb=Tcb(tolerate=tolerate, tolerate_advisories=frozenset({"INTEL-SA-00001", "INTEL-SA-00002"})))
    none = Policy(tcb=Tcb(tolerate=tolerate, tolerate_advisories=frozenset()))
    assert [failures(judge(evidence, policy)) for policy in (one, both, none)] == [
        {"tcb.advisories"},
        set(),
        {"tcb.advisories"},
    ]
    factor = next(factor for factor in judge(evidence, one).factors if factor.step == "tcb.advisories")
    assert (factor.expected, factor.got) == ("INTEL-SA-00001", "INTEL-SA-00002")


@pytest.mark.parametrize(("floor", "steps"), [(None, set()), (16, set()), (17, set()), (18, {"tcb.evaluation"})])
@pytest.mark.parametrize("piece", ["tcb_info", "qe_identity"])
def test_the_lower_evaluation_number_counts(piece: str, floor: int | None, steps: set[str]) -> None:
    evidence = vendor.tdx(**{piece: {"tcbEvaluationDataNumber": 17}})
    appraisal = judge(evidence, Policy(tcb=Tcb(min_tcb_evaluation_data_number=floor)))
    assert failures(appraisal) == steps
    assert appraisal.counters["tcb-evaluation-data-number"] == 17


def test_the_first_level_that_is_reached_counts() -> None:
    levels = [vendor.level(svn=6), vendor.level("OutOfDate", svn=5), vendor.level("SWHardeningNeeded", svn=1)]
    levels[1]["tcbDate"] = "2025-05-01T00:00:00Z"
    appraisal = judge(vendor.sgx(tcb_info={"tcbLevels": levels}))
    assert appraisal.tcb is not None
    assert (appraisal.tcb.status, appraisal.tcb.date) == ("OutOfDate", 1746057600.0)


def test_an_old_quoting_enclave_makes_the_platform_old() -> None:
    levels = [vendor.svn_level(svn=5), vendor.svn_level("OutOfDate", svn=4, advisoryIDs=["INTEL-SA-00615"])]
    appraisal = judge(vendor.sgx(qe_identity={"tcbLevels": levels}))
    assert failures(appraisal) == {"tcb.status"}
    assert appraisal.tcb is not None
    assert (appraisal.tcb.status, appraisal.tcb.advisories) == ("OutOfDate", ("INTEL-SA-00615",))


def test_an_old_module_makes_the_platform_old() -> None:
    identity = {"id": "TDX_01", **MODULE, "tcbLevels": [vendor.svn_level(svn=6), vendor.svn_level("OutOfDate", svn=3)]}
    appraisal = judge(vendor.tdx(tcb_info={"tdxModuleIdentities": [identity]}))
    assert failures(appraisal) == {"tcb.status"}


def test_the_first_generation_of_modules_is_rated_with_the_platform() -> None:
    report = {"tee_tcb_svn": bytes([5, 0, 5]) + bytes(13)}
    assert failures(judge(vendor.tdx(report=report))) == set()
    assert failures(judge(vendor.tdx(report=report, tcb_info={"tdxModuleIdentities": []}))) == set()


@pytest.mark.usefixtures("credulous")
def test_where_intel_names_no_generations_of_modules_there_is_one() -> None:
    assert failures(judge(vendor.tdx(tcb_info={"tdxModuleIdentities": []}))) == set()


def test_later_generations_of_modules_are_rated_by_their_own_identity() -> None:
    """4 is below the platform level's 5, which counts for the first generation alone."""
    assert failures(judge(vendor.tdx(report={"tee_tcb_svn": bytes([4, 1, 5]) + bytes(13)}))) == set()


def test_a_domain_launched_on_older_firmware_should_be_launched_anew() -> None:
    """TD report 1.5: launched on a level that is out of date by now, running on the newest (a TD-preserving update)."""
    levels = [vendor.level(tdx=TDX_LEVEL), vendor.level("OutOfDate", tdx=bytes([3, 0, 3]) + bytes(13))]
    identity = {"id": "TDX_01", **MODULE, "tcbLevels": [vendor.svn_level(svn=5), vendor.svn_level("OutOfDate", svn=3)]}
    evidence = vendor.tdx(
        version=5,
        td15=True,
        report={"tee_tcb_svn": bytes([3, 1, 5]) + bytes(13)},
        tcb_info={"tcbLevels": levels, "tdxModuleIdentities": [identity]},
    )
    appraisal = judge(evidence)
    assert failures(appraisal) == {"tcb.status"}
    assert appraisal.tcb is not None
    assert appraisal.tcb.status == "TDRelaunchAdvised"


def launched_on(platform: str, module: str, running: str = "UpToDate", qe: str = "UpToDate") -> Evidence:
    """TD report 1.5: words for what it was launched on, what it runs on, and the quoting enclave."""
    levels = [vendor.level(running, tdx=TDX_LEVEL), vendor.level(platform, tdx=bytes([3, 0, 3]) + bytes(13))]
    identity = {"id": "TDX_01", **MODULE, "tcbLevels": [vendor.svn_level(svn=5), vendor.svn_level(module, svn=3)]}
    return vendor.tdx(
        version=5,
        td15=True,
        report={"tee_tcb_svn": bytes([3, 1, 3]) + bytes(13)},
        tcb_info={"tcbLevels": levels, "tdxModuleIdentities": [identity]},
        qe_identity={"tcbLevels": [vendor.svn_level(qe)]},
    )


@pytest.mark.parametrize(
    ("evidence", "status"),
    [
        (launched_on("OutOfDate", "OutOfDate"), "TDRelaunchAdvised"),
        (launched_on("OutOfDate", "UpToDate", "SWHardeningNeeded"), "TDRelaunchAdvised"),
        (launched_on("UpToDate", "OutOfDate"), "TDRelaunchAdvised"),
        (launched_on("OutOfDateConfigurationNeeded", "UpToDate"), "TDRelaunchAdvisedConfigurationNeeded"),
        (launched_on("OutOfDate", "OutOfDate", "ConfigurationNeeded"), "TDRelaunchAdvisedConfigurationNeeded"),
        (launched_on("OutOfDate", "OutOfDate", qe="ConfigurationNeeded"), "TDRelaunchAdvisedConfigurationNeeded"),
        (launched_on("OutOfDate", "OutOfDate", qe="OutOfDate"), "OutOfDate"),
        (launched_on("OutOfDate", "OutOfDate", qe="OutOfDateConfigurationNeeded"), "OutOfDateConfigurationNeeded"),
        (launched_on("OutOfDate", "OutOfDate", "ConfigurationNeeded", "OutOfDate"), "OutOfDateConfigurationNeeded"),
        (launched_on("OutOfDate", "OutOfDate", "OutOfDate"), "OutOfDate"),
        (launched_on("SWHardeningNeeded", "UpToDate", "ConfigurationNeeded"), "ConfigurationAndSWHardeningNeeded"),
    ],
)
@pytest.mark.parametrize("library", ["asked", "credulous"])
def test_the_advice_to_launch_anew_hides_nothing(
    request: pytest.FixtureRequest, evidence: Evidence, status: str, library: str
) -> None:
    if library == "credulous":
        request.getfixturevalue("credulous")
    appraisal = judge(evidence)
    assert appraisal.tcb is not None
    assert (failures(appraisal), appraisal.tcb.status) == ({"tcb.status"}, status)
    advised = Policy(tcb=Tcb(tolerate=frozenset({"TDRelaunchAdvised"})))
    assert failures(judge(evidence, advised)) == (set() if status == "TDRelaunchAdvised" else {"tcb.status"})


@pytest.mark.parametrize("status", ["Revoked", "Novel"])
@pytest.mark.usefixtures("credulous")
def test_what_has_no_standing_is_never_advised_to_launch_anew(status: str) -> None:
    step = {"Revoked": "evidence.revoked", "Novel": "tcb.status"}[status]
    assert failures(judge(launched_on(status, "OutOfDate"))) == {step}
    assert failures(judge(launched_on("OutOfDate", "OutOfDate", status))) == {step}
    assert failures(judge(launched_on("OutOfDate", "OutOfDate", qe=status))) == {step}


@pytest.mark.parametrize(
    ("statuses", "joined"),
    [
        ("UpToDate", "UpToDate"),
        ("UpToDate OutOfDate SWHardeningNeeded", "OutOfDate"),
        ("SWHardeningNeeded ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded"),
        ("ConfigurationNeeded ConfigurationAndSWHardeningNeeded", "ConfigurationAndSWHardeningNeeded"),
        ("ConfigurationNeeded OutOfDate", "OutOfDateConfigurationNeeded"),
        ("ConfigurationAndSWHardeningNeeded TDRelaunchAdvised", "TDRelaunchAdvisedConfigurationNeeded"),
        ("TDRelaunchAdvisedConfigurationNeeded OutOfDate", "OutOfDateConfigurationNeeded"),
        ("ConfigurationNeeded Revoked OutOfDate", "Revoked"),
        ("ConfigurationNeeded Novel Revoked", "Novel"),
    ],
)
def test_words_are_joined_to_the_worst_that_hides_none(statuses: str, joined: str) -> None:
    assert join(*statuses.split()) == join(*reversed(statuses.split())) == joined


@pytest.mark.usefixtures("credulous")
def test_the_library_never_improves_a_rating() -> None:
    assert failures(judge(rated("sgx", "OutOfDate"))) == {"tcb.status"}
    strict = Policy(tcb=Tcb(tolerate_advisories=frozenset()))
    assert failures(judge(rated("sgx", "UpToDate", advisoryIDs=["INTEL-SA-00001"]), strict)) == {"tcb.advisories"}


def test_the_library_may_worsen_a_rating(monkeypatch: pytest.MonkeyPatch) -> None:
    worse = json.dumps({"tcb": {"status": "OutOfDate", "advisory_ids": []}})
    monkeypatch.setattr(Credulous, "to_json", lambda _: worse)
    monkeypatch.setattr(dcap_qvl, "QuoteVerifier", Credulous)
    assert failures(judge(GOOD["sgx"])) == {"tcb.status"}


# The library


class PanicException(BaseException):  # as pyo3 names it
    pass


@pytest.mark.parametrize("name", ["QuoteVerifier", "parse_pck_extension_from_pem"])
def test_a_panic_of_the_library_is_a_refusal(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def panics(_: object) -> None:
        raise PanicException("index out of bounds")

    monkeypatch.setattr(dcap_qvl, name, panics)
    step = {"QuoteVerifier": "evidence.agreement", "parse_pck_extension_from_pem": "evidence.chain"}[name]
    assert failures(judge(GOOD["sgx"])) == {step}


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_no_panic(monkeypatch: pytest.MonkeyPatch, interrupt: type[BaseException]) -> None:
    def interrupted(_: object) -> None:
        raise interrupt

    monkeypatch.setattr(dcap_qvl, "QuoteVerifier", interrupted)
    with pytest.raises(interrupt):
        judge(GOOD["sgx"])


class Refusing(Credulous):
    message = ""

    def verify_with_policy(self, *_: object) -> Credulous:
        raise ValueError(f"Verification failed: {self.message}")


@pytest.mark.parametrize(
    ("message", "step"),
    [
        ("Failed to verify certificate chain\n\nCaused by:\n    CertRevoked", "evidence.revoked"),
        ("TCB status is invalid: Revoked", "evidence.revoked"),
        ("Failed to parse root CA CRL\n\nCaused by:\n    InvalidCrlSignatureForPublicKey", "evidence.crl"),
        ("TCBInfo expired", "evidence.expired"),
        ("QE Identity expired", "evidence.expired"),
        ("TCBInfo issue date is in the future", "evidence.expired"),
        ("No matching TCB level found", "tcb.level"),
        ("QE ISVSVN 1 is below minimum required 4 from QE Identity", "tcb.level"),
        ("Debug mode is enabled", "evidence.debug"),
        ("SEPT_VE_DISABLE is not enabled", "evidence.sept-ve"),
        ("Reserved bits in TD attributes are set", "evidence.attributes"),
        ("Invalid MR service TD", "evidence.service-td"),
        ("TDX module MRSIGNER mismatch", "evidence.seam"),
        ("Signature is invalid for tcb_info in quote_collateral", "evidence.collateral"),
        ("Fmspc mismatch", "evidence.collateral"),
        ("Signature is invalid for qe_report in quote", "evidence.qe"),
        ("QE report hash mismatch", "evidence.qe"),
        ("ISV enclave report signature is invalid", "evidence.signature"),
        ("Certificate chain is too short in quote", "evidence.chain"),
        ("something new \x1b[2J", "evidence.agreement"),
    ],
)
def test_a_refusal_of_the_library_fails_in_the_step_it_is_about(
    monkeypatch: pytest.MonkeyPatch, message: str, step: str
) -> None:
    monkeypatch.setattr(Refusing, "message", message)
    monkeypatch.setattr(dcap_qvl, "QuoteVerifier", Refusing)
    appraisal = judge(GOOD["tdx 4"])
    assert failures(appraisal) == {step}
    assert all(factor.got.isprintable() for factor in appraisal.factors)


def test_the_library_is_asked_about_the_very_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Asked(Credulous):
        def __init__(self, root: bytes | None = None) -> None:
            asked.append(root)

        def verify_with_policy(self, *arguments: object) -> Credulous:
            asked.extend(arguments)
            return self

    monkeypatch.setattr(dcap_qvl, "QuoteVerifier", Asked)
    evidence = GOOD["tdx 4"]
    judge(evidence, now=NOW + 0.9)
    assert asked[:2] == [evidence.root, evidence.quote]
    assert json.loads(asked[2].to_json()) == evidence.parts
    assert asked[3] == int(NOW)


def test_what_only_the_library_knows_is_refused() -> None:
    """It insists on 32 bytes of the quoting enclave's own data."""
    point = parse_quote(GOOD["sgx"].quote).attestation_key
    named = hashlib.sha256(point).digest() + bytes(32)
    evidence = vendor.sgx(qe_auth_data=b"", qe_report={"report_data": named})
    assert failures(judge(evidence)) == {"evidence.qe"}


@pytest.mark.parametrize(
    "answer", ["{}", '{"tcb": {}}', '{"tcb": null}', "", '{"tcb": {"status": "UpToDate", "advisory_ids": 1}}']
)
def test_an_answer_that_cannot_be_read_is_a_refusal(monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    monkeypatch.setattr(Credulous, "to_json", lambda _: answer)
    monkeypatch.setattr(dcap_qvl, "QuoteVerifier", Credulous)
    assert failures(judge(GOOD["sgx"])) == {"evidence.agreement"}


# Launch config


LAUNCH = b'{"v":1}'
DIGEST = hashlib.sha256(LAUNCH).digest()
EXTENDED = hashlib.sha384(bytes(48) + hashlib.sha384(LAUNCH).digest()).digest()


@pytest.mark.parametrize(
    ("report", "launch", "expected"),
    [
        ({}, LAUNCH, b""),
        ({"mr_config_id": DIGEST + bytes(16)}, b"", DIGEST),
        ({"mr_config_id": DIGEST + bytes(16), "rtmr3": EXTENDED}, b"other", DIGEST),
        ({"mr_config_id": DIGEST + bytes(15) + b"\1"}, LAUNCH, b""),
        ({"rtmr3": EXTENDED}, LAUNCH, DIGEST),
        ({"rtmr3": EXTENDED}, b"other", b""),
        ({"rtmr3": EXTENDED}, b"", b""),
        ({"rtmr3": hashlib.sha384(bytes(48) + hashlib.sha384(b"").digest()).digest()}, b"", b""),
        ({"rtmr3": hashlib.sha384(EXTENDED + hashlib.sha384(LAUNCH).digest()).digest()}, LAUNCH, b""),
        ({"rtmr2": EXTENDED}, LAUNCH, b""),
    ],
)
def test_finds_the_launch_config(report: dict[str, bytes], launch: bytes, expected: bytes) -> None:
    assert judge(vendor.tdx(report=report), launch=launch).launch_sha256 == expected


# Other bytes


def test_quotes_of_the_other_platform_are_refused() -> None:
    policy, now = Policy(), NOW
    with pytest.raises(MalformedEvidence):
        judge_tdx(GOOD["sgx"].quote, GOOD["sgx"].collateral, policy=policy, now=now)
    with pytest.raises(MalformedEvidence):
        judge_sgx(GOOD["tdx 4"].quote, GOOD["tdx 4"].collateral, policy=policy, now=now)


@pytest.mark.usefixtures("credulous")
def test_collateral_of_the_other_platform_is_refused() -> None:
    swapped = replace(GOOD["sgx"], parts=GOOD["tdx 4"].parts)
    assert failures(judge(swapped)) == {"evidence.collateral", "evidence.qe", "tcb.level"}
    swapped = replace(GOOD["tdx 4"], parts=GOOD["sgx"].parts)
    assert failures(judge(swapped)) == {"evidence.collateral", "evidence.qe", "tcb.level"}


@pytest.mark.parametrize("name", ["sgx", "tdx 4"])
def test_absent_collateral_fails(name: str) -> None:
    which = judge_sgx if name == "sgx" else judge_tdx
    lenient = Policy(limits=Limits(dangerously_allow_missing_crl=True))
    appraisal = which(GOOD[name].quote, b"", policy=lenient, now=NOW)
    assert failures(appraisal) == {"evidence.collateral"}
    assert (appraisal.platform_id, appraisal.tcb) == ("", None)


def test_missing_revocation_lists_are_never_allowed() -> None:
    lenient = Policy(limits=Limits(dangerously_allow_missing_crl=True))
    assert failures(judge(GOOD["sgx"].with_parts(pck_crl=""), lenient)) == {"evidence.crl"}


@pytest.mark.parametrize("collateral", [b"{}", b"x", b"[]", b'{"tcb_info":"{}"}'])
def test_malformed_collateral_is_malformed(collateral: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        judge_sgx(GOOD["sgx"].quote, collateral, policy=Policy(), now=NOW)


@pytest.fixture
def remembering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each signature is verified once, and each collateral text read once: sweeps over thousands of mutants are quick."""
    signatures: dict[Any, bool] = {}

    def signs(key: Any, signature: bytes, message: bytes) -> bool:
        point = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) if key is not None else b""
        if (point, signature, message) not in signatures:
            signatures[point, signature, message] = real(key, signature, message)
        return signatures[point, signature, message]

    def signed_list(crl: x509.CertificateRevocationList, issuer: x509.Certificate) -> bool:
        listed = (crl.fingerprint(hashes.SHA256()), issuer)
        if listed not in signatures:
            signatures[listed] = real_list(crl, issuer)
        return signatures[listed]

    real, real_list = intel_chain.signs, intel_chain._signed_list
    monkeypatch.setattr(intel_chain, "signs", signs)
    monkeypatch.setattr(intel_chain, "_signed_list", signed_list)
    for module, name in (
        (intel_chain, "issued"),
        (verifier, "parse_tcb_info"),
        (verifier, "parse_qe_identity"),
        (verifier, "parse_collateral"),
    ):
        monkeypatch.setattr(module, name, cache(getattr(module, name)))


def accepted(evidence: Evidence, mutants: dict[int, Evidence]) -> list[int]:
    found = []
    for at, mutant in mutants.items():
        try:
            if not failures(judge(mutant, root=evidence.root)):
                found.append(at)
        except MalformedEvidence:
            continue
    return found


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]


@given(data=st.data())
def test_only_known_errors_escape_whatever_is_mangled(data: st.DataObject) -> None:
    good = GOOD[data.draw(st.sampled_from(sorted(GOOD)))]
    name = data.draw(st.sampled_from(["quote", *good.parts]))
    whole = good.quote if name == "quote" else good.parts[name].encode()
    at = data.draw(st.integers(0, len(whole)))
    mangled = whole[:at] + data.draw(st.binary(max_size=4)) + whole[at + data.draw(st.integers(0, 4)) :]
    if name == "quote":
        mutant = replace(good, quote=mangled)
    else:
        mutant = good.with_parts(**{name: mangled.decode("utf-8", "replace")})
    try:
        judge(mutant)
    except MalformedEvidence:
        return


UNSIGNED: list[int] = []
"""Offsets of a quote where a flipped bit would go unnoticed: none. Certificates have one spelling, the root is known
byte for byte, lengths fit exactly. What remains malleable takes more than a bit: see the tests of twins and padding."""


@pytest.mark.parametrize(("name", "step"), [("sgx", 1), ("tdx 4, padded", 5)])
@pytest.mark.usefixtures("credulous", "remembering")
def test_a_flipped_bit_anywhere_in_a_quote_is_refused(name: str, step: int) -> None:
    """Every byte of the SGX quote; of the TDX quote every one in front of its certificates, and every fifth from there."""
    good = GOOD[name]
    certificates = good.quote.index(b"-----BEGIN") if step > 1 else 0
    offsets = [*range(certificates), *range(certificates, len(good.quote), step)]
    mutants = {at: replace(good, quote=flip(good.quote, at)) for at in offsets}
    assert accepted(good, mutants) == UNSIGNED


@pytest.mark.usefixtures("credulous", "remembering")
def test_a_flipped_bit_in_collateral_is_refused_but_for_the_crl_issuers_chain() -> None:
    """Nobody reads `pck_crl_issuer_chain`: the list is checked against the quote's own CA."""
    good = GOOD["sgx"]
    text = good.collateral

    class Flipped(Evidence):
        @property
        def collateral(self) -> bytes:
            return flip(text, int(self.parts["at"]))

    start = text.index(b'"pck_crl_issuer_chain": "') + len(b'"pck_crl_issuer_chain": "')
    unread = range(start, start + len(json.dumps(good.parts["pck_crl_issuer_chain"])) - 2)
    mutants: dict[int, Evidence] = {
        at: Flipped(good.quote, {"at": str(at)}, good.root) for at in range(0, len(text), 5)
    }
    assert [at for at in accepted(good, mutants) if at not in unread] == []


@pytest.mark.parametrize("signature", ["quote", "QE report"])
def test_signatures_have_twins_so_a_quotes_hash_is_no_name(signature: str) -> None:
    """ECDSA accepts (r, n - s) for (r, s): the same report in other bytes, and nothing else changed."""
    good = GOOD["sgx"]
    parsed = parse_quote(good.quote)
    old = parsed.signature if signature == "quote" else parsed.qe_report_signature
    twin = old[:32] + (P256_ORDER - int.from_bytes(old[32:], "big")).to_bytes(32, "big")
    other = replace(good, quote=good.quote.replace(old, twin))
    assert other.quote != good.quote
    assert judge(other) == judge(good)


def test_padding_of_a_tdx_quote_may_have_any_length() -> None:
    good = GOOD["tdx 4"]
    assert judge(replace(good, quote=good.quote + bytes(5000))) == judge(good)


# Real evidence


def reals() -> list[Path]:
    return sorted(path.parent for kind in ("sgx", "tdx") for path in VECTORS.glob(f"{kind}/*/*/collateral.json"))


REASONS = {
    "CertRevoked": "evidence.revoked",
    "Revoked": "evidence.revoked",
    "InvalidCrl": "evidence.root",
    "expired": "evidence.expired",
    "Debug mode": "evidence.debug",
    "SEPT_VE": "evidence.sept-ve",
    "No matching TCB level": "tcb.level",
    "MR service TD": "evidence.service-td",
    "ISV enclave report signature": "evidence.signature",
    "tcb_info": "evidence.collateral",
}
CLAIMS = {"mr_enclave", "mr_signer", "mr_td", "mr_seam", "mr_config_id", "mr_owner", "td_attributes", "xfam"}


def judge_real(folder: Path, policy: Policy, **more: Any) -> Appraisal:
    case = json.loads((folder / "case.json").read_text())
    which: Callable[..., Appraisal] = judge_tdx if "tdx" in folder.parts else judge_sgx
    root = (folder / "root.der").read_bytes() if (folder / "root.der").exists() else None
    arguments = {"policy": policy, "now": float(case["now"]), "root": root, **more}
    return which((folder / "quote.bin").read_bytes(), (folder / "collateral.json").read_bytes(), **arguments)


@pytest.mark.skipif(not VECTORS.is_dir(), reason="real evidence lies beside the repository, and is absent here")
@pytest.mark.parametrize("folder", reals(), ids=lambda folder: "/".join(folder.parts[-3:]))
def test_real_evidence_gets_its_stated_verdict(folder: Path) -> None:
    case = json.loads((folder / "case.json").read_text())
    expected = case["expected"]
    appraisal = judge_real(folder, Policy())
    got = failures(appraisal)
    for name in CLAIMS & case["claims"].keys():
        assert appraisal.measurement[name] == case["claims"][name]
    if expected["verdict"] == "reject":
        step = next(step for reason, step in REASONS.items() if reason in expected["reason"])
        assert step in got
        return
    assert got == ({"tcb.status"} if expected["verdict"] == "policy" else set())
    assert appraisal.tcb is not None
    assert appraisal.tcb.status == expected["tcb_status"]
    assert list(appraisal.tcb.advisories) == (expected.get("advisories") or list(appraisal.tcb.advisories))
    tolerant = Policy(tcb=Tcb(tolerate=frozenset({expected["tcb_status"]})))
    assert failures(judge_real(folder, tolerant)) == set()
    if expected.get("with_production_root"):
        assert failures(judge_real(folder, tolerant, root=None)) == {"evidence.root"}


@pytest.mark.skipif(not VECTORS.is_dir(), reason="real evidence lies beside the repository, and is absent here")
def test_the_librarys_own_root_is_the_pinned_one() -> None:
    folder = VECTORS / "tdx" / "dcap-qvl" / "tdx_quote"
    quote = (folder / "quote.bin").read_bytes()
    root = parse_pem_chain(parse_quote(quote).certification_data, what="chain")[-1]
    assert hashlib.sha256(root).hexdigest() == INTEL_ROOT_SHA256
    collateral = dcap_qvl.QuoteCollateralV3.from_json((folder / "collateral.json").read_text())
    now = json.loads((folder / "case.json").read_text())["now"]
    claims = [
        json.loads(dcap_qvl.QuoteVerifier(which).verify_with_policy(quote, collateral, now, policy).to_json())
        for which in (None, root)
        for policy in [library_policy(now)]
    ]
    key = x509.load_der_x509_certificate(root).public_key()
    point = key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    own = list(hashlib.sha384(point).digest()), list(hashlib.sha384(point[1:]).digest())
    assert claims[0]["platform"]["root_key_id"] == claims[1]["platform"]["root_key_id"]
    assert claims[0]["platform"]["root_key_id"] in own
    assert judge_real(folder, Policy(), root=root).factors == judge_real(folder, Policy()).factors
