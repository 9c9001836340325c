import json
from pathlib import Path
from typing import Any

import cbor2
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st
from tests.vendors import nvidia as vendor

from cloister.errors import MalformedEvidence
from cloister.evidence.nvidia import GpuEvidence, parse_chain, parse_fwids, parse_gpu, parse_report

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors" / "nvidia"
CASES = sorted(path.parent for path in VECTORS.glob("*/*/report.bin"))

REPORT = vendor.report()
CHAIN = vendor.chain()
GPU = GpuEvidence(REPORT, CHAIN, vendor.NONCE)


def report(**changes: Any) -> bytes:
    """Form is judged without a signature that holds."""
    return vendor.exchange(**changes) + bytes(96)


def block(
    index: int = 1, *, specification: int = 1, size: int = 51, length: int = 48, value: bytes = bytes(48)
) -> bytes:
    head = bytes([index, specification]) + size.to_bytes(2, "little")
    return head + b"\x01" + length.to_bytes(2, "little") + value


def test_reads_every_field() -> None:
    parsed = parse_report(REPORT)
    assert (parsed.nonce, parsed.driver, parsed.vbios, parsed.fwid) == (
        vendor.NONCE,
        "590.12",
        "96.00.A5.00.01",
        vendor.FWID,
    )
    assert parsed.measurements == vendor.measurements()
    assert parsed.record == vendor.record(vendor.measurements())
    assert parsed.opaque == vendor.GPU_FIELDS
    assert parsed.signed + parsed.signature == REPORT
    assert len(parsed.signature) == 96


def test_reads_a_switch() -> None:
    parsed = parse_report(report(fields=vendor.SWITCH_FIELDS))
    assert (parsed.driver, parsed.vbios, parsed.fwid, parsed.nvdec0_disabled) == ("", "96.10.55.00.01", b"", False)


@pytest.mark.parametrize(
    ("status", "disabled"), [(b"\x55", True), (b"\xaa", False), (b"", False), (b"\x55\x00", False)]
)
def test_knows_whether_nvdec0_is_off(status: bytes, disabled: bool) -> None:
    assert parse_report(report(fields={11: status})).nvdec0_disabled is disabled


@pytest.mark.parametrize(
    "changes",
    [
        {"request": b"\x10\xe0\x01\xff"},
        {"request": b"\x12\xe0\x01\xff"},
        {"request": b"\x11\xe1\x01\xff"},
        {"request": b"\x11\xe0\x00\xff"},
        {"request": b"\x11\xe0\x01\x01"},
        {"response": b"\x12\x60\x00\x00"},
        {"response": b"\x11\x7f\x00\x00"},
        {"response": b"\x11\x60\x01\x00"},
        {"response": b"\x11\x60\x00\x01"},
        {"nonce": bytes(31)},
        {"nonce": bytes(33)},
        {"blocks": 63},
        {"blocks": 65},
        {"values": {}},
        {"raw_record": block(), "blocks": 0},
        {"raw_record": block(0), "blocks": 1},
        {"raw_record": block() * 2, "blocks": 2},
        {"raw_record": block(specification=2), "blocks": 1},
        {"raw_record": block(size=50), "blocks": 1},
        {"raw_record": block(length=47, value=bytes(47)), "blocks": 1},
        {"raw_record": block(size=3, length=0, value=b""), "blocks": 1},
        {"raw_record": block(size=68, length=65, value=bytes(65)), "blocks": 1},
        {"raw_record": block()[:-1], "blocks": 1},
        {"raw_record": block() + b"\0", "blocks": 1},
        {"raw_opaque": bytes(3)},
        {"raw_opaque": b"\x03\x00\x02\x00x"},
        {"raw_opaque": vendor.opaque({3: b"1"}) * 2},
        {"fields": {99: bytes(1021)}},
        {"fields": {3: b"590\x1b[0m"}},
        {"fields": {3: b"\0"}},
        {"fields": {3: b"590\x0012"}},
        {"fields": {3: b"5" * 33}},
        {"fields": {6: b"96.10\n"}},
        {"fields": {6: bytes(7)}},
    ],
    ids=lambda changes: next(iter(changes.items())).__repr__()[:40],
)
def test_refuses_reports_of_another_shape(changes: dict[str, Any]) -> None:
    with pytest.raises(MalformedEvidence):
        parse_report(report(**changes))


def test_a_slot_is_one_of_eight() -> None:
    for slot in (0, 7):
        request, response = vendor.exchange()[:36] + bytes([slot]), b"\x11\x60\x00" + bytes([slot])
        parse_report(request + response + REPORT[41:])
    with pytest.raises(MalformedEvidence):
        parse_report(REPORT[:36] + b"\x08\x11\x60\x00\x08" + REPORT[41:])


def test_takes_what_is_at_its_bounds() -> None:
    values = {at: bytes(64) for at in range(1, 256)}
    parsed = parse_report(report(values=values, fields={99: bytes(1020)}))
    assert (parsed.measurements, parsed.opaque, parsed.vbios) == (values, {99: bytes(1020)}, "")


