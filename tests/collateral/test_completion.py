import base64
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest
from tests.collateral.service import (
    AMD_CA,
    AMD_CRL,
    CHIP,
    NOW,
    PCK_CRL,
    QE_IDENTITY,
    ROOT_CRL,
    TCB_INFO,
    Reply,
    Service,
    amd_replies,
    document,
    intel_replies,
    roots,
)
from tests.vendors import amd, intel

from cloister.collateral import Cache, Completed, Key, Vendor, complete, review
from cloister.errors import CloisterError, ConnectionFailed, MalformedEvidence, NotTrusted, Unreachable
from cloister.evidence.document import Document, Item
from cloister.evidence.endorsements import MEDIA_TYPE, Endorsements, parse_endorsements
from cloister.evidence.sev_snp import VLEK
from cloister.verify import Policy, Tcb
from cloister.verify.intel import judge_tdx
from cloister.verify.platform import Appraisal
from cloister.verify.sev_snp import judge

DAY = 86400.0
TDX_PATHS = [PCK_CRL, ROOT_CRL, TCB_INFO, QE_IDENTITY]
SNP_PATHS = [AMD_CA, AMD_CRL, CHIP]
LATER = {"issueDate": intel.iso(NOW), "nextUpdate": intel.iso(NOW + 29 * DAY)}
STALE = {"issueDate": intel.iso(NOW - 40 * DAY), "nextUpdate": intel.iso(NOW - 10 * DAY)}


@pytest.fixture
def tdx() -> intel.Evidence:
    return intel.tdx()


@pytest.fixture
def snp() -> amd.Evidence:
    return amd.make()


Ask = Callable[..., Completed]


@pytest.fixture
def ask_tdx(tdx: intel.Evidence, vendor: Vendor, cache: Cache) -> Ask:
    """Complete a document that carries nothing, unless told otherwise."""

    def ask(**changes: object) -> Completed:
        options = {"vendor": vendor, "cache": cache, "roots": roots(tdx=tdx), "now": NOW, **changes}
        bare = options.pop("document", document(tdx.quote))
        assert isinstance(bare, Document)
        return complete(bare, **options)  # type: ignore[arg-type]

    return ask


@pytest.fixture
def ask_snp(snp: amd.Evidence, vendor: Vendor, cache: Cache) -> Ask:
    def ask(**changes: object) -> Completed:
        options = {"vendor": vendor, "cache": cache, "roots": roots(snp=snp), "now": NOW, **changes}
        bare = options.pop("document", document(snp.report))
        assert isinstance(bare, Document)
        return complete(bare, **options)  # type: ignore[arg-type]

    return ask


def _sources(completed: Completed) -> list[str]:
    return [found.source for found in completed.found]


def _endorsements(completed: Completed) -> Endorsements:
    return parse_endorsements(completed.document.items["endorsements"].content)


def _appraise_tdx(evidence: intel.Evidence, collateral: bytes | None) -> Appraisal:
    return judge_tdx(evidence.quote, collateral or b"", policy=Policy(), now=NOW, root=evidence.root)


def _failed(appraisal: Appraisal) -> list[str]:
    return [factor.step for factor in appraisal.factors if factor.verdict == "fail"]


def _files(cache: Cache) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in cache.root.rglob("*") if path.is_file()}


# From the vendor --------------------------------------------------------------------------------------------------------


def test_intels_collateral_is_fetched_and_the_quote_verifies_with_it(
    service: Service, tdx: intel.Evidence, ask_tdx: Ask
) -> None:
    service.serve(intel_replies(tdx))
    completed = ask_tdx()
    assert (service.requests, _sources(completed)) == (TDX_PATHS, ["vendor"] * 4)
    assert _failed(_appraise_tdx(tdx, b"")) == ["evidence.collateral"]
    assert _failed(_appraise_tdx(tdx, _endorsements(completed).intel)) == []
    assert completed.document.items["cpu"].content == tdx.quote


def test_an_sgx_quote_gets_the_collateral_for_sgx(service: Service, vendor: Vendor) -> None:
    sgx = intel.sgx()
    service.serve({path.replace("/tdx/", "/sgx/"): reply for path, reply in intel_replies(sgx).items()})
    completed = complete(document(sgx.quote), vendor=vendor, roots=roots(tdx=sgx), now=NOW)
    assert [str(found.piece.key) for found in completed.found] == [
        "Intel PCK revocation list (platform)",
        "Intel root revocation list (SGX)",
        "Intel TCB info (SGX 00906ed50000)",
        "Intel QE identity (SGX)",
    ]


