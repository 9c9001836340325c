import base64
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.vendors import nvidia as vendor
from tests.vendors.p384 import NOW, changed, issue

from cloister.errors import MalformedEvidence
from cloister.evidence.nvidia import parse_report
from cloister.verify import rim

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors" / "nvidia"
CASES = sorted(path.parent for path in VECTORS.glob("*/*/rim.xml"))
REASONS = {
    "signature": {"evidence.signature"},
    "chain not to NVIDIA RIM root": {"evidence.root", "evidence.chain"},
}

GOOD = vendor.signed_manifest()
REPORT = parse_report(vendor.report())


def judge(data: bytes = GOOD, **changes: Any) -> rim.RimAppraisal:
    return rim.judge(data, **{"now": NOW, "root_sha256": vendor.rim_signer().root_sha256, **changes})


def failures(appraisal: rim.RimAppraisal) -> set[str]:
    wrong = [factor for factor in appraisal.factors if factor.verdict == "fail"]
    assert all(factor.expected and factor.got and factor.hint for factor in wrong)
    assert appraisal.failed is bool(wrong)
    return {factor.step for factor in wrong}


def payload(*resources: str) -> bytes:
    return vendor.signed_manifest(vendor.manifest(payload="".join(resources)))


def manifest(
    version: str = vendor.DRIVER, values: dict[int, bytes] | None = None, product: str = "GH100"
) -> rim.Manifest:
    golden = vendor.DRIVER_GOLDEN if values is None else values
    return rim.Manifest(product, version, "", {at: frozenset({value}) for at, value in golden.items()})


CERTIFICATE = (
    GOOD[GOOD.index(b"<ds:X509Certificate>") : GOOD.index(b"</ds:X509Certificate>")] + b"</ds:X509Certificate>"
)
VBIOS = manifest(vendor.VBIOS, vendor.VBIOS_GOLDEN)


def test_believes_a_genuine_manifest() -> None:
    appraisal = judge()
    assert failures(appraisal) == set()
    assert appraisal.manifest is not None
    assert (appraisal.manifest.product, appraisal.manifest.version) == ("GH100", "590.12")
    assert appraisal.manifest.tag_id == "ab" * 48
    assert appraisal.manifest.measurements == {at: {value} for at, value in vendor.DRIVER_GOLDEN.items()}
    assert appraisal.expiries[0].at == NOW + 86_400
    assert [f.step for f in appraisal.factors if f.verdict == "not-checked"] == ["evidence.ocsp"]


def test_may_start_with_an_xml_declaration() -> None:
    for declaration in (b'<?xml version="1.0"?>', b"<?xml version='1.0' encoding='UTF-8' ?>\n"):
        assert failures(judge(declaration + GOOD)) == set()


def test_a_changed_value_fails_the_signature_and_is_not_read() -> None:
    for old, new in ((b"590.12", b"590.13"), (b'index="99"', b'index="98"'), (b"<Payload>", b"<Payload>\n")):
        appraisal = judge(GOOD.replace(old, new))
        assert (failures(appraisal), appraisal.manifest) == ({"evidence.signature"}, None)


def test_another_key_signed() -> None:
    assert failures(judge(vendor.signed_manifest(key=ec.generate_private_key(ec.SECP384R1())))) == {
        "evidence.signature"
    }


@pytest.mark.parametrize(
    "value", ["", "AAAA", base64.b64encode(bytes(96)).decode(), base64.b64encode(b"\xff" * 96).decode()]
)
def test_signature_values_out_of_range_are_refused(value: str) -> None:
    start, end = GOOD.index(b"<ds:SignatureValue>") + 19, GOOD.index(b"</ds:SignatureValue>")
    assert failures(judge(GOOD[:start] + value.encode() + GOOD[end:])) == {"evidence.signature"}


