import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from tests.vendors import nvidia as vendor
from tests.vendors.p384 import NOW, Issued, Link, changed, issue, raw_signature

from cloister.errors import MalformedEvidence
from cloister.evidence.nvidia import parse_chain, parse_report
from cloister.verify import nvidia
from cloister.verify.certificates import load_certificate
from cloister.verify.p384 import check_chain, check_root, check_signature
from cloister.verify.platform import Appraisal
from cloister.verify.policy import Policy

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors" / "nvidia"
CASES = sorted(path.parent for path in VECTORS.glob("*/*/report.bin"))
REASONS = {
    "hopper_bad_signature": {"evidence.signature", "evidence.fwid"},  # its chain is another device's
    "chain_case2_root_missing_links": {
        "evidence.signature",
        "evidence.chain",
        "evidence.architecture",
        "evidence.fwid",
    },
    "hopper_evidence_0__flipped_measurement": {"evidence.signature"},
    "hopper_evidence_0__wrong_nonce": {"evidence.nonce"},
}

REPORT, CHAIN = vendor.report(), vendor.chain()
DRIVER_RIM = vendor.signed_manifest()
VBIOS_RIM = vendor.signed_manifest(vendor.manifest(vendor.VBIOS, vendor.VBIOS_GOLDEN))


def judge(report: bytes = REPORT, issued: Issued | None = None, **changes: Any) -> Appraisal:
    issued = issued or vendor.device()
    asked: dict[str, Any] = {
        "nonce": vendor.NONCE,
        "policy": Policy(),
        "now": NOW,
        "root_sha256": issued.root_sha256,
        "rim_root_sha256": vendor.rim_signer().root_sha256,
    }
    chain = changes.pop("chain", vendor.chain(issued))
    return nvidia.judge(report, chain, **{**asked, **changes})


def failures(appraisal: Appraisal) -> set[str]:
    return {factor.step for factor in appraisal.factors if factor.verdict == "fail"}


def refused(report: bytes = REPORT, issued: Issued | None = None, **changes: Any) -> set[str]:
    """The steps that failed; each says what was expected and got, and what to do."""
    appraisal = judge(report, issued, **changes)
    wrong = [factor for factor in appraisal.factors if factor.verdict == "fail"]
    assert all(factor.expected and factor.got and factor.hint for factor in wrong)
    return failures(appraisal)


def under(links: tuple[Link, ...], **changes: Any) -> set[str]:
    """A report under another chain that its verifier was told to believe in."""
    issued = issue(links)
    return refused(vendor.report(issued, **changes), issued)


def leaf(*extensions: tuple[x509.ExtensionType, bool]) -> tuple[Link, ...]:
    return changed(vendor.links(), vendor.DEVICE, extensions=extensions)


def unproved(appraisal: Appraisal) -> list[str]:
    return [factor.step for factor in appraisal.factors if factor.verdict == "not-checked"]


def test_believes_a_genuine_report() -> None:
    appraisal = judge()
    assert failures(appraisal) == set()
    assert (appraisal.platform, appraisal.simulated, appraisal.launch_sha256) == ("nvidia", False, None)
    assert appraisal.report_data == vendor.NONCE
    assert appraisal.platform_id == "GH100:48b02d0000000001"
    measured = dict(appraisal.measurement)
    digests = {f"m{at}": value.hex() for at, value in vendor.measurements().items()}
    assert {name: measured.pop(name) for name in digests} == digests
    assert measured == {
        "driver": "590.12",
        "vbios": "96.00.A5.00.01",
        "arch": "hopper",
        "fwid": vendor.FWID.hex(),
        "measurements": hashlib.sha256(vendor.record(vendor.measurements())).hexdigest(),
    }


def test_says_what_it_does_not_prove() -> None:
    assert unproved(judge()) == ["gpu.rim", "gpu.ocsp", "gpu.mode", "gpu.relay"]


def test_tells_when_each_certificate_ends() -> None:
    expiries = judge().expiries
    assert [expiry.what for expiry in expiries][:2] == ["GH100 certificate", "GH100 CA certificate 1"]
    assert len(expiries) == 5


@pytest.mark.parametrize(
    ("product", "architecture"), [("GH100", "hopper"), ("GB100", "blackwell"), ("GB202", "blackwell")]
)
def test_knows_the_gpus_architectures(product: str, architecture: str) -> None:
    device = vendor.device(product)
    appraisal = judge(vendor.report(device), device)
    assert failures(appraisal) == set()
    assert appraisal.measurement["arch"] == architecture