def test_amds_collateral_is_fetched_and_the_report_verifies_with_it(
    service: Service, snp: amd.Evidence, ask_snp: Ask
) -> None:
    service.serve(amd_replies(snp))
    completed = ask_snp()
    assert (service.requests, _sources(completed)) == (SNP_PATHS, ["vendor"] * 3)
    carried = _endorsements(completed)
    assert (carried.amd, carried.amd_crl) == (snp.chain, snp.crl)
    assert (
        _failed(
            judge(
                snp.report,
                carried.amd,
                carried.amd_crl,
                policy=Policy(tcb=Tcb(min_sev_snp={"snp": 0})),
                now=NOW,
                roots=snp.roots,
            )
        )
        == []
    )


def test_the_newest_processors_have_a_short_id_and_one_more_number(service: Service, vendor: Vendor) -> None:
    turin = amd.make("Turin")
    leaf, chain, crl = amd_replies(turin).values()
    path = f"/vcek/v1/Turin/{amd.TURIN_CHIP_ID[:8].hex()}?fmcSPL=02&blSPL=03&teeSPL=01&snpSPL=04&ucodeSPL=77"
    service.serve({path: leaf, "/vcek/v1/Turin/cert_chain": chain, "/vcek/v1/Turin/crl": crl})
    completed = complete(document(turin.report), vendor=vendor, roots=roots(snp=turin), now=NOW)
    assert _endorsements(completed).amd == turin.chain


def test_a_report_that_does_not_name_its_processor_is_asked_about_by_each_name(
    service: Service, vendor: Vendor
) -> None:
    genoa = amd.make("Genoa", version=2)
    leaf, chain, crl = amd_replies(genoa).values()
    path = f"/vcek/v1/Genoa/{amd.CHIP_ID.hex()}?blSPL=10&teeSPL=01&snpSPL=23&ucodeSPL=84"
    service.serve({path: leaf, "/vcek/v1/Genoa/cert_chain": chain, "/vcek/v1/Genoa/crl": crl})
    completed = complete(document(genoa.report), vendor=vendor, roots=roots(snp=genoa), now=NOW)
    assert service.requests[:2] == [AMD_CA, "/vcek/v1/Genoa/cert_chain"]
    assert _endorsements(completed).amd == genoa.chain


def test_a_certificate_that_comes_along_names_the_processor(service: Service, vendor: Vendor) -> None:
    genoa = amd.make("Genoa", version=2)
    service.serve({"/vcek/v1/Genoa/crl": Reply(genoa.crl or b"")})
    carried = document(genoa.report, Endorsements(amd=genoa.chain))
    completed = complete(carried, vendor=vendor, roots=roots(snp=genoa), now=NOW)
    assert (service.requests, _sources(completed)) == (["/vcek/v1/Genoa/crl"], ["document", "vendor", "document"])


def test_a_clouds_own_key_must_come_with_the_evidence(service: Service, vendor: Vendor) -> None:
    cloud = amd.make(kind=VLEK)
    _, chain, crl = amd_replies(cloud).values()
    service.serve({"/vlek/v1/Milan/cert_chain": chain, "/vlek/v1/Milan/crl": crl})
    with pytest.raises(Unreachable, match="must come with the evidence"):
        complete(document(cloud.report), vendor=vendor, roots=roots(snp=cloud), now=NOW)
    carried = document(cloud.report, Endorsements(amd=cloud.chain[:1]))
    completed = complete(carried, vendor=vendor, roots=roots(snp=cloud), now=NOW)
    assert _sources(completed) == ["vendor", "vendor", "document"]
    assert _endorsements(completed).amd == cloud.chain
    again = complete(carried, vendor=vendor, roots=roots(snp=cloud), now=NOW, refresh=True)
    assert _sources(again) == ["vendor", "vendor", "document"]


