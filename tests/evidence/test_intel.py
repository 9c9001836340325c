import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.vendors import intel as vendor

from cloister.errors import MalformedEvidence
from cloister.evidence.intel import (
    EnclaveReport,
    TdReport,
    parse_enclave_report,
    parse_pem_chain,
    parse_quote,
    parse_td_report,
)
from cloister.evidence.intel_collateral import parse_collateral, parse_qe_identity, parse_tcb_info

VECTORS = Path(__file__).resolve().parents[2].parent / "shared" / "vectors"

SGX = vendor.sgx()
TDX4 = vendor.tdx()
TDX5 = vendor.tdx(version=5, td15=True)
QUOTES = {
    "sgx 3": SGX.quote,
    "tdx 4": TDX4.quote,
    "tdx 5": vendor.tdx(version=5).quote,
    "tdx 5, report 1.5": TDX5.quote,
}
CHAIN = parse_quote(SGX.quote).certification_data


def changed(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def test_reads_every_field_of_an_enclave_report() -> None:
    fields: dict[str, Any] = {
        "cpu_svn": b"\x01" * 16,
        "misc_select": 2,
        "isv_ext_prod_id": b"\x03" * 16,
        "attributes": b"\x04" * 16,
        "mr_enclave": b"\x05" * 32,
        "mr_signer": b"\x06" * 32,
        "config_id": b"\x07" * 64,
        "isv_prod_id": 8,
        "isv_svn": 9,
        "config_svn": 10,
        "isv_family_id": b"\x0b" * 16,
        "report_data": b"\x0c" * 64,
    }
    assert parse_enclave_report(vendor.enclave_report(**fields)) == EnclaveReport(**fields, reserved=bytes(118))


def test_reads_every_field_of_a_td_report() -> None:
    sizes = {"tee_tcb_svn": 16, "seam_attributes": 8, "td_attributes": 8, "xfam": 8, "report_data": 64}
    names = "tee_tcb_svn mr_seam mr_signer_seam seam_attributes td_attributes xfam mr_td mr_config_id mr_owner"
    names += " mr_owner_config rtmr0 rtmr1 rtmr2 rtmr3 report_data"
    fields = {name: bytes([i]) * sizes.get(name, 48) for i, name in enumerate(names.split())}
    newer = {"tee_tcb_svn2": b"\x20" * 16, "mr_service_td": b"\x21" * 48}
    rtmr = (fields["rtmr0"], fields["rtmr1"], fields["rtmr2"], fields["rtmr3"])
    rest: dict[str, Any] = {name: value for name, value in fields.items() if not name.startswith("rtmr")}
    assert parse_td_report(vendor.td_report(**fields)) == TdReport(**rest, rtmr=rtmr)
    assert parse_td_report(vendor.td_report(**fields, **newer)) == TdReport(**rest, rtmr=rtmr, **newer)


@pytest.mark.parametrize("name", QUOTES)
def test_reads_quotes_of_every_version(name: str) -> None:
    quote = parse_quote(QUOTES[name])
    assert (quote.header.version, quote.certification_type) == (int(name.split()[1][0]), 5)
    assert (quote.signed, quote.report.report_data) == (QUOTES[name][: len(quote.signed)], vendor.REPORT_DATA)
    assert (len(quote.signature), len(quote.qe_auth_data), quote.padding, quote.trailing) == (64, 32, 0, b"")
    assert len(parse_pem_chain(quote.certification_data, what="chain")) == 3


@pytest.mark.parametrize("name", QUOTES)
def test_refuses_truncation_everywhere(name: str) -> None:
    for length in range(len(QUOTES[name])):
        with pytest.raises(MalformedEvidence):
            parse_quote(QUOTES[name][:length])


def test_refuses_bytes_after_an_sgx_quote() -> None:
    for after in (b"\0", b"x"):
        with pytest.raises(MalformedEvidence, match="left over"):
            parse_quote(SGX.quote + after)


def test_tells_padding_of_a_tdx_quote_from_other_bytes() -> None:
    assert parse_quote(TDX4.quote + bytes(70)).padding == 70
    quote = parse_quote(TDX4.quote + bytes(3) + b"x\0")
    assert (quote.padding, quote.trailing) == (3, b"x\0")


@pytest.mark.parametrize(
    ("quote", "at", "new"),
    [
        (SGX.quote, 0, b"\x02\0"),
        (SGX.quote, 0, b"\x04\0"),
        (SGX.quote, 0, b"\x06\0"),
        (SGX.quote, 2, b"\x03\0"),
        (SGX.quote, 4, b"\x81\0\0\0"),
        (TDX4.quote, 4, b"\0\0\0\0"),
        (TDX4.quote, 0, b"\x03\0"),
        (SGX.quote, 12, bytes(16)),
        (TDX5.quote, 48, b"\x01\0"),
        (TDX5.quote, 48, b"\x02\0"),
        (TDX5.quote, 48, b"\x04\0"),
        (TDX5.quote, 50, struct.pack("<I", 584)),
        (SGX.quote, 432, struct.pack("<I", 1)),
        (SGX.quote, 432, b"\xff" * 4),
        (TDX4.quote, 632 + 4 + 128, b"\x05\0"),
        (TDX4.quote, 632 + 4 + 130, struct.pack("<I", 900)),
        (SGX.quote, 436 + 128 + 448, b"\xff\xff"),
        (SGX.quote, 436 + 128 + 448 + 2 + 32 + 2, struct.pack("<I", len(CHAIN) - 1)),
    ],
    ids=lambda value: str(value)[:12] if isinstance(value, int) else "",
)
def test_refuses_unknown_kinds_and_lengths_that_do_not_fit(quote: bytes, at: int, new: bytes) -> None:
    parse_quote(quote)
    with pytest.raises(MalformedEvidence):
        parse_quote(changed(quote, at, new))


def test_refuses_what_is_too_long() -> None:
    with pytest.raises(MalformedEvidence, match="too long"):
        parse_quote(TDX4.quote + bytes(65_537 - len(TDX4.quote)))
    assert parse_quote(TDX4.quote + bytes(65_536 - len(TDX4.quote))).padding > 60_000


def test_says_the_type_of_certification_data_that_is_no_chain() -> None:
    assert parse_quote(vendor.sgx(certification_type=1).quote).certification_type == 1


@pytest.mark.parametrize("size", [383, 385, 583, 585, 647, 649])
def test_refuses_reports_of_another_size(size: int) -> None:
    parse = parse_enclave_report if size < 500 else parse_td_report
    with pytest.raises(MalformedEvidence):
        parse(bytes(size))


def test_a_chain_has_one_spelling() -> None:
    chain = parse_pem_chain(CHAIN, what="chain")
    text = CHAIN.removesuffix(b"\0")
    assert parse_pem_chain(text, what="chain") == parse_pem_chain(text.rstrip(), what="chain") == chain
    pieces = [text + b"\n", text + b"\0\0", b" " + text, text.replace(b"\n", b"\r\n"), text.replace(b"\n-", b"\n\n-")]
    pieces += [b"", text[:-2], text * 2, text.replace(b"CERTIFICATE", b"X509"), text + b"x", b"# who\n" + text]
    at = text.index(b"\n-----END") - 1
    pieces.append(text[:at] + b"*" + text[at + 1 :])
    pieces.append(text[:90].replace(b"\n", b"") + text[90:])
    for piece in pieces:
        with pytest.raises(MalformedEvidence):
            parse_pem_chain(piece, what="chain")


def test_a_chain_leaves_no_bit_out_of_account() -> None:
    chain = parse_pem_chain(CHAIN, what="chain")
    for at in range(0, len(CHAIN), 3):
        mutant = changed(CHAIN, at, bytes([CHAIN[at] ^ 1 << at % 8]))
        try:
            assert parse_pem_chain(mutant, what="chain") != chain
        except MalformedEvidence:
            continue


def test_reads_collateral() -> None:
    collateral = parse_collateral(TDX4.collateral)
    tcb_info, identity = parse_tcb_info(collateral.tcb_info), parse_qe_identity(collateral.qe_identity)
    assert (tcb_info.id, identity.id, tcb_info.fmspc, tcb_info.evaluation) == ("TDX", "TD_QE", vendor.FMSPC, 18)
    assert (tcb_info.next_update, identity.issue_date) == (vendor.NOW + 29 * vendor.DAY, vendor.NOW - vendor.DAY)
    assert [identity.id for identity in tcb_info.module_identities] == ["TDX_01"]
    assert (tcb_info.levels[0].tdx[:3], tcb_info.levels[0].pce_svn) == ((5, 0, 5), 11)
    assert len(collateral.tcb_info_issuers()) == len(collateral.qe_identity_issuers()) == 2


def test_blank_lines_between_certificates_of_collateral_are_allowed() -> None:
    text = TDX4.parts["tcb_info_issuer_chain"].replace("-----\n-----", "-----\n\n-----").strip()
    collateral = parse_collateral(TDX4.with_parts(tcb_info_issuer_chain=text).collateral)
    assert collateral.tcb_info_issuers() == parse_collateral(TDX4.collateral).tcb_info_issuers()


@pytest.mark.parametrize(
    "change",
    [
        {"more": "x"},
        {"tcb_info": 1},
        {"pck_crl": "0"},
        {"pck_crl": "zz"},
        {"pck_crl": "aB"},
        {"tcb_info_signature": "00" * 63},
        {"qe_identity_signature": "00" * 65},
    ],
)
def test_refuses_collateral_of_another_shape(change: dict[str, Any]) -> None:
    with pytest.raises(MalformedEvidence):
        parse_collateral(json.dumps({**TDX4.parts, **change}).encode())


@pytest.mark.parametrize("name", TDX4.parts)
def test_refuses_collateral_that_lacks_a_part(name: str) -> None:
    with pytest.raises(MalformedEvidence):
        parse_collateral(json.dumps({key: text for key, text in TDX4.parts.items() if key != name}).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b'{"tcb_info":"","tcb_info":""}', b" " * 1_048_577])
