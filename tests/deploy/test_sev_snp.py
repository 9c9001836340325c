"""The digests below are those that an independent implementation (sev-snp-measure 0.0.13, by the authors of QEMU's and OVMF's
part in it) gave for the same firmware and kernel."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.deploy.efi import firmware, uki

from cloister.deploy.sev_snp import CPUS, SNP_CPU, launch_digest, parse_firmware
from cloister.errors import MalformedImage, WrongUse

FIRMWARE = firmware(code=b"x")
KERNEL = uki()


@pytest.mark.parametrize(
    ("vcpus", "cpu", "command_line", "features", "digest"),
    [
        (1, SNP_CPU, "", 1, "008f670785992e44b63850e27c544e07604d3c23413fd6a2043b9c8c277c019040a997ee07817996c2444053f56034a0"),
        (2, "EPYC-Milan", "", 1, "4acc3b2d6ba09d37ee53f3c9d3bd5778e65e35f4d1a12a8c83d610292ca8fcd0462689b230c3bf05d64550ecd2b7aa70"),
        (8, "EPYC-Genoa", "console=ttyS0", 1, "52ba35c5e8bbab94a6094dabe3b6871f8a6ac39cb8b2a61398811b5f34ea36dc078fbaf28252c442bc8e9bff87d668cf"),
        (8, SNP_CPU, "console=ttyS0", 33, "3ff800c72912ca9051d76a015ec2d8b725e7dedc5110b35d249e5aa0bad4402c284fa7c73aaeb84401ec46d3005b3b3b"),
    ],
)  # fmt: skip
def test_is_what_another_implementation_computes(
    vcpus: int, cpu: str, command_line: str, features: int, digest: str
) -> None:
    got = launch_digest(
        parse_firmware(FIRMWARE), KERNEL, vcpus=vcpus, cpu=cpu, command_line=command_line, features=features
    )
    assert got.hex() == digest


def test_firmware_kernel_and_cpus_all_count() -> None:
    def digest(ovmf: bytes = FIRMWARE, kernel: bytes = KERNEL, **changes: object) -> bytes:
        words = {"vcpus": 2, "cpu": SNP_CPU, **changes}
        return launch_digest(parse_firmware(ovmf), kernel, **words)  # type: ignore[arg-type]

    others = [
        digest(ovmf=firmware(code=b"y")),
        digest(kernel=KERNEL[:-1] + b"\1"),
        digest(vcpus=3),
        digest(cpu="EPYC-Milan"),
        digest(features=5),
        digest(command_line="quiet"),
    ]
    assert len({digest(), *others}) == 7


def test_a_firmware_that_checks_no_kernel_pins_no_code() -> None:
    for ovmf in (firmware(hashes=False), firmware(areas=[(0x800000, 0x1000, 1)])):
        with pytest.raises(MalformedImage, match="does not check the kernel"):
            launch_digest(parse_firmware(ovmf), KERNEL, vcpus=1, cpu=SNP_CPU)


@pytest.mark.parametrize(("vcpus", "cpu"), [(0, SNP_CPU), (1025, SNP_CPU), (1, "max")])
def test_refuses_cpus_that_no_guest_has(vcpus: int, cpu: str) -> None:
    with pytest.raises(WrongUse):
        launch_digest(parse_firmware(FIRMWARE), KERNEL, vcpus=vcpus, cpu=cpu)


def test_cpus_are_known_by_qemus_words() -> None:
    assert {f"{CPUS[name]:#x}" for name in ("EPYC-v4", "EPYC-Rome", "EPYC-Milan", "EPYC-Genoa")} == {
        "0x800f12",
        "0x830f10",
        "0xa00f11",
        "0xa10f10",
    }


TABLE_END = len(FIRMWARE) - 32
METADATA = len(FIRMWARE) - 4096


def patched(at: int, layout: str, *values: object) -> bytes:
    data = bytearray(FIRMWARE)
    struct.pack_into(layout, data, at, *values)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        FIRMWARE[1:],
        bytes(65536),
        patched(TABLE_END - 18, "<H", 17),
        patched(TABLE_END - 18, "<H", 65535),
        patched(TABLE_END - 18 - 18, "<H", 0),
        patched(TABLE_END - 18 - 18, "<H", 60000),
        patched(METADATA, "<4s", b"ASEX"),
        patched(METADATA + 12, "<I", 65),
        patched(METADATA + 16 + 8, "<I", 7),
        patched(METADATA + 16, "<I", 0x800001),
        patched(METADATA + 16 + 4, "<I", 1 << 31),
    ],
)
def test_refuses_other_firmware(data: bytes) -> None:
    with pytest.raises(MalformedImage):
        parse_firmware(data)


@given(data=st.data())
def test_is_total_over_mangled_firmware(data: st.DataObject) -> None:
    at = data.draw(st.one_of(st.integers(METADATA, METADATA + 80), st.integers(TABLE_END - 110, TABLE_END)))
    junk = data.draw(st.binary(max_size=6))
    try:
        parsed = parse_firmware(FIRMWARE[:at] + junk + FIRMWARE[at + len(junk) :])
        launch_digest(parsed, KERNEL, vcpus=1, cpu=SNP_CPU)
    except MalformedImage:
        return
