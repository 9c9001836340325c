from collections.abc import Mapping
from pathlib import Path

import pytest
from tests.vendors import nvidia as vendor

from cloister.evidence.nvidia import parse_report
from cloister.evidence.nvidia_rim import MAX_NAME, rim_names

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors" / "nvidia"
BOARD = vendor.BOARD_FIELDS


def names(product: str = "GH100", fields: Mapping[int, bytes] = BOARD) -> tuple[str, ...]:
    return rim_names(parse_report(vendor.report(fields=fields)), product=product)


def test_a_gpu_has_a_drivers_manifest_and_its_vbios() -> None:
    assert names() == (vendor.DRIVER_RIM, vendor.VBIOS_RIM)


@pytest.mark.parametrize(("chip", "prefix"), [({}, "GB100"), ({35: b"GB202\0"}, "GB202")])
def test_a_blackwell_names_its_chip_or_is_the_first_of_them(chip: dict[int, bytes], prefix: str) -> None:
    assert names("GB100", {**BOARD, **chip}) == (f"NV_GPU_CC_DRIVER_{prefix}_590.12", vendor.VBIOS_RIM)


def test_a_switch_has_one_manifest() -> None:
    assert names("LS_10", vendor.SWITCH_FIELDS) == ("NV_SWITCH_BIOS_5612_0002_890_9610550001",)


@pytest.mark.parametrize(
    "fields",
    [
        *({at: data for at, data in BOARD.items() if at != missing} for missing in (3, 6, 15, 17, 18)),
        {**BOARD, 3: b"590-beta"},
        {**BOARD, 3: b"590"},
        {**BOARD, 17: b"G/../520"},
        {**BOARD, 17: b"G" * 17},
        {**BOARD, 18: b"\xff"},
    ],
)
def test_a_device_that_is_not_named_whole_has_none(fields: Mapping[int, bytes]) -> None:
    assert names(fields=fields) == ()


def test_a_chip_that_is_no_name_has_none() -> None:
    assert names("GB100", {**BOARD, 35: b"GB 100"}) == ()
    assert names("XX100") == names("") == ()


@pytest.mark.skipif(not VECTORS.exists(), reason="../shared/vectors is not here")
@pytest.mark.parametrize(
    ("case", "product", "expected"),
    [
        ("attestation-sdk/hopper_evidence_0", "GH100", (vendor.DRIVER_RIM, vendor.VBIOS_RIM)),
        ("attestation-sdk/blackwell_575", "GB100", ("NV_GPU_CC_DRIVER_GB100_575.32", "NV_GPU_VBIOS_G525_0220_886_970088000F")),
        ("attestation-sdk/switch_evidence_ls10_0", "LS_10", ("NV_SWITCH_BIOS_5612_0002_890_9610550001",)),
    ],
)  # fmt: skip
def test_real_devices_have_the_names_that_nvidia_files_them_under(
    case: str, product: str, expected: tuple[str, ...]
) -> None:
    found = rim_names(parse_report((VECTORS / case / "report.bin").read_bytes()), product=product)
    assert found == expected
    assert all(len(name) <= MAX_NAME for name in found)
