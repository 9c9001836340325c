import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_public_key
from tests.vendors.azure import USER_DATA, hardware, runtime
from tests.vendors.tpm import NOW, ZERO_PCRS, Maker, Tpm, event, event_log, extended, pinned
from tests.verify.world import flips

from cloister.errors import MalformedEvidence
from cloister.evidence.azure import parse_hcl
from cloister.evidence.tpm import TpmEvidence, encode_rsassa, public_area
from cloister.verify import intel, sev_snp
from cloister.verify.azure import judge
from cloister.verify.factors import failed
from cloister.verify.platform import Appraisal
from cloister.verify.policy import Limits, Policy, Tcb

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors" / "azure-vtpm" / "trustee"
real = pytest.mark.skipif(not VECTORS.is_dir(), reason="the real vectors are not beside this tree")

EXTRA = hashlib.sha256(b"the CPU's quote").digest()
LAUNCH = b'{"v":1}'
PCRS = {**ZERO_PCRS, 4: extended(b"loader"), 14: extended(LAUNCH)}


def vm() -> Tpm:
    """Azure's attestation keys are RSA, with these attributes."""
    return Tpm(key=rsa.generate_private_key(65537, 2048), attributes=0x00050472)


def public(tpm: Tpm) -> rsa.RSAPublicKey:
    key = tpm.key.public_key()
    assert isinstance(key, rsa.RSAPublicKey)
    return key


TPM, OTHER = vm(), vm()
RUNTIME = runtime(public(TPM))
GOOD = TPM.evidence(EXTRA, PCRS)


def appraise(tpm: TpmEvidence = GOOD, data: bytes = RUNTIME, **changes: Any) -> Appraisal:
    given: dict[str, Any] = {"qualifying_data": EXTRA, "policy": Policy(), "now": NOW, "launch": LAUNCH}
    report = changes.pop("report", hardware(RUNTIME))
    return judge(report, data, tpm, **{**given, **changes})


def failures(appraisal: Appraisal) -> set[str]:
    return {factor.step for factor in appraisal.factors if factor.verdict == "fail"}


def refused(tpm: TpmEvidence = GOOD, data: bytes = RUNTIME, **changes: Any) -> set[str]:
    return failures(appraise(tpm, data, **changes))


def test_a_genuine_machine_is_accepted() -> None:
    appraisal = appraise(eventlog=event_log(event(4, b"loader")))
    assert failures(appraisal) == set()
    assert appraisal.platform == "azure-sev-snp"
    assert appraisal.report_data == USER_DATA
    assert appraisal.launch_sha256 == hashlib.sha256(LAUNCH).digest()
    assert appraisal.measurement["pcr4"] == PCRS[4].hex()
    assert appraisal.measurement["measurement"] == "ab" * 48
    assert appraisal.platform_id == "cd" * 64
    assert appraisal.tcb == hardware(RUNTIME).tcb
    assert [expiry.what for expiry in appraisal.expiries] == ["VCEK"]
    assert appraisal.counters == {"amd-crl": 4}
    assert appraise(report=hardware(RUNTIME, platform="tdx")).platform == "azure-tdx"


def test_what_the_host_configured_is_shown_and_not_believed() -> None:
    (factor,) = [factor for factor in appraise().factors if factor.step == "evidence.vm-configuration"]
    assert factor.verdict == "not-checked"
    assert "secure-boot=true" in factor.got


def test_a_failure_of_the_hardware_stays_one() -> None:
    report = hardware(RUNTIME, failed("evidence.debug", expected="off", got="on"))
    assert refused(report=report) == {"evidence.debug"}


def test_runtime_data_that_the_hardware_does_not_vouch_for_are_refused() -> None:
    assert refused(data=runtime(public(TPM), **{"user-data": "00" * 64})) == {"evidence.runtime"}
    assert refused(data=RUNTIME + b" ") == {"evidence.runtime"}
    assert refused(report=hardware(runtime(public(OTHER)))) == {"evidence.runtime"}