def test_a_chip_that_hides_its_id_has_no_certificate_to_ask_for(vendor: Vendor, service: Service) -> None:
    masked = amd.make(chip_id=bytes(64))
    with pytest.raises(MalformedEvidence, match="does not name its chip"):
        complete(document(masked.report), vendor=vendor, roots=roots(snp=masked), now=NOW)
    assert service.requests == []


def test_the_early_update_set_is_asked_for_and_kept_apart(
    service: Service, tdx: intel.Evidence, ask_tdx: Ask, cache: Cache
) -> None:
    early = intel.tdx(tcb_info={"tcbEvaluationDataNumber": 19}, qe_identity={"tcbEvaluationDataNumber": 19})
    service.serve({**intel_replies(tdx), **intel_replies(early, early=True)})
    ask_tdx()
    ahead = ask_tdx(early=True)
    assert _sources(ahead) == ["cache", "cache", "vendor", "vendor"]
    assert _appraise_tdx(tdx, ahead.intel).counters["tcb-evaluation-data-number"] == 19
    assert _appraise_tdx(tdx, ask_tdx(vendor=None).intel).counters["tcb-evaluation-data-number"] == 18
    assert _sources(ask_tdx(early=True, vendor=None)) == ["cache"] * 4


# From the document ------------------------------------------------------------------------------------------------------


def test_nobody_is_asked_when_the_document_carries_what_is_needed(
    service: Service, tdx: intel.Evidence, snp: amd.Evidence, ask_tdx: Ask, ask_snp: Ask, cache: Cache
) -> None:
    carried = document(tdx.quote, Endorsements(intel=tdx.collateral))
    assert ask_tdx(document=carried).document is carried
    carried = document(snp.report, Endorsements(amd=snp.chain, amd_crl=snp.crl))
    assert ask_snp(document=carried).document is carried
    assert (service.requests, _files(cache)) == ([], {})


@pytest.mark.parametrize(
    ("carried", "complaint"),
    [
        (intel.tdx(tcb_info=STALE), "out of date"),
        (intel.tdx(signed_by={"tcb_info": "other"}), "not signed by Intel"),
        (intel.other_intel().make(intel.Settings(platform="tdx", version=4)), "another root"),
    ],
    ids=["stale", "wrong signature", "foreign root"],
)
def test_what_the_document_carries_is_passed_over_when_it_is_not_good(
    service: Service, tdx: intel.Evidence, ask_tdx: Ask, carried: intel.Evidence, complaint: str
) -> None:
    service.serve(intel_replies(tdx))
    completed = ask_tdx(document=document(tdx.quote, Endorsements(intel=carried.collateral)))
    assert any(text.startswith("document: ") and complaint in text for text in completed.complaints)
    assert _failed(_appraise_tdx(tdx, completed.intel)) == []


def test_only_what_is_missing_is_fetched(service: Service, tdx: intel.Evidence, ask_tdx: Ask) -> None:
    service.serve(intel_replies(tdx))
    carried = intel.tdx(qe_identity=STALE)
    completed = ask_tdx(document=document(tdx.quote, Endorsements(intel=carried.collateral)))
    assert (service.requests, _sources(completed)) == ([QE_IDENTITY], ["document"] * 3 + ["vendor"])


@pytest.mark.parametrize("carried", [b"{}", b"no json", b'{"tcb_info":1}'])
def test_endorsements_that_cannot_be_read_are_passed_over(
    service: Service, tdx: intel.Evidence, ask_tdx: Ask, carried: bytes
) -> None:
    service.serve(intel_replies(tdx))
    assert _sources(ask_tdx(document=document(tdx.quote, Endorsements(intel=carried)))) == ["vendor"] * 4


def test_certificates_that_cannot_be_read_are_passed_over(service: Service, snp: amd.Evidence, ask_snp: Ask) -> None:
    service.serve(amd_replies(snp))
    carried = document(snp.report, Endorsements(amd=(b"\x30", b"\x30", b"\x30"), amd_crl=b"\x30"))
    assert _sources(ask_snp(document=carried)) == ["vendor"] * 3


def test_evidence_that_needs_no_collateral_stays_as_it_is(vendor: Vendor, service: Service) -> None:
    for item in (Item("application/cose", b"x"), Item("application/vnd.cloister.sim-report+cbor", b"x")):
        bare = Document({"cpu": item})
        assert complete(bare, vendor=vendor, now=NOW) == Completed(bare)
    assert complete(Document({}), vendor=vendor, now=NOW).found == ()
    assert service.requests == []