def test_knows_the_switch_which_reports_no_driver_and_no_firmware() -> None:
    device = vendor.device("LS_10")
    appraisal = judge(vendor.report(device, fields=vendor.SWITCH_FIELDS), device)
    assert failures(appraisal) == set()
    assert unproved(appraisal)[0] == "evidence.fwid"
    assert appraisal.measurement["arch"] == "ls10"
    assert not {"driver", "fwid"} & appraisal.measurement.keys()


def test_each_bit_of_a_report_matters() -> None:
    signer = vendor.device().certificates[-1]
    report = vendor.report(values={at: vendor.measurements()[at] for at in range(1, 17)})
    assert refused(report) == set()
    for at in range(len(report)):
        mutant = report[:at] + bytes([report[at] ^ 1 << at % 8]) + report[at + 1 :]
        try:
            parsed = parse_report(mutant)
        except MalformedEvidence:
            continue
        accepted = check_signature(signer, parsed.signature, parsed.signed, hint="").verdict == "pass"
        assert not accepted or refused(mutant), at


def test_each_bit_of_a_chain_matters() -> None:
    links = vendor.links()
    issued = issue((links[vendor.ROOT], links[vendor.BROM], links[vendor.DEVICE]))
    chain = vendor.chain(issued)
    for at in range(len(chain) - 1):
        mutant = chain[:at] + bytes([chain[at] ^ 1 << at % 8]) + chain[at + 1 :]
        try:
            certificates = [load_certificate(der, what="x") for der in parse_chain(mutant)]
        except MalformedEvidence:
            continue
        factors = (check_chain(certificates, NOW), check_root(certificates[-1], issued.root_sha256, vendor=""))
        assert any(factor.verdict == "fail" for factor in factors), at


@pytest.mark.parametrize("half", [bytes(48), b"\xff" * 48])
def test_signature_values_out_of_range_are_refused(half: bytes) -> None:
    assert refused(REPORT[:-96] + half * 2) == {"evidence.signature"}


def test_another_key_signed() -> None:
    assert refused(vendor.report(key=ec.generate_private_key(ec.SECP384R1()))) == {"evidence.signature"}


def test_the_signature_covers_the_request_too() -> None:
    message = vendor.exchange()
    assert refused(message + raw_signature(vendor.device().keys[-1], message[37:])) == {"evidence.signature"}


def test_a_changed_measurement_fails_the_signature() -> None:
    changed_message = vendor.exchange(values=vendor.measurements(m9=bytes(48)))
    assert refused(changed_message + REPORT[-96:]) == {"evidence.signature"}


def test_another_nonce_is_refused() -> None:
    assert refused(nonce=bytes(32)) == {"evidence.nonce"}
    assert refused(vendor.report(nonce=bytes(32))) == {"evidence.nonce"}
    assert failures(judge(nonce=b"")) == {"evidence.nonce"}


def test_another_devices_chain_is_refused() -> None:
    other = issue(vendor.links())
    assert refused(chain=vendor.chain(other), root_sha256=other.root_sha256) == {"evidence.signature"}


def test_a_chain_that_brings_its_own_root_is_refused_by_the_root_alone() -> None:
    other = issue(vendor.links())
    assert refused(vendor.report(other), chain=vendor.chain(other)) == {"evidence.root"}


def test_the_production_root_is_the_default() -> None:
    appraisal = nvidia.judge(REPORT, CHAIN, nonce=vendor.NONCE, policy=Policy(), now=NOW)
    assert failures(appraisal) == {"evidence.root"}


def test_a_chain_without_its_root_or_a_link_is_refused() -> None:
    pems = [certificate.public_bytes(Encoding.PEM) for certificate in reversed(vendor.device().certificates)]
    assert refused(chain=b"".join(pems[:-1])) == {"evidence.root"}
    assert refused(chain=b"".join([*pems[:2], *pems[3:]])) == {"evidence.chain"}


def test_the_root_alone_signs_no_report() -> None:
    root = vendor.device().certificates[0].public_bytes(Encoding.PEM)
    assert refused(chain=root) == {"evidence.chain", "evidence.architecture", "evidence.signature", "evidence.fwid"}