def test_another_machines_tpm_is_refused() -> None:
    assert refused(OTHER.evidence(EXTRA, PCRS)) == {"evidence.ak", "evidence.signature"}
    assert refused(replace(OTHER.evidence(EXTRA, PCRS), ak=GOOD.ak)) == {"evidence.signature", "evidence.ak-name"}
    assert refused(replace(OTHER.evidence(EXTRA, PCRS), ak=b"")) == {"evidence.signature"}
    swapped = runtime(public(OTHER))
    assert refused(OTHER.evidence(EXTRA, PCRS), swapped) == {"evidence.runtime"}


def test_the_public_area_may_be_left_out_which_is_said() -> None:
    appraisal = appraise(replace(GOOD, ak=b""))
    assert failures(appraisal) == set()
    verdicts = {factor.step: factor.verdict for factor in appraisal.factors}
    assert verdicts["evidence.ak-attributes"] == "not-checked"


def test_a_key_that_is_no_attestation_key_is_refused() -> None:
    assert refused(replace(TPM, attributes=0x00040472).evidence(EXTRA, PCRS)) == {"evidence.ak-attributes"}


def test_a_replayed_quote_is_refused() -> None:
    assert refused(TPM.evidence(bytes(32), PCRS)) == {"evidence.extra-data"}


def test_a_changed_pcr_or_another_boot_log_is_refused() -> None:
    assert refused(replace(GOOD, pcrs={**PCRS, 4: bytes(32)})) == {"evidence.pcr-digest"}
    assert refused(eventlog=event_log(event(4, b"other loader"))) == {"evidence.eventlog"}


def test_another_launch_config_is_not_this_one() -> None:
    assert appraise(launch=b"{}").launch_sha256 == b""


def test_certificates_beside_the_key_are_judged_too() -> None:
    maker = Maker()
    certified = TPM.certified(maker)
    given: dict[str, Any] = {"roots": pinned(maker.root), "crls": [maker.crl()]}
    appraisal = appraise(certified.evidence(EXTRA, PCRS), **given)
    assert failures(appraisal) == set()
    assert len(appraisal.expiries) == 5
    assert appraisal.counters == {"amd-crl": 4, "tpm-crl CN=TPM Root": 3}
    assert refused(certified.evidence(EXTRA, PCRS), crls=[maker.crl()]) == {"evidence.root"}
    assert refused(certified.evidence(EXTRA, PCRS), **{**given, "crls": [maker.crl(5)]}) == {"evidence.crl"}
    foreign = replace(TPM, chain=OTHER.certified(maker).chain)
    assert refused(foreign.evidence(EXTRA, PCRS), **given) == {"evidence.ak"}


def test_no_single_bit_may_change() -> None:
    mutants = [(replace(GOOD, quote=data), RUNTIME) for data in flips(GOOD.quote)]
    mutants += [(replace(GOOD, signature=data), RUNTIME) for data in flips(GOOD.signature)]
    mutants += [(replace(GOOD, ak=data), RUNTIME) for data in flips(GOOD.ak)]
    mutants += [(replace(GOOD, pcrs={**PCRS, 4: data}), RUNTIME) for data in flips(PCRS[4])]
    mutants += [(GOOD, data) for data in flips(RUNTIME)]
    for tpm, data in mutants:
        try:
            assert refused(tpm, data)
        except MalformedEvidence:
            continue


CASES = {
    "az-snp-vtpm_evidence_v0": set(),
    "az-snp-vtpm_evidence_v0__flipped_pcr": {"evidence.pcr-digest"},
    "az-snp-vtpm_evidence_v0__flipped_runtime_data": {"evidence.runtime"},
    "az-snp-vtpm_evidence_v0__flipped_tpm_message": {"evidence.signature", "evidence.pcr-digest"},
    "az-snp-vtpm_evidence_v2": set(),
    "az-snp-vtpm_evidence_v2__flipped_pcr": {"evidence.pcr-digest"},
    "az-snp-vtpm_evidence_v2__flipped_runtime_data": {"evidence.runtime"},
    "az-snp-vtpm_evidence_v2__flipped_tpm_message": {"evidence.signature", "evidence.pcr-digest"},
    "az-tdx-vtpm_evidence_v1": set(),
}
"""What is wrong with a case beyond what the hardware's own verifier says."""


