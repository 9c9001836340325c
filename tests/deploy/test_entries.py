import io
from dataclasses import replace

import pytest
from tests.deploy.efi import CMDLINE, disk, firmware, uki
from tests.vendors.tpm import NOW, ZERO_PCRS, Tpm

from cloister.deploy.entries import PLATFORMS, Start, predict_entries
from cloister.deploy.gpt import read_table
from cloister.deploy.predict import predict_pcrs, predict_rtmrs
from cloister.deploy.uki import parse_image
from cloister.errors import MalformedImage, WrongUse
from cloister.verify import Policy
from cloister.verify.measurement import check_measurement
from cloister.verify.policy import check_entry
from cloister.verify.vtpm import judge

KERNEL = uki()
IMAGE = parse_image(KERNEL)
TABLE = read_table(io.BytesIO(disk([bytes([1]) * 128])))
STARTS = {
    "vtpm": Start(platform="vtpm"),
    "tdx": Start(platform="tdx", table=TABLE, pins={"mr_td": "ab" * 48}),
    "sev-snp": Start(platform="sev-snp", started_by="qemu", firmware=firmware(), vcpus=(1, 4)),
    "azure-tdx": Start(platform="azure-tdx", pins={"mr_td": "ab" * 48}),
    "azure-sev-snp": Start(platform="azure-sev-snp", pins={"id_key_digest": "ab" * 48}),
}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_each_entry_is_one_that_a_policy_takes(platform: str) -> None:
    entries = predict_entries(KERNEL, STARTS[platform])
    assert entries
    for entry in entries:
        check_entry(platform, entry)


def test_a_tpms_entries_name_each_phase_in_which_a_service_runs() -> None:
    first, second = predict_entries(KERNEL, STARTS["vtpm"])
    assert set(first) == {"pcr4", "pcr9", "pcr11", "pcr12"}
    pcrs = predict_pcrs(IMAGE)
    assert second == {f"pcr{at}": pcrs[at].hex() for at in (4, 9, 11, 12)}
    assert {name for name in first if first[name] != second[name]} == {"pcr11"}


def test_a_trust_domains_entry_has_its_firmware_beside_the_predicted_registers() -> None:
    (entry,) = predict_entries(KERNEL, STARTS["tdx"])
    rtmrs = predict_rtmrs(IMAGE, table=TABLE)
    assert entry == {"mr_td": "ab" * 48, "rtmr1": rtmrs[1].hex(), "rtmr2": rtmrs[2].hex()}


def test_a_launch_digest_is_one_for_each_number_of_cpus() -> None:
    one, four = predict_entries(KERNEL, STARTS["sev-snp"])
    assert (one["vcpus"], four["vcpus"]) == (1, 4)
    assert one["measurement"] != four["measurement"]


def test_nobody_can_pin_what_is_predicted_otherwise() -> None:
    start = replace(STARTS["vtpm"], pins={"pcr4": "00" * 32, "pcr7": "11" * 32})
    assert [entry["pcr7"] for entry in predict_entries(KERNEL, start)] == ["11" * 32] * 2
    assert {entry["pcr4"] for entry in predict_entries(KERNEL, start)} == {predict_pcrs(IMAGE)[4].hex()}


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (Start(platform="nitro"), "for that platform"),
        (Start(platform="tdx", table=TABLE), "firmware's measurement"),
        (Start(platform="azure-sev-snp"), "paravisor"),
        (replace(STARTS["tdx"], table=None), "partition table"),
        (replace(STARTS["sev-snp"], started_by="disk"), "what QEMU hands"),
        (replace(STARTS["sev-snp"], firmware=b""), "what QEMU hands"),
        (replace(STARTS["sev-snp"], vcpus=()), "what QEMU hands"),
        (replace(STARTS["vtpm"], phases=(("final",),)), "phases"),
    ],
)
def test_says_what_is_missing(start: Start, words: str) -> None:
    with pytest.raises(WrongUse, match=words):
        predict_entries(KERNEL, start)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_refuses_what_is_no_image(platform: str) -> None:
    with pytest.raises(MalformedImage):
        predict_entries(b"MZ no image", STARTS[platform])


# A machine's quote, judged under what was predicted


def quoted(kernel: bytes, **extended: bytes) -> list[tuple[str, str]]:
    """(step, verdict) of each measurement that a TPM quotes after it booted `kernel`; `extended`: registers it shows else."""
    tpm = Tpm()
    pcrs = {**ZERO_PCRS, **predict_pcrs(parse_image(kernel)), **{int(at[3:]): value for at, value in extended.items()}}
    policy = Policy(platforms=("vtpm",), measurements={"vtpm": predict_entries(KERNEL, STARTS["vtpm"])})
    appraisal = judge(tpm.evidence(b"x" * 32, pcrs), qualifying_data=b"x" * 32, policy=policy, now=NOW, ak_pins=tpm.pin)
    return [(factor.step, factor.verdict) for factor in check_measurement(policy.measurements, appraisal)]


def failing(factors: list[tuple[str, str]]) -> list[str]:
    return [step for step, verdict in factors if verdict == "fail"]


def test_a_machine_that_booted_this_image_is_believed() -> None:
    factors = quoted(KERNEL)
    assert failing(factors) == []
    assert {(f"measurement.pcr{at}", "pass") for at in (4, 9, 11, 12)} <= set(factors)


def test_one_changed_byte_of_the_command_line_is_refused_by_name() -> None:
    steps = failing(quoted(uki(cmdline=CMDLINE[:-1] + b"e")))
    assert steps == ["measurement.pcr11", "measurement.pcr4", "measurement.pcr9"]


def test_whatever_a_host_adds_beside_the_image_is_refused_by_name() -> None:
    assert failing(quoted(KERNEL, pcr12=b"\1" * 32)) == ["measurement.pcr12"]
    assert failing(quoted(KERNEL, pcr9=b"\1" * 32)) == ["measurement.pcr9"]