def test_a_chain_that_brings_its_own_root_is_refused_by_the_root_alone() -> None:
    foreign = vendor.signed_manifest(issued=issue(vendor.RIM_LINKS))
    assert failures(judge(foreign)) == {"evidence.root"}
    assert failures(rim.judge(GOOD, now=NOW)) == {"evidence.root"}


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("valid", [(-1.0, 100.0), (100.0, -1.0)], ids=["not yet valid", "expired"])
def test_each_certificates_time_counts(at: int, valid: tuple[float, float]) -> None:
    issued = issue(changed(vendor.RIM_LINKS, at, valid=valid))
    appraisal = judge(vendor.signed_manifest(issued=issued), root_sha256=issued.root_sha256)
    assert failures(appraisal) == {"evidence.chain"}


def test_the_clock_is_compared_to_the_second() -> None:
    for now, wrong in ((-86_401, True), (-86_400, False), (86_400, False), (86_401, True), (float("nan"), True)):
        assert failures(judge(now=NOW + now)) == ({"evidence.chain"} if wrong else set())


def test_a_certificate_authority_signs_no_manifest() -> None:
    issued = vendor.rim_signer()
    above = type(issued)(issued.certificates[:-1], issued.keys[:-1])
    assert failures(judge(vendor.signed_manifest(issued=above))) == {"evidence.chain"}


def test_a_key_on_another_curve_is_refused() -> None:
    issued = issue(changed(vendor.RIM_LINKS, 3, curve=ec.SECP256R1()))
    wrong = failures(judge(vendor.signed_manifest(issued=issued), root_sha256=issued.root_sha256))
    assert wrong == {"evidence.chain", "evidence.signature"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"<SoftwareIdentity", b"<!DOCTYPE x [<!ENTITY e 'x'>]><SoftwareIdentity"),
        (b"<Payload>", b"<Payload><!-- x -->"),
        (b"<Payload>", b"<Payload><?x y?>"),
        (b"<Payload>", b"<Payload>&e;"),
        (b"<Payload>", b"<Payload>\xff"),
        (b"<Payload>", b"<Payload>\0"),
        (b"<Payload>", b"<Payload"),
        (b"<SoftwareIdentity", b"<?xml version='1.0' encoding='utf-7'?><SoftwareIdentity"),
        (b"SoftwareIdentity", b"OtherIdentity"),
        (b"2015/schema", b"2016/schema"),
        (b"2006/12/xml-c14n11", b"2001/10/xml-exc-c14n#"),
        (b"#ecdsa-sha384", b"#ecdsa-sha256"),
        (b"xmldsig-more#sha384", b"xmldsig-more#sha224"),
        (b'URI=""', b'URI="#x"'),
        (b'URI=""', b'URI="http://example.invalid/"'),
        (b'URI=""', b'URI="" Type="x"'),
        (b"#enveloped-signature", b"#base64"),
        (b"<ds:DigestMethod", b"<ds:X/><ds:DigestMethod"),
        (b"</ds:KeyInfo>", b"<ds:KeyValue/></ds:KeyInfo>"),
        (b"</ds:KeyInfo>", b"</ds:KeyInfo><ds:Object/>"),
        (b"</ds:X509Data>", b"<ds:X509CRL/></ds:X509Data>"),
        (b"ds:X509Data", b"ds:PGPData"),
        (b"ds:X509Certificate>", b"ds:X509CRL>"),
        (b"</ds:X509Data>", CERTIFICATE * 5 + b"</ds:X509Data>"),
        (b"<ds:X509Certificate>", b"<ds:X509Certificate>-"),
        (b"<ds:X509Certificate>", b"<ds:X509Certificate>AAAA"),
        (b"ds:Signature", b"ds:Sign"),
    ],
)
def test_refuses_manifests_of_another_shape(old: bytes, new: bytes) -> None:
    assert old in GOOD
    with pytest.raises(MalformedEvidence):
        judge(GOOD.replace(old, new))


def test_refuses_an_encoding_in_which_a_document_type_would_not_be_seen() -> None:
    for data in (GOOD.decode().encode("utf-16-le"), GOOD.decode().encode("utf-16")):
        with pytest.raises(MalformedEvidence):
            judge(data)


