import base64
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.vendors import amd

from cloister.errors import MalformedEvidence
from cloister.evidence.sev_snp import (
    REPORT_SIZE,
    VCEK,
    VERSIONS,
    VLEK,
    parse_certificate_table,
    parse_report,
    pem_or_der_certificates,
    pem_or_der_crl,
    product_of,
    tcb_components,
)

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors" / "sev-snp"
LEAF, ASK, ARK, CRL = b"\x30leaf", b"\x30ask", b"\x30ark", b"\x30crl"
CERTIFICATE, LIST = "CERTIFICATE", "X509 CRL"


def report(version: int = 3, **fields: Any) -> bytes:
    values = amd.report_fields(version=version, **fields)
    return amd.with_signature(amd.body(values), b"\x01" + bytes(71) + b"\x02" + bytes(71))


def pem(der: bytes, label: str = CERTIFICATE) -> bytes:
    return f"-----BEGIN {label}-----\n{base64.b64encode(der).decode()}\n-----END {label}-----\n".encode()


@pytest.mark.parametrize("version", VERSIONS)
def test_reads_every_field_where_the_specification_has_it(version: int) -> None:
    """Each field holds other bytes than all others."""
    values: dict[str, Any] = {"version": version, "signature_algo": 1}
    for at, (name, (_, form)) in enumerate(amd.OFFSETS.items(), 1):
        if name in values or (name == "cpuid" and version < 3) or ("mit_vector" in name and version < 4):
            continue
        size = struct.calcsize("<" + form)
        values[name] = bytes([at]) * size if form.endswith("s") else int.from_bytes(bytes([at]) * size, "little")
    parsed = parse_report(amd.with_signature(amd.body(values), b"\x05" + bytes(71) + b"\x06\x01" + bytes(70)))
    for name in values.keys() - {"signature_algo", "cpuid"}:
        assert getattr(parsed, "key_info" if name == "key_info" else name) == values[name], name
    assert parsed.cpuid == (tuple(values["cpuid"]) if version >= 3 else None)
    assert (parsed.launch_mit_vector is None) == (parsed.current_mit_vector is None) == (version < 4)
    assert parsed.signature == (5, 0x106)
    assert parsed.signed == amd.body(values)


@pytest.mark.parametrize("version", [0, 1, 6, 0x0200_0000, 0xFFFF_FFFF])
def test_refuses_unknown_versions(version: int) -> None:
    with pytest.raises(MalformedEvidence) as caught:
        parse_report(report(raw={0: struct.pack("<I", version)}))
    assert caught.value.step == "cpu.version"


@pytest.mark.parametrize("algorithm", [0, 2, 0x0100_0000])
def test_refuses_other_signature_algorithms(algorithm: int) -> None:
    with pytest.raises(MalformedEvidence) as caught:
        parse_report(report(signature_algo=algorithm))
    assert caught.value.step == "cpu.signature_algo"


def test_refuses_every_other_length() -> None:
    whole = report()
    for length in range(REPORT_SIZE):
        with pytest.raises(MalformedEvidence):
            parse_report(whole[:length])
    with pytest.raises(MalformedEvidence):
        parse_report(whole + b"\0")


@pytest.mark.parametrize("version", VERSIONS)
def test_names_reserved_bytes_that_are_not_zero(version: int) -> None:
    """Byte by byte: whatever no field covers is reserved, and is seen."""
    covered = set(range(0x2A0, 0x330))
    for name, (at, form) in amd.OFFSETS.items():
        if (name == "cpuid" and version < 3) or ("mit_vector" in name and version < 4):
            continue
        covered |= set(range(at, at + struct.calcsize("<" + form)))
    covered |= {*range(0x1E8, 0x1EB), *range(0x1EC, 0x1EF)}  # the firmware's versions
    whole = report(version)
    assert parse_report(whole).nonzero_reserved() == ()
    for at in range(REPORT_SIZE):
        if at not in covered:
            assert parse_report(whole[:at] + b"\x80" + whole[at + 1 :]).nonzero_reserved(), hex(at)
        elif 0x330 > at >= 0x38 and not 0x48 <= at < 0x4C:
            assert not parse_report(whole[:at] + b"\x80" + whole[at + 1 :]).nonzero_reserved(), hex(at)


def test_splits_the_key_information() -> None:
    parsed = parse_report(report(key_info=0b0_0111))
    assert (parsed.author_key_en, parsed.mask_chip_key, parsed.signing_key) == (True, True, VLEK)
    parsed = parse_report(report(key_info=0b1_1100))
    assert (parsed.author_key_en, parsed.mask_chip_key, parsed.signing_key) == (False, False, 7)
    assert parse_report(report(key_info=0b10_0000)).nonzero_reserved() == ("key_info",)


@pytest.mark.parametrize(
    ("family", "model", "product"),
    [
        (0x19, 0x00, "Milan"),
        (0x19, 0x0F, "Milan"),
        (0x19, 0x10, "Genoa"),
        (0x19, 0x1F, "Genoa"),
        (0x19, 0x20, None),
        (0x19, 0x9F, None),
        (0x19, 0xA0, "Genoa"),
        (0x19, 0xAF, "Genoa"),
        (0x19, 0xB0, None),
        (0x1A, 0x02, "Turin"),
        (0x1A, 0x11, "Turin"),
        (0x1A, 0x12, None),
        (0x17, 0x01, None),
    ],
)
def test_knows_the_product_by_its_processor(family: int, model: int, product: str | None) -> None:
    assert product_of((family, model, 0)) == product