def test_something_that_is_no_certificate_is_malformed() -> None:
    with pytest.raises(MalformedEvidence):
        judge(chain=b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")


@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize("valid", [(-1.0, 100.0), (100.0, -1.0)], ids=["not yet valid", "expired"])
def test_each_certificates_time_counts(at: int, valid: tuple[float, float]) -> None:
    assert under(changed(vendor.links(), at, valid=valid)) == {"evidence.chain"}


def test_the_clock_is_compared_to_the_second() -> None:
    issued = issue(changed(vendor.links(), vendor.DEVICE, valid=(60.0, 60.0)))
    report = vendor.report(issued)
    for now, wrong in ((-61, True), (-60, False), (60, False), (61, True), (float("inf"), True), (float("nan"), True)):
        assert refused(report, issued, now=NOW + now) == ({"evidence.chain"} if wrong else set())


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize(
    "wrong",
    [
        {"ca": False},
        {"ca": False, "signs_certificates": True},
        {"constraints": False},
        {"signs_certificates": False},
    ],
    ids=str,
)
def test_only_certificate_authorities_issue(at: int, wrong: dict[str, Any]) -> None:
    assert under(changed(vendor.links(), at, **wrong)) == {"evidence.chain"}


@pytest.mark.parametrize("wrong", [{"ca": True, "constraints": True}, {"signs_certificates": True}], ids=str)
def test_the_device_signs_data_only(wrong: dict[str, Any]) -> None:
    assert under(changed(vendor.links(), vendor.DEVICE, **wrong)) == {"evidence.chain"}


def test_path_lengths_are_kept() -> None:
    assert under(changed(vendor.links(), vendor.IDENTITY, path_length=1)) == {"evidence.chain"}
    assert under(changed(vendor.links(), vendor.IDENTITY, path_length=2)) == set()


@pytest.mark.parametrize("at", range(5))
def test_every_key_is_on_p384(at: int) -> None:
    wrong = {"evidence.chain", "evidence.signature"} if at == vendor.DEVICE else {"evidence.chain"}
    assert under(changed(vendor.links(), at, curve=ec.SECP256R1())) == wrong


GENUINE_NAME = vendor.der(0x0C, f"NVIDIA:GH100:{vendor.SERIAL}".encode())


@pytest.mark.parametrize(
    "name",
    [
        vendor.device_name("TU100"),
        vendor.device_name("GH100", vendor="OTHER"),
        vendor.device_name("GH100", serial="x"),
        (x509.SubjectAlternativeName([x509.DNSName("NVIDIA:GH100:00")]), False),
        (x509.SubjectAlternativeName([x509.OtherName(x509.ObjectIdentifier("1.2.3.4"), GENUINE_NAME)]), False),
    ],
    ids=["unknown", "vendor", "serial", "another kind of name", "a name of another type"],
)
def test_a_device_of_no_known_architecture_is_refused(name: tuple[x509.ExtensionType, bool]) -> None:
    assert under(leaf(name, *vendor.dice("GH100"))) == {"evidence.architecture"}


def test_a_device_without_a_name_is_known_by_its_key() -> None:
    issued = issue(leaf(*vendor.dice("GH100")))
    appraisal = judge(vendor.report(issued), issued)
    assert failures(appraisal) == {"evidence.architecture"}
    assert len(appraisal.platform_id) == 64


def dice(data: bytes, oid: x509.ObjectIdentifier = vendor.HOPPER_OID) -> tuple[x509.ExtensionType, bool]:
    return x509.UnrecognizedExtension(oid, data), False


def test_hopper_firmware_is_the_one_that_was_certified() -> None:
    name = vendor.device_name("GH100")
    assert under(leaf(name, dice(vendor.hopper_dice(b"\1" * 48)))) == {"evidence.fwid"}
    assert under(leaf(name)) == {"evidence.fwid"}
    assert under(vendor.links(), fields={**vendor.GPU_FIELDS, 20: b"\1" * 48}) == {"evidence.fwid"}
    assert under(vendor.links(), fields={k: v for k, v in vendor.GPU_FIELDS.items() if k != 20}) == {"evidence.fwid"}
    assert under(leaf(name, dice(vendor.hopper_dice(bytes(48)))), fields={**vendor.GPU_FIELDS, 20: bytes(48)}) == {
        "evidence.fwid"
    }


def test_blackwell_firmware_is_compared_where_it_was_certified() -> None:
    name, oid = vendor.device_name("GB100"), vendor.BLACKWELL_OID
    assert under(leaf(name, dice(vendor.blackwell_dice(b"\1" * 48), oid))) == {"evidence.fwid"}
    issued = issue(leaf(name))
    appraisal = judge(vendor.report(issued), issued)
    assert (failures(appraisal), unproved(appraisal)[0]) == (set(), "evidence.fwid")


def test_a_switch_that_reports_firmware_must_report_the_right_one() -> None:
    device = vendor.device("LS_10")
    report = vendor.report(device, fields={**vendor.SWITCH_FIELDS, 20: b"\1" * 48})
    assert refused(report, device) == {"evidence.fwid"}


def test_measurements_are_pinned_by_any_one_entry() -> None:
    good: dict[str, str | int] = {"driver": "590.12", "vbios": "96.00.A5.00.01", "arch": "hopper"}
    pins = [{"driver": "550.90.07"}, good]
    assert refused(pins=pins) == set()
    assert {"gpu.measurement.driver"} < {factor.step for factor in judge(pins=pins).factors}
    assert refused(pins=[{**good, "driver": "570.00"}]) == {"gpu.measurement.driver"}
    assert refused(pins=[{"m64": "00"}]) == {"gpu.measurement.m64"}
    assert refused(pins=[{"measurements": "00"}]) == {"gpu.measurement.measurements"}


def test_no_entry_at_all_refuses_every_device() -> None:
    assert refused(pins=()) == {"gpu.measurement"}


def test_reference_values_that_are_met_replace_the_words_not_checked() -> None:
    appraisal = judge(rims=[DRIVER_RIM, VBIOS_RIM])
    assert failures(appraisal) == set()
    assert "gpu.rim" not in unproved(appraisal)
    assert [f.got for f in appraisal.factors if f.step == "gpu.rim"] == ["48 reference values"]
    assert {expiry.what for expiry in appraisal.expiries} >= {"RIM certificate", "RIM CA certificate 3"}


def test_a_measurement_beside_its_reference_value_is_refused() -> None:
    report = vendor.report(values=vendor.measurements(m3=bytes(48), m63=b"\1" * 48))
    appraisal = judge(report, rims=[DRIVER_RIM, VBIOS_RIM])
    assert failures(appraisal) == {"gpu.rim"}
    assert next(f.got for f in appraisal.factors if f.step == "gpu.rim") == "others at m3, m63"


def test_every_part_has_its_manifest_once_and_no_other() -> None:
    for rims in ([DRIVER_RIM], [VBIOS_RIM], [DRIVER_RIM, DRIVER_RIM], [DRIVER_RIM, VBIOS_RIM, VBIOS_RIM]):
        assert refused(rims=rims) == {"gpu.rim"}
    for text in (vendor.manifest("590.13"), vendor.manifest(product="GB100")):
        assert refused(rims=[vendor.signed_manifest(text), VBIOS_RIM]) == {"gpu.rim"}


def test_a_manifest_that_is_not_genuine_counts_for_nothing() -> None:
    forged = vendor.signed_manifest(key=ec.generate_private_key(ec.SECP384R1()))
    assert refused(rims=[forged, VBIOS_RIM]) == {"gpu.rim.signature", "gpu.rim"}
    foreign = vendor.signed_manifest(issued=issue(vendor.RIM_LINKS))
    assert refused(rims=[foreign, VBIOS_RIM]) == {"gpu.rim.root", "gpu.rim"}


@pytest.mark.skipif(not CASES, reason="real vectors lie beside the repository, in ../shared/vectors")
@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_real_reports_get_the_verdict_of_their_case(case: Path) -> None:
    said = json.loads((case / "case.json").read_text())
    report, chain = (case / "report.bin").read_bytes(), (case / "chain.pem").read_bytes()
    text = case / "nonce.hex"
    nonce = bytes.fromhex(text.read_text()) if text.exists() else parse_report(report).nonce

    def wrong(report: bytes) -> set[str]:
        return failures(nvidia.judge(report, chain, nonce=nonce, policy=Policy(), now=said["now"]))

    if said["expected"]["verdict"] == "accept":
        assert wrong(report) == set()
        assert wrong(report[:-1] + bytes([report[-1] ^ 1])) == {"evidence.signature"}
    else:
        assert wrong(report) == REASONS[case.name]