def test_refuses_truncation_everywhere_and_anything_after() -> None:
    for length in range(len(REPORT)):
        with pytest.raises(MalformedEvidence):
            parse_report(REPORT[:length])
    for data in (REPORT + b"\0", bytes(65_537)):
        with pytest.raises(MalformedEvidence):
            parse_report(data)


def test_reads_a_chain_with_or_without_its_last_line_feed() -> None:
    ders = tuple(reversed(vendor.device().ders))
    assert parse_chain(CHAIN) == parse_chain(CHAIN.rstrip(b"\n")) == ders


@pytest.mark.parametrize(
    "chain",
    [
        b"",
        b"\n",
        CHAIN + b"\n",
        b"\n" + CHAIN,
        b"x" + CHAIN,
        CHAIN + b"x",
        CHAIN.replace(b"\n", b"\r\n"),
        CHAIN.replace(b"\n", b"\n\n", 1),
        CHAIN.replace(b"\n", b"", 2),
        CHAIN.replace(b"CERTIFICATE", b"TRUSTED CERTIFICATE"),
        CHAIN.replace(b"-----END", b"=-----END", 1),
        b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n",
        b"-----BEGIN CERTIFICATE-----\nAB==\n-----END CERTIFICATE-----\n",
        b"-----BEGIN CERTIFICATE-----\nA===\n-----END CERTIFICATE-----\n",
        CHAIN * 2,
        CHAIN * 40,
    ],
    ids=range(16),
)
def test_refuses_chains_in_another_spelling(chain: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        parse_chain(chain)


def test_refuses_a_truncated_chain_unless_certificates_are_whole() -> None:
    last = vendor.device().certificates[0].public_bytes(Encoding.PEM)
    for length in range(len(CHAIN) - len(last) + 1, len(CHAIN) - 1):
        with pytest.raises(MalformedEvidence):
            parse_chain(CHAIN[:length])


def test_reads_firmware_digests_of_either_architecture() -> None:
    assert parse_fwids(vendor.hopper_dice()) == parse_fwids(vendor.blackwell_dice()) == (vendor.FWID,)
    assert parse_fwids(vendor.der(0x30, b"\x02\x01\x01")) == ()
    assert parse_fwids(vendor.hopper_dice(bytes(48))) == ()


@pytest.mark.parametrize(
    "extension",
    [
        b"",
        b"\x30",
        b"\x30\x80",
        b"\x30\x02\x02",
        b"\x30\x83\x00\x00\x01\x00",
        b"\x31\x00",
        vendor.hopper_dice() + b"\x05\x00",
        vendor.hopper_dice()[:-1],
        vendor.hopper_dice(bytes(47)),
        vendor.blackwell_dice(bytes(49)),
        vendor.der(0x30, vendor.der(0xA6, vendor.fwid(vendor.FWID, "608648016503040201"))),
        vendor.der(0x30, vendor.der(0xA6, vendor.der(0x31))),
        vendor.der(0x30, vendor.der(0xA6, vendor.der(0x30))),
    ],
)
def test_refuses_dice_extensions_of_another_shape(extension: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        parse_fwids(extension)


def test_an_item_round_trips() -> None:
    assert (GPU.item().media_type, parse_gpu(GPU.item().content)) == ("application/cbor", GPU)


@pytest.mark.parametrize(
    "changes",
    [{"report": "x"}, {"chain": ["x"]}, {"nonce": None}, {"nonce": bytes(31)}, {"more": b""}],
    ids=str,
)
def test_refuses_items_of_another_shape(changes: dict[str, object]) -> None:
    fields = {"report": REPORT, "chain": CHAIN, "nonce": vendor.NONCE}
    with pytest.raises(MalformedEvidence):
        parse_gpu(cbor2.dumps({**fields, **changes}))


@given(st.binary(max_size=200))
def test_is_total_over_bytes(data: bytes) -> None:
    for parse in (parse_report, parse_chain, parse_gpu):
        with pytest.raises(MalformedEvidence):
            parse(data)
    try:
        parse_fwids(data)
    except MalformedEvidence:
        return


@given(data=st.data())
def test_is_total_over_mangled_evidence(data: st.DataObject) -> None:
    for whole, parse in ((REPORT, parse_report), (CHAIN, parse_chain), (vendor.hopper_dice(), parse_fwids)):
        at = data.draw(st.integers(0, len(whole)))
        mangled = whole[:at] + data.draw(st.binary(max_size=6)) + whole[at + data.draw(st.integers(0, 6)) :]
        try:
            parse(mangled)
        except MalformedEvidence:
            continue


@pytest.mark.skipif(not CASES, reason="real vectors lie beside the repository, in ../shared/vectors")
@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_real_reports_are_read_as_their_case_claims(case: Path) -> None:
    claims = json.loads((case / "case.json").read_text())["claims"]
    parsed = parse_report((case / "report.bin").read_bytes())
    assert parse_chain((case / "chain.pem").read_bytes())
    if claims:
        assert parsed.nonce.hex() == claims["nonce"]
        assert parsed.driver == claims["driver"]
        assert parsed.opaque[6].hex() == claims["vbios"]
        assert len(parsed.measurements) == claims["measurements"]