def test_everything_else_in_the_document_stays(service: Service, tdx: intel.Evidence, ask_tdx: Ask) -> None:
    service.serve(intel_replies(tdx))
    items = {**document(tdx.quote, Endorsements(amd_crl=b"kept")).items, "gpu-0": Item("application/cbor", b"x")}
    completed = ask_tdx(document=Document(items))
    assert {label for label, item in items.items() if completed.document.items[label] != item} == {"endorsements"}
    assert completed.document.items["endorsements"].media_type == MEDIA_TYPE
    assert _endorsements(completed).amd_crl == b"kept"


# What a vendor may not say ----------------------------------------------------------------------------------------------

FORGED_TDX = {
    "stale TCB info": (intel.tdx(tcb_info=STALE), "out of date"),
    "stale QE identity": (intel.tdx(qe_identity=STALE), "out of date"),
    "TCB info from the future": (intel.tdx(tcb_info={"issueDate": intel.iso(NOW + DAY)}), "not issued yet"),
    "stale PCK list": (intel.tdx(crl_dates={"pck_crl": (NOW - 40 * DAY, NOW - 10 * DAY)}), "out of date"),
    "stale root list": (intel.tdx(crl_dates={"root_crl": (NOW - 40 * DAY, NOW - 10 * DAY)}), "out of date"),
    "TCB info signed by another": (intel.tdx(signed_by={"tcb_info": "other"}), "not signed by Intel"),
    "QE identity signed by another": (intel.tdx(signed_by={"qe_identity": "pck_ca"}), "not signed by Intel"),
    "PCK list signed by another": (intel.tdx(signed_by={"pck_crl": "other"}), "not signed by its issuer"),
    "root list signed by another": (intel.tdx(signed_by={"root_crl": "pck_ca"}), "not signed by its issuer"),
    "signer not signed by the root": (intel.tdx(signed_by={"tcb": "other"}), "did not sign the issuer"),
    "CA not signed by the root": (intel.tdx(signed_by={"pck_ca": "other"}), "did not sign the issuer"),
    "signer of another name": (intel.tdx(subjects={"tcb": "Intel SGX PCK Platform CA"}), "another than its signer"),
    "list of the other CA": (intel.tdx(subjects={"pck_ca": "Intel SGX PCK Processor CA"}), "another CA's"),
    "signer revoked": (intel.tdx(revoked=frozenset({"tcb"})), "revoked an issuer"),
    "CA revoked": (intel.tdx(revoked=frozenset({"pck_ca"})), "revoked an issuer"),
    "signer expired": (intel.tdx(validity={"tcb": (NOW - 9 * DAY, NOW - DAY)}), "out of date"),
    "another platform": (intel.tdx(tcb_info={"fmspc": "00" * 6}), "another platform"),
    "SGX's for TDX": (intel.tdx(qe_identity={"id": "QE"}), "another platform"),
    "foreign root": (intel.other_intel().make(intel.Settings(platform="tdx", version=4)), "another root"),
}


@pytest.mark.parametrize("case", FORGED_TDX)
def test_an_answer_that_is_not_intels_is_refused_and_not_kept(
    service: Service, ask_tdx: Ask, cache: Cache, case: str
) -> None:
    forged, complaint = FORGED_TDX[case]
    service.serve(intel_replies(forged))
    with pytest.raises(NotTrusted, match=complaint) as refused:
        ask_tdx()
    assert refused.value.step.startswith("collateral.")
    assert refused.value.hint
    kept = {entry.key.kind for entry in cache.entries()}
    assert refused.value.step.removeprefix("collateral.") not in kept