def test_a_library_that_finds_more_than_one_signature_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signxml.verifier.XMLVerifier.verify", lambda *_, **__: [])
    appraisal = judge()
    assert (failures(appraisal), appraisal.manifest) == ({"evidence.signature"}, None)


def test_the_signature_stands_once_and_outermost() -> None:
    start, end = GOOD.index(b"<ds:Signature "), GOOD.index(b"</SoftwareIdentity>")
    block = GOOD[start:end]
    wrapped = b'<SoftwareIdentity xmlns="http://standards.iso.org/iso/19770/-2/2015/schema.xsd">%b</SoftwareIdentity>'
    inner = GOOD[:start].replace(b"<Payload>", b"<Payload>" + block) + GOOD[end:]
    both = GOOD.replace(b"<Payload>", b"<Payload>" + block)
    for data in (GOOD.replace(block, block * 2), inner, both, GOOD[:start] + GOOD[end:], wrapped % GOOD):
        with pytest.raises(MalformedEvidence):
            judge(data)


@pytest.mark.parametrize(
    "resources",
    [
        [vendor.resource(1, bytes(48)), vendor.resource(1, bytes(48))],
        [vendor.resource(255, bytes(48))],
        [vendor.resource(1)],
        [vendor.resource(1, bytes(47))],
        [vendor.resource(1, bytes(48), count=2)],
        [vendor.resource(1, bytes(48), bytes(48), count=1)],
        [vendor.resource(1, bytes(48), size="32")],
        [vendor.resource(1, bytes(48), active="true")],
        [vendor.resource(1, bytes(48)).replace('type="Measurement"', 'type="x"')],
        [vendor.resource(1, bytes(48)).replace('index="1"', 'index="01"')],
        [vendor.resource(1, bytes(48)).replace("Resource", "File")],
    ],
)
def test_refuses_signed_payloads_of_another_shape(resources: list[str]) -> None:
    with pytest.raises(MalformedEvidence):
        judge(payload(*resources))


@pytest.mark.parametrize(
    "text",
    [
        vendor.manifest().replace("<Meta", "<Meta></Meta><Meta"),
        vendor.manifest().replace("Meta", "Mete"),
        vendor.manifest().replace("<Payload>", "<Payload></Payload><Payload>"),
        vendor.manifest("590.12&#xA;"),
        vendor.manifest(product=""),
        vendor.manifest().replace('tagId="ab', 'tagId="xy'),
    ],
)
def test_refuses_signed_words_out_of_bounds(text: str) -> None:
    with pytest.raises(MalformedEvidence):
        judge(vendor.signed_manifest(text))


def test_a_value_may_have_alternatives() -> None:
    appraisal = judge(payload(vendor.resource(7, bytes(48), b"\1" * 48)))
    assert appraisal.manifest is not None
    assert appraisal.manifest.measurements == {7: {bytes(48), b"\1" * 48}}


def test_without_the_extra_the_signature_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "signxml.verifier", None)
    appraisal = judge()
    assert (failures(appraisal), appraisal.manifest) == ({"evidence.signature"}, None)
    assert "cloister[rim]" in next(f.hint for f in appraisal.factors if f.verdict == "fail")


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"<Payload>", b'<Payload xmlns:x="relative">'), (b"<Payload>", b"<Payload>" + b"<a>" * 300 + b"</a>" * 300)],
    ids=["relative namespace", "deep"],
)
def test_what_the_library_refuses_is_a_failure_of_the_signature(old: bytes, new: bytes) -> None:
    assert failures(judge(GOOD.replace(old, new))) == {"evidence.signature"}


def test_too_long_a_manifest_is_refused() -> None:
    with pytest.raises(MalformedEvidence):
        judge(GOOD + b" " * 256 * 1024)