def test_refuses_what_is_no_collateral(data: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        parse_collateral(data)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"version": 4},
        {"id": "TDX2"},
        {"issueDate": "2026-02-30T00:00:00Z"},
        {"issueDate": "2026-02-01"},
        {"nextUpdate": "2026-02-01T00:00:00+00:00"},
        {"fmspc": "00"},
        {"fmspc": "zz" * 6},
        {"pceId": ""},
        {"tcbEvaluationDataNumber": -1},
        {"tcbEvaluationDataNumber": "18"},
        {"tcbLevels": {}},
        {"tcbLevels": [1]},
        {"tcbLevels": [vendor.level()]},
        {"tcbLevels": [vendor.level(tdx=bytes(15))]},
        {"tcbLevels": [{**vendor.level(tdx=bytes(16)), "tcbStatus": ""}]},
        {"tcbLevels": [{**vendor.level(tdx=bytes(16)), "advisoryIDs": "INTEL"}]},
        {"tcbLevels": [vendor.level(tdx=bytes(16))] * 65},
        {"tcbLevels": [{**vendor.level(tdx=bytes(16)), "tcb": {"sgxtcbcomponents": [{"svn": True}] * 16}}]},
        {"tcbLevels": [{**vendor.level(tdx=bytes(16)), "tcb": {"sgxtcbcomponents": [{"svn": 256}] * 16}}]},
        {"tdxModule": None},
        {"tdxModuleIdentities": [{"id": "TDX_01"}]},
    ],
)
def test_refuses_tcb_info_of_another_shape(change: dict[str, Any]) -> None:
    with pytest.raises(MalformedEvidence):
        parse_tcb_info(json.dumps({**json.loads(TDX4.parts["tcb_info"]), **change}))