FORGED_SNP = {
    "stale list": (amd.make(crl=amd.Crl(valid=(40 * DAY, -10 * DAY))), "out of date"),
    "list from the future": (amd.make(crl=amd.Crl(valid=(-DAY, 10 * DAY))), "not valid before"),
    "list signed by another": (amd.make(crl=amd.Crl(owner="other")), "not signed by the ARK"),
    "list of another name": (amd.make(crl=amd.Crl(issuer="ARK-Genoa")), "not signed by the ARK"),
    "CA revoked": (amd.make(crl=amd.Crl(revoked=("ASK",))), "revoked: ASK"),
    "CA expired": (amd.make(ask=amd.Authority(valid=(9 * DAY, -DAY))), "out of date"),
    "foreign root": (amd.make(ark=amd.Authority(owner="other")), "another root"),
    "leaf signed by another": (amd.make(leaf=amd.Leaf(owner="other")), "leaf is not signed"),
    "leaf expired": (amd.make(leaf=amd.Leaf(valid=(9 * DAY, -DAY))), "leaf is valid"),
    "leaf that is a CA": (amd.make(leaf=amd.Leaf(ca=True)), "may sign certificates"),
    "another chip": (amd.make(leaf=amd.Leaf(extensions={amd.HWID: bytes(64)})), "another chip's"),
    "no chip": (amd.make(leaf=amd.Leaf(extensions={amd.HWID: None})), "another chip's"),
    "another product": (amd.make(leaf=amd.Leaf(extensions={amd.PRODUCT_NAME: amd.ia5("Genoa")})), "another chip's"),
    "other firmware": (amd.make(leaf=amd.Leaf(extensions={amd.SPL["snp"]: amd.integer(1)})), "other firmware"),
    "no firmware": (amd.make(leaf=amd.Leaf(extensions={amd.SPL["tee"]: None})), "other firmware"),
}


@pytest.mark.parametrize("case", FORGED_SNP)
def test_an_answer_that_is_not_amds_is_refused_and_not_kept(
    service: Service, ask_snp: Ask, cache: Cache, case: str
) -> None:
    forged, complaint = FORGED_SNP[case]
    service.serve(amd_replies(forged))
    with pytest.raises(NotTrusted, match=complaint) as refused:
        ask_snp()
    kept = {entry.key.kind for entry in cache.entries()}
    assert refused.value.step.removeprefix("collateral.") not in kept


def test_a_ca_that_the_root_did_not_sign_is_refused(
    service: Service, snp: amd.Evidence, ask_snp: Ask, cache: Cache
) -> None:
    forged = amd.make(ark=amd.Authority(owner="other"))
    service.serve(amd_replies(replace(snp, chain=(snp.chain[0], forged.chain[1], snp.chain[2]))))
    with pytest.raises(NotTrusted, match="ASK is not signed by its issuer"):
        ask_snp()
    assert _files(cache) == {}


@pytest.mark.parametrize("path", TDX_PATHS)
@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"body": b""}, MalformedEvidence),
        ({"body": b"<html>Welcome to the hotel's network</html>"}, MalformedEvidence),
        ({"body": b"\x30" * 600_000}, MalformedEvidence),
        ({"cut": 20}, ConnectionFailed),
        ({"status": 404}, ConnectionFailed),
        ({"status": 429, "headers": {"Retry-After": "17"}}, ConnectionFailed),
        ({"status": 503}, ConnectionFailed),
        ({"status": 500}, ConnectionFailed),
        ({"status": 302, "headers": {"Location": "/elsewhere"}}, ConnectionFailed),
    ],
    ids=["empty", "not collateral", "oversized", "cut", "404", "429", "503", "500", "redirect"],
)
def test_an_answer_that_is_none_leaves_nothing_behind(
    service: Service,
    tdx: intel.Evidence,
    ask_tdx: Ask,
    cache: Cache,
    path: str,
    changes: dict[str, object],
    error: type,
) -> None:
    service.serve(intel_replies(tdx))
    service.change(path, **changes)
    with pytest.raises(error) as refused:
        ask_tdx()
    assert isinstance(refused.value, CloisterError)
    assert len(list(cache.entries())) == len(_files(cache)) == TDX_PATHS.index(path)
    assert "/elsewhere" not in service.requests


@pytest.mark.parametrize(
    "body",
    [
        b'{"signature":"%s","tcbInfo":%s}',
        b'{"tcbInfo":%s}',
        b'{"tcbInfo":%s,"signature":"00"}',
        b'{"tcbInfo":%s,"signature":"%s","more":1}',
        b'{"tcbInfo":%s,"signature":"%s"} ,',
        b'{"tcbInfo":{},"tcbInfo":%s,"signature":"%s"}',
        b'["tcbInfo",%s,"%s"]',
    ],
)
def test_an_answer_in_another_form_is_malformed(
    service: Service, tdx: intel.Evidence, ask_tdx: Ask, body: bytes
) -> None:
    service.serve(intel_replies(tdx))
    parts = [tdx.parts["tcb_info"].encode(), tdx.parts["tcb_info_signature"].encode()]
    wanted = body.count(b"%s")
    values = parts[::-1] if body.startswith(b'{"sig') else parts[:wanted]
    service.change(TCB_INFO, body=body % tuple(values))
    with pytest.raises(MalformedEvidence):
        ask_tdx()