def test_reads_both_layouts_of_tcb_versions() -> None:
    raw = bytes(range(1, 9))
    milan = tcb_components(raw, "Milan")
    assert milan == tcb_components(raw, "Genoa")
    assert (milan["bootloader"], milan["tee"], milan["snp"], milan["microcode"], "fmc" in milan) == (1, 2, 7, 8, False)
    turin = tcb_components(raw, "Turin")
    assert [turin[name] for name in ("fmc", "bootloader", "tee", "snp", "microcode")] == [1, 2, 3, 4, 8]


def test_reads_a_certificate_table() -> None:
    contents = {"ark": pem(ARK), "vcek": LEAF, "ask": ASK, "crl": pem(CRL, LIST), "vlek": pem(b"\x30vlek")}
    table = parse_certificate_table(amd.certificate_table({**contents, "12345678-0000-0000-0000-000000000000": b"x"}))
    assert table.chain(VCEK) == (LEAF, ASK, ARK)
    assert table.chain(VLEK) == (b"\x30vlek", ASK, ARK)
    assert table.crl == CRL


@pytest.mark.parametrize("blob", [b"", bytes(24), bytes(4096)])
def test_an_empty_certificate_table_has_no_chain(blob: bytes) -> None:
    table = parse_certificate_table(blob)
    assert table.chain(VCEK) == ()
    assert table.crl is None


def entry(offset: int, length: int) -> bytes:
    return amd.certificate_table({"vcek": b""})[:16] + struct.pack("<II", offset, length)


@pytest.mark.parametrize(
    "blob",
    [
        entry(48, 5),
        entry(48, 6) + bytes(24) + LEAF,
        entry(0, 24) + bytes(24) + LEAF,
        entry(0xFFFF_FFFF, 0xFFFF_FFFF) + bytes(24) + LEAF,
        entry(48, 0) + bytes(24) + LEAF,
        entry(72, 5) * 2 + bytes(24) + LEAF,
        entry(24 * 17, 5) * 17 + bytes(24),
        amd.certificate_table({"vcek": b"no certificate"}),
        amd.certificate_table({"vcek": pem(LEAF) * 2}),
        amd.certificate_table({"crl": pem(CRL)}),
        bytes(23),
        bytes(65_537),
    ],
    ids=[
        "no end",
        "beyond",
        "over itself",
        "huge",
        "empty",
        "twice",
        "many",
        "no PEM",
        "two",
        "no list",
        "short",
        "64 KB",
    ],
)
def test_refuses_certificate_tables_of_another_shape(blob: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        parse_certificate_table(blob)


def test_reads_pem_bundles_in_their_order() -> None:
    assert pem_or_der_certificates(pem(ASK) + b"\n" + pem(ARK)) == (ASK, ARK)
    assert pem_or_der_certificates(LEAF) == (LEAF,)
    assert pem_or_der_crl(pem(CRL, LIST)) == pem_or_der_crl(CRL) == CRL


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text",
        pem(LEAF)[:-4],
        pem(LEAF).replace(b"\nM", b"\n=M"),
        pem(LEAF) + pem(CRL, LIST),
        pem(LEAF) * 9,
        b"\x30" + bytes(65_536),
    ],
)
def test_refuses_what_is_no_bundle(data: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        pem_or_der_certificates(data)


@pytest.mark.parametrize(
    "data", [b"", b"text", pem(CRL), pem(CRL, LIST) * 2, pem(CRL, LIST) + b"x", b"\x30" + bytes(65_536)]
)
def test_refuses_what_is_no_revocation_list(data: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        pem_or_der_crl(data)


@pytest.mark.parametrize("parse", [parse_report, parse_certificate_table, pem_or_der_certificates, pem_or_der_crl])
@given(data=st.binary(max_size=120) | st.binary(min_size=REPORT_SIZE, max_size=REPORT_SIZE))
def test_is_total_over_bytes(parse: Callable[[bytes], object], data: bytes) -> None:
    try:
        parse(data)
    except MalformedEvidence:
        return


@given(data=st.data())
def test_is_total_over_mangled_tables(data: st.DataObject) -> None:
    table = amd.certificate_table({"vcek": pem(LEAF), "ask": ASK})
    at = data.draw(st.integers(0, len(table)))
    mangled = table[:at] + data.draw(st.binary(max_size=6)) + table[at + data.draw(st.integers(0, 6)) :]
    try:
        parse_certificate_table(mangled)
    except MalformedEvidence:
        return


def test_a_table_cut_short_is_refused_or_lacks_what_was_cut() -> None:
    table = amd.certificate_table({"vcek": LEAF, "ask": ASK, "ark": ARK})
    for length in range(1, len(table)):
        with pytest.raises(MalformedEvidence):
            parse_certificate_table(table[:length])


@pytest.mark.skipif(not VECTORS.is_dir(), reason="needs the shared vectors (../shared/vectors)")
def test_reads_a_real_certificate_table() -> None:
    case = VECTORS / "veraison" / "genoa_v3_tsm"
    table = parse_certificate_table((case / "auxblob.bin").read_bytes())
    chain = ((case / "leaf.der").read_bytes(), *pem_or_der_certificates((case / "ask_ark.pem").read_bytes()))
    assert table.chain(parse_report((case / "report.bin").read_bytes()).signing_key) == chain