def read(name: str) -> tuple[Path, TpmEvidence, bytes, bytes, bytes]:
    folder = VECTORS / name
    key = load_pem_public_key((folder / "ak_pub.pem").read_bytes())
    assert isinstance(key, rsa.RSAPublicKey)
    pcrs = json.loads((folder / "pcrs_sha256.json").read_text())
    tpm = TpmEvidence(
        (folder / "tpm_message.bin").read_bytes(),
        encode_rsassa((folder / "tpm_signature.bin").read_bytes()),
        {index: bytes.fromhex(value) for index, value in enumerate(pcrs)},
        public_area(key, attributes=0x00050472),
    )
    nonce = bytes.fromhex(json.loads((folder / "case.json").read_text())["claims"]["nonce"])
    report = parse_hcl((folder / "hcl_report.bin").read_bytes()).hardware
    quote = folder / "td_quote.bin"
    # The offset of report_data: SNP's ABI specification, table 23; Intel's TDX quote, header 48 and body offset 520.
    half = quote.read_bytes()[568:632] if quote.exists() else report[0x50:0x90]
    return folder, tpm, (folder / "runtime_data.json").read_bytes(), nonce, half


@real
@pytest.mark.parametrize("name", CASES)
def test_real_machines_under_genuine_hardware(name: str) -> None:
    _, tpm, data, nonce, report_data = read(name)
    report = replace(hardware(data), report_data=report_data)
    appraisal = judge(report, data, tpm, qualifying_data=nonce, policy=Policy(), now=NOW)
    assert failures(appraisal) == CASES[name]
    assert appraisal.measurement["pcr0"] == tpm.pcrs[0].hex()


def certificates(folder: Path) -> list[bytes]:
    """The chip's, and its CA's and root's; the two stand in one PEM file."""
    above = x509.load_pem_x509_certificates((folder / "ask_ark.pem").read_bytes())
    return [(folder / "vcek.der").read_bytes(), *(one.public_bytes(Encoding.DER) for one in above)]


@real
@pytest.mark.parametrize("name", [name for name in CASES if "snp" in name])
def test_real_machines_on_amd(name: str) -> None:
    folder, tpm, data, nonce, _ = read(name)
    now = json.loads((folder / "case.json").read_text())["now"]
    policy = Policy(tcb=Tcb(min_sev_snp={"snp": 0}), limits=Limits(dangerously_allow_missing_crl=True))
    report = parse_hcl((folder / "hcl_report.bin").read_bytes()).hardware
    chip = sev_snp.judge(report, certificates(folder), None, policy=policy, now=now)
    appraisal = judge(chip, data, tpm, qualifying_data=nonce, policy=policy, now=now)
    assert failures(appraisal) == CASES[name]
    assert appraisal.platform == "azure-sev-snp"
    flipped = report[:0x90] + bytes([report[0x90] ^ 1]) + report[0x91:]
    chip = sev_snp.judge(flipped, certificates(folder), None, policy=policy, now=now)
    assert "evidence.signature" in refused_hardware(chip, data, tpm, nonce)


def refused_hardware(chip: Appraisal, data: bytes, tpm: TpmEvidence, nonce: bytes) -> set[str]:
    return failures(judge(chip, data, tpm, qualifying_data=nonce, policy=Policy(), now=NOW))


@real
def test_a_real_machine_on_intel_is_refused_for_its_own_reason() -> None:
    folder, tpm, data, nonce, _ = read("az-tdx-vtpm_evidence_v1")
    case = VECTORS.parents[1] / "tdx" / "trustee" / "azure_sept_ve_enabled"
    now = json.loads((case / "case.json").read_text())["now"]
    collateral = (case / "collateral.json").read_bytes()
    domain = intel.judge_tdx((folder / "td_quote.bin").read_bytes(), collateral, policy=Policy(), now=now)
    steps = refused_hardware(domain, data, tpm, nonce)
    assert steps == failures(domain) != set()


@real
def test_the_attestation_key_of_one_real_machine_does_not_serve_another() -> None:
    _, tpm, _, nonce, _ = read("az-snp-vtpm_evidence_v0")
    _, _, data, _, report_data = read("az-snp-vtpm_evidence_v2")
    report = replace(hardware(data), report_data=report_data)
    appraisal = judge(report, data, tpm, qualifying_data=nonce, policy=Policy(), now=NOW)
    assert failures(appraisal) == {"evidence.ak", "evidence.signature"}