def test_one_changed_byte_of_any_signed_text_is_noticed(service: Service, tdx: intel.Evidence, ask_tdx: Ask) -> None:
    service.serve(intel_replies(tdx))
    good = dict(service.replies)
    ask_tdx(cache=None)
    for path in TDX_PATHS:
        for changed in (b"18", b"0906ed5", b"4d6") if "pckcrl" not in path else (bytes.fromhex("550403"),):
            body = good[path].body
            if changed in body:
                at = body.index(changed)
                service.serve(good)
                service.change(path, body=body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :])
                with pytest.raises(CloisterError):
                    ask_tdx(cache=None)


def test_an_answer_without_its_issuers_is_malformed(service: Service, tdx: intel.Evidence, ask_tdx: Ask) -> None:
    service.serve(intel_replies(tdx))
    service.change(TCB_INFO, headers={})
    with pytest.raises(MalformedEvidence, match="without its issuers"):
        ask_tdx()


@pytest.mark.parametrize("names", [("tcb",), ("root",), ("tcb", "root", "root")])
def test_issuers_of_another_number_are_malformed(
    service: Service, tdx: intel.Evidence, ask_tdx: Ask, names: tuple[str, ...]
) -> None:
    service.serve(intel_replies(tdx))
    chain = intel.intel().chain(intel.Settings(), *names)
    service.change(TCB_INFO, headers={"TCB-Info-Issuer-Chain": quote(chain)})
    with pytest.raises(MalformedEvidence, match="not one certificate and the root"):
        ask_tdx()


def test_a_busy_vendor_says_when_to_try_again(service: Service, snp: amd.Evidence, ask_snp: Ask) -> None:
    service.serve(amd_replies(snp))
    service.change(CHIP, status=429, headers={"Retry-After": "17"})
    with pytest.raises(Unreachable) as refused:
        ask_snp()
    assert refused.value.hint == "Try again in 17 s."


# From the cache ---------------------------------------------------------------------------------------------------------


def test_what_was_fetched_once_is_there_offline(
    service: Service, tdx: intel.Evidence, snp: amd.Evidence, ask_tdx: Ask, ask_snp: Ask
) -> None:
    service.serve({**intel_replies(tdx), **amd_replies(snp)})
    fetched = ask_tdx().document, ask_snp().document
    asked = len(service.requests)
    assert (ask_tdx(vendor=None).document, ask_snp(vendor=None).document) == fetched
    assert _sources(ask_tdx()) == ["cache"] * 4
    assert len(service.requests) == asked


def test_offline_without_a_cache_it_is_unreachable_and_says_what_to_do(ask_tdx: Ask, ask_snp: Ask) -> None:
    for ask in (ask_tdx, ask_snp):
        with pytest.raises(Unreachable, match="may not be asked") as refused:
            ask(vendor=None)
        assert "cloister collateral fetch" in refused.value.hint


def test_a_vendor_that_cannot_be_reached_is_unreachable(
    tdx: intel.Evidence, vendor: Vendor, ask_tdx: Ask, service: Service
) -> None:
    with Vendor(replace(vendor.addresses, intel="http://127.0.0.1:9")) as nobody, pytest.raises(Unreachable):
        ask_tdx(vendor=nobody)


def test_what_is_out_of_date_in_the_cache_is_never_used(service: Service, tdx: intel.Evidence, ask_tdx: Ask) -> None:
    service.serve(intel_replies(tdx))
    ask_tdx()
    then = NOW + 30 * DAY
    with pytest.raises(Unreachable) as refused:
        ask_tdx(vendor=None, now=then)
    assert "out of date" in (refused.value.got or "")
    dates = {"issueDate": intel.iso(then - DAY), "nextUpdate": intel.iso(then + DAY)}
    lists = dict.fromkeys(("pck_crl", "root_crl"), (then - DAY, then + DAY))
    service.serve(intel_replies(intel.tdx(tcb_info=dates, qe_identity=dates, crl_dates=lists)))
    assert _sources(ask_tdx(now=then)) == ["vendor"] * 4
    assert _sources(ask_tdx(now=then, vendor=None)) == ["cache"] * 4