def test_a_device_matches_its_manifests() -> None:
    assert rim.compare(REPORT, [manifest(), VBIOS], product="GH100").verdict == "pass"
    for manifests in ([], [manifest()], [VBIOS], [manifest(), VBIOS, VBIOS], [manifest(), VBIOS, manifest("1", {})]):
        assert rim.compare(REPORT, manifests, product="GH100").verdict == "fail"
    assert rim.compare(REPORT, [manifest(), VBIOS], product="GB100").verdict == "fail"


def test_a_switch_has_one_manifest() -> None:
    report = parse_report(vendor.report(fields=vendor.SWITCH_FIELDS))
    one = manifest("96.10.55.00.01", product="LS10")
    assert rim.compare(report, [one], product="LS_10").verdict == "pass"
    assert rim.compare(report, [one, manifest()], product="LS_10").verdict == "fail"


def test_a_report_without_any_version_matches_nothing() -> None:
    for fields in ({}, {6: vendor.GPU_FIELDS[6]}, {3: vendor.GPU_FIELDS[3]}):
        report = parse_report(vendor.report(fields=fields))
        for manifests in ([], [manifest()], [VBIOS], [manifest(), VBIOS]):
            assert rim.compare(report, manifests, product="GH100").verdict == "fail"


def test_manifests_without_values_vouch_for_nothing() -> None:
    empty = [manifest(values={}), rim.Manifest("GH100", vendor.VBIOS, "", {})]
    wrong = rim.compare(REPORT, empty, product="GH100")
    assert (wrong.verdict, wrong.got) == ("fail", "none")


def test_a_value_that_was_not_measured_is_refused() -> None:
    wrong = rim.compare(REPORT, [manifest(values={64: bytes(48)}), VBIOS], product="GH100")
    assert (wrong.verdict, wrong.got) == ("fail", "others at m65")


def test_a_value_named_by_both_manifests_is_refused() -> None:
    both = {5: vendor.measurements()[6]}
    assert 5 in vendor.VBIOS_GOLDEN
    assert rim.compare(REPORT, [manifest(values=both), VBIOS], product="GH100").got == "others at m6"


def test_nvdec0s_value_counts_unless_it_is_off() -> None:
    wrong = [manifest(values={35: b"\1" * 48}), VBIOS]
    off = parse_report(vendor.report(fields={**vendor.GPU_FIELDS, 11: b"\x55"}))
    assert rim.compare(REPORT, wrong, product="GH100").verdict == "fail"
    assert rim.compare(off, wrong, product="GH100").verdict == "pass"
    more = [manifest(values={35: b"\1" * 48, 36: b"\1" * 48}), VBIOS]
    assert rim.compare(off, more, product="GH100").got == "others at m37"


@given(st.binary(max_size=200))
def test_is_total_over_bytes(data: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        judge(data)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_is_total_over_mangled_manifests(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(GOOD)))
    mangled = GOOD[:at] + data.draw(st.binary(max_size=6)) + GOOD[at + data.draw(st.integers(0, 6)) :]
    try:
        judge(mangled)
    except MalformedEvidence:
        return


def test_each_flipped_bit_of_what_is_signed_is_refused() -> None:
    """The signature's own white space and base64 are not signed; everything before it is."""
    for at in range(0, GOOD.index(b"<ds:Signature "), 13):
        mutant = GOOD[:at] + bytes([GOOD[at] ^ 1 << at % 8]) + GOOD[at + 1 :]
        try:
            appraisal = judge(mutant)
        except MalformedEvidence:
            continue
        assert appraisal.failed, at


@pytest.mark.skipif(not CASES, reason="real vectors lie beside the repository, in ../shared/vectors")
@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_real_manifests_get_the_verdict_of_their_case(case: Path) -> None:
    said = json.loads((case / "case.json").read_text())
    data = (case / "rim.xml").read_bytes()
    wrong = failures(rim.judge(data, now=said["now"]))
    if said["expected"]["verdict"] == "accept":
        assert wrong == set()
        assert failures(rim.judge(data.replace(b'product="GH100"', b'product="GH101"'), now=said["now"])) == {
            "evidence.signature"
        }
    else:
        assert wrong == REASONS[said["expected"]["reason"]]