@pytest.mark.parametrize(
    "change",
    [
        {"version": 1},
        {"id": "QVE"},
        {"miscselect": "0"},
        {"attributes": "00" * 15},
        {"attributesMask": None},
        {"mrsigner": ""},
        {"isvprodid": 65_536},
        {"tcbLevels": [{}]},
        {"tcbLevels": [{**vendor.svn_level(), "tcb": {"isvsvn": -1}}]},
    ],
)
def test_refuses_a_qe_identity_of_another_shape(change: dict[str, Any]) -> None:
    with pytest.raises(MalformedEvidence):
        parse_qe_identity(json.dumps({**json.loads(TDX4.parts["qe_identity"]), **change}))


def test_members_that_intel_may_add_are_left_out_of_account() -> None:
    texts = (TDX4.parts["tcb_info"], TDX4.parts["qe_identity"])
    more = [json.dumps({**json.loads(text), "later": {"x": 1}}) for text in texts]
    assert (parse_tcb_info(more[0]), parse_qe_identity(more[1])) == (
        parse_tcb_info(texts[0]),
        parse_qe_identity(texts[1]),
    )


@given(st.binary(max_size=600))
def test_is_total_over_bytes(data: bytes) -> None:
    text = data.decode("latin-1")
    for parse in (
        lambda: parse_quote(data),
        lambda: parse_collateral(data),
        lambda: parse_tcb_info(text),
        lambda: parse_qe_identity(text),
        lambda: parse_pem_chain(data, what="chain"),
    ):
        with pytest.raises(MalformedEvidence):
            parse()


@given(data=st.data())
def test_is_total_over_mangled_evidence(data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from([*QUOTES.values(), TDX4.collateral, TDX4.parts["tcb_info"].encode(), CHAIN]))
    at = data.draw(st.integers(0, len(whole)))
    mangled = whole[:at] + data.draw(st.binary(max_size=6)) + whole[at + data.draw(st.integers(0, 6)) :]
    text = mangled.decode("utf-8", "surrogateescape")
    for parse in (
        lambda: parse_quote(mangled),
        lambda: parse_collateral(mangled),
        lambda: parse_tcb_info(text),
        lambda: parse_pem_chain(mangled, what="chain"),
    ):
        try:
            parse()
        except MalformedEvidence:
            continue


@pytest.mark.skipif(not VECTORS.is_dir(), reason="real evidence lies beside the repository, and is absent here")
def test_reads_every_real_quote() -> None:
    found = [*VECTORS.glob("sgx/*/*/quote.*"), *VECTORS.glob("tdx/*/*/quote.*"), *VECTORS.glob("*/*/*/td_quote.bin")]
    assert found
    for path in (path for path in found if path.suffix in (".bin", ".dat")):
        quote = parse_quote(path.read_bytes())
        claims = json.loads((path.parent / "case.json").read_text())["claims"]
        assert claims.get("report_data", quote.report.report_data.hex()) == quote.report.report_data.hex()