def _one_bit(data: bytes, member: str) -> bytes:
    entry = json.loads(data)
    content = bytearray(base64.b64decode(entry[member]))
    content[len(content) // 2] ^= 1
    return json.dumps({**entry, member: base64.b64encode(content).decode()}).encode()


POISONS: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "not JSON": lambda data: b"\xff" + data,
    "huge": lambda data: b" " * (4 << 20) + data,
    "another version": lambda data: data.replace(b'"v": 1', b'"v": 2'),
    "another key": lambda data: data.replace(b'"vendor": "', b'"vendor": "x'),
    "another body": lambda data: _one_bit(data, "body"),
    "no base64": lambda data: data.replace(b'"body": "', b'"body": "?'),
    "one more member": lambda data: data.replace(b'"v": 1', b'"v": 1, "w": 1'),
}


@pytest.mark.parametrize("poison", POISONS)
def test_a_poisoned_cache_is_passed_over_and_mended(
    service: Service, tdx: intel.Evidence, snp: amd.Evidence, ask_tdx: Ask, ask_snp: Ask, cache: Cache, poison: str
) -> None:
    service.serve({**intel_replies(tdx), **amd_replies(snp)})
    fetched = ask_tdx().document, ask_snp().document
    good = _files(cache)
    for path, data in good.items():
        Path(path).write_bytes(POISONS[poison](data))
        assert Path(path).read_bytes() != data
        with pytest.raises(Unreachable):
            ask_tdx(vendor=None) if "/intel/" in path else ask_snp(vendor=None)
        assert (ask_tdx().document, ask_snp().document) == fetched
        assert Path(path).read_bytes() == data


def test_an_entry_cannot_stand_for_another(service: Service, tdx: intel.Evidence, ask_tdx: Ask, cache: Cache) -> None:
    service.serve(intel_replies(tdx))
    ask_tdx()
    paths = sorted(_files(cache))
    Path(paths[0]).write_bytes(Path(paths[1]).read_bytes())
    with pytest.raises(Unreachable):
        ask_tdx(vendor=None)


def test_collateral_under_another_root_in_the_cache_is_not_believed(
    service: Service, tdx: intel.Evidence, ask_tdx: Ask, cache: Cache
) -> None:
    forged = intel.other_intel().make(intel.Settings(platform="tdx", version=4))
    service.serve(intel_replies(forged))
    ask_tdx(document=document(forged.quote), roots=roots(tdx=forged))
    with pytest.raises(Unreachable) as refused:
        ask_tdx(vendor=None)
    assert "another root" in (refused.value.got or "")


def test_what_was_seen_once_gives_way_to_nothing_older(
    service: Service, tdx: intel.Evidence, ask_tdx: Ask, cache: Cache
) -> None:
    newer = intel.tdx(tcb_info={**LATER, "tcbEvaluationDataNumber": 19})
    service.serve(intel_replies(newer))
    ask_tdx()
    kept = _files(cache)
    service.serve(intel_replies(tdx))
    completed = ask_tdx(refresh=True)
    assert _sources(completed) == ["vendor", "vendor", "cache", "vendor"]
    assert "older than what is kept" in completed.complaints[0]
    assert _appraise_tdx(newer, completed.intel).counters["tcb-evaluation-data-number"] == 18  # the lesser of the two
    assert (
        json.loads(parse_endorsements(completed.document.items["endorsements"].content).intel or b"")["tcb_info"]
        == (newer.parts["tcb_info"])
    )
    assert {path: data for path, data in _files(cache).items() if "tcb-info" in path} == {
        path: data for path, data in kept.items() if "tcb-info" in path
    }


def test_a_refresh_asks_for_all_but_a_chips_certificate(service: Service, snp: amd.Evidence, ask_snp: Ask) -> None:
    service.serve(amd_replies(snp))
    ask_snp()
    service.requests.clear()
    assert _sources(ask_snp(refresh=True)) == ["vendor", "vendor", "cache"]
    assert service.requests == SNP_PATHS[:2]


