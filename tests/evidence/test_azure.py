import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st
from tests.vendors.azure import USER_DATA, hcl, jwk, runtime

from cloister.errors import CloisterError, MalformedEvidence
from cloister.evidence.azure import SNP, TDX, parse_hcl, parse_runtime

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors" / "azure-vtpm" / "trustee"

KEY = rsa.generate_private_key(65537, 2048).public_key()
SHORT = rsa.generate_private_key(65537, 1024).public_key()
RUNTIME = runtime(KEY)
HARDWARE = bytes(range(256)) * 4 + bytes(160)
HCL = hcl(HARDWARE, RUNTIME)


@pytest.mark.parametrize(("kind", "version"), [(SNP, 1), (TDX, 2)])
def test_takes_the_report_apart(kind: int, version: int) -> None:
    parsed = parse_hcl(hcl(HARDWARE, RUNTIME, kind=kind, version=version))
    assert (parsed.kind, parsed.hardware, parsed.runtime) == (kind, HARDWARE, RUNTIME)


def test_the_report_needs_no_padding() -> None:
    assert parse_hcl(hcl(HARDWARE, RUNTIME, size=0)) == parse_hcl(HCL)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HCLB" + HCL[4:],
        hcl(HARDWARE, RUNTIME, version=3),
        hcl(HARDWARE, RUNTIME, kind=3),
        hcl(HARDWARE, RUNTIME, hash_id=2),
        HCL[:8] + b"\0" + HCL[9:],
        HCL[:16] + b"\1" + HCL[17:],
        HCL[:20] + b"\1" + HCL[21:],
        HCL[:31] + b"\1" + HCL[32:],
        HCL[:1216] + b"\0" + HCL[1217:],
        HCL[:1220] + b"\2" + HCL[1221:],
        HCL[:1235] + b"\1" + HCL[1236:],
        HCL[:-1] + b"\1",
        HCL[: 32 + 1184 + 20 + len(RUNTIME) - 1],
        HCL + bytes(65536),
    ],
    ids=[
        "empty",
        "magic",
        "version",
        "kind",
        "hash",
        "length",
        "status",
        "reserved",
        "reserved at the end",
        "runtime length",
        "runtime version",
        "runtime size",
        "after the end",
        "cut",
        "too long",
    ],
)
def test_refuses_reports_of_another_shape(data: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        parse_hcl(data)


def test_reads_the_runtime_data() -> None:
    parsed = parse_runtime(RUNTIME)
    assert parsed.ak == KEY
    assert parsed.user_data == USER_DATA
    assert parsed.configuration["secure-boot"] == "true"
    assert parsed.configuration["vmUniqueId"] == "A-1"


def test_members_that_nobody_knows_are_passed_over() -> None:
    parsed = parse_runtime(runtime(KEY, more=[1], **{"vm-configuration": {"new\x1b": {"a": None}, "n": 7}}))
    assert parsed.configuration == {"new\\x1b": "{'a': None}", "n": "7"}


@pytest.mark.parametrize(
    "changes",
    [
        {"keys": []},
        {"keys": {}},
        {"keys": [jwk(KEY)] * 2},
        {"keys": [jwk(KEY, "other")]},
        {"keys": [jwk(KEY)] + [jwk(KEY, "other")] * 8},
        {"keys": ["HCLAkPub"]},
        {"keys": [{**jwk(KEY), "kty": "EC"}]},
        {"keys": [{**jwk(KEY), "n": "!"}]},
        {"keys": [{**jwk(KEY), "n": 5}]},
        {"keys": [{**jwk(KEY), "e": "Aw"}]},
        {"keys": [{**jwk(KEY), "n": "_" * 341 + "8"}]} | {"keys": [{**jwk(KEY), "n": "AQ"}]},
        {"keys": [jwk(SHORT)]},
        {"user-data": None},
        {"user-data": "00" * 63},
        {"user-data": "0g" * 64},
        {"user-data": " 0" * 64},
        {"vm-configuration": []},
    ],
)
def test_refuses_runtime_data_of_another_shape(changes: dict[str, object]) -> None:
    with pytest.raises(MalformedEvidence):
        parse_runtime(runtime(KEY, **changes))


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", RUNTIME + b"\0", RUNTIME + b"{}", RUNTIME[:-1], b'{"keys":1.5}'])
def test_refuses_json_that_is_not_one_strict_object(data: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        parse_runtime(data)


def test_refuses_truncation_everywhere() -> None:
    for length in range(0, 32 + 1184 + 20 + len(RUNTIME), 7):
        with pytest.raises(MalformedEvidence):
            parse_hcl(HCL[:length])
    for length in range(len(RUNTIME)):
        with pytest.raises(MalformedEvidence):
            parse_runtime(RUNTIME[:length])


@given(st.binary(max_size=100))
def test_is_total_over_bytes(data: bytes) -> None:
    for parse in (parse_hcl, parse_runtime):
        with pytest.raises(MalformedEvidence):
            parse(data)


@given(data=st.data())
def test_is_total_over_mangled_evidence(data: st.DataObject) -> None:
    parse, whole = data.draw(st.sampled_from([(parse_hcl, HCL), (parse_runtime, RUNTIME)]))
    at = data.draw(st.integers(0, len(whole)))
    mangled = whole[:at] + data.draw(st.binary(max_size=6)) + whole[at + data.draw(st.integers(0, 6)) :]
    try:
        parse(mangled)
    except CloisterError:
        return


@pytest.mark.skipif(not VECTORS.is_dir(), reason="the real vectors are not beside this tree")
@pytest.mark.parametrize("name", ["az-snp-vtpm_evidence_v0", "az-snp-vtpm_evidence_v2", "az-tdx-vtpm_evidence_v1"])
def test_reads_real_reports(name: str) -> None:
    folder = VECTORS / name
    claims = json.loads((folder / "case.json").read_text())["claims"]
    parsed = parse_hcl((folder / "hcl_report.bin").read_bytes())
    assert parsed.kind == (TDX if "tdx" in name else SNP)
    assert parsed.runtime == (folder / "runtime_data.json").read_bytes()
    assert parse_runtime(parsed.runtime).user_data.hex() == claims["user_data"].lower()