def test_a_cache_that_cannot_be_written_does_not_stop_a_verification(
    service: Service, tdx: intel.Evidence, ask_tdx: Ask, tmp_path: Path
) -> None:
    service.serve(intel_replies(tdx))
    (tmp_path / "file").write_text("")
    completed = ask_tdx(cache=Cache(tmp_path / "file" / "collateral"))
    assert _failed(_appraise_tdx(tdx, completed.intel)) == []
    assert completed.not_stored is not None
    assert "XDG_CACHE_HOME" in completed.not_stored.hint


def test_a_write_that_fails_leaves_what_was_there(
    service: Service, tdx: intel.Evidence, ask_tdx: Ask, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.serve(intel_replies(tdx))
    ask_tdx()
    kept = _files(cache)
    service.serve(intel_replies(intel.tdx(tcb_info=LATER, qe_identity=LATER)))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(Path, "replace", full)
    completed = ask_tdx(refresh=True)
    assert "No space left" in (completed.not_stored.message if completed.not_stored else "")
    assert _files(cache) == kept


def test_many_at_once_all_get_it_and_the_cache_stays_whole(
    service: Service, tdx: intel.Evidence, snp: amd.Evidence, ask_tdx: Ask, ask_snp: Ask, cache: Cache
) -> None:
    service.serve({**intel_replies(tdx), **amd_replies(snp)})
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, refresh=True) for ask in (ask_tdx, ask_snp) * 8]
        documents = [future.result().document for future in asked]
    assert documents == [documents[0], documents[1]] * 8
    assert len(_files(cache)) == len(list(cache.entries())) == 7
    assert _sources(ask_tdx(vendor=None)) + _sources(ask_snp(vendor=None)) == ["cache"] * 7


def test_progress_names_what_is_asked_for_and_where(service: Service, tdx: intel.Evidence, ask_tdx: Ask) -> None:
    service.serve(intel_replies(tdx))
    told: list[str] = []
    ask_tdx(progress=lambda key, source: told.append(f"{source}: {key}"))
    assert told[:3] == [
        "document: Intel PCK revocation list (platform)",
        "cache: Intel PCK revocation list (platform)",
        "vendor: Intel PCK revocation list (platform)",
    ]


# Reviewing --------------------------------------------------------------------------------------------------------------


def test_a_review_tells_what_is_good_and_what_is_not(
    service: Service, tdx: intel.Evidence, snp: amd.Evidence, ask_tdx: Ask, ask_snp: Ask, cache: Cache
) -> None:
    service.serve({**intel_replies(tdx), **amd_replies(snp)})
    ask_tdx()
    ask_snp()
    both = replace(roots(tdx=tdx), amd=snp.roots)
    assert [each.problem for each in review(cache, roots=both, now=NOW)] == [""] * 7
    later = {each.entry.key.kind: each for each in review(cache, roots=both, now=NOW + 60 * DAY)}
    assert {kind for kind, each in later.items() if each.piece} == {"vcek", "vcek-ca", "vcek-crl"}
    assert "out of date" in later["pck-crl"].problem
    assert all(each.piece is None for each in review(cache, now=NOW))  # the vendors' own roots made none of it


@pytest.mark.parametrize(
    "name", ["intel/nonsense/x", "intel/tcb-info/x", "intel/qe-identity/xyz", "amd/vcek/milan-00-00"]
)
def test_a_file_that_names_no_collateral_is_no_surprise(
    service: Service, tdx: intel.Evidence, snp: amd.Evidence, ask_tdx: Ask, ask_snp: Ask, cache: Cache, name: str
) -> None:
    service.serve({**intel_replies(tdx), **amd_replies(snp)})
    like = {each.piece.key.kind: each.piece for each in (*ask_tdx().found, *ask_snp().found)}
    key = Key(*name.split("/"))
    cache.put(key, like.get(key.kind, like["tcb-info"]).answer, NOW)
    both = replace(roots(tdx=tdx), amd=snp.roots)
    (bad,) = [each for each in review(cache, roots=both, now=NOW) if each.piece is None]
    assert (bad.entry.key, bad.problem) == (key, f"{key} is no collateral that is known here.")
