import json
from pathlib import Path
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.vendors import aws

from cloister.errors import MalformedEvidence
from cloister.evidence.nitro import launch_extension, launch_pcr, parse_document

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors" / "nitro"
CASES = sorted(VECTORS.glob("*/*/case.json"))

KEY = aws.nitro().keys[-1]
DOCUMENT = aws.document()
PAYLOAD = cbor2.dumps(aws.fields(aws.nitro()))


def without(*names: str) -> bytes:
    kept = {name: value for name, value in aws.fields(aws.nitro()).items() if name not in names}
    return aws.sign(cbor2.dumps(kept), KEY)


def test_reads_every_field() -> None:
    parsed = parse_document(DOCUMENT)
    assert parsed.module_id == "i-0123456789abcdef0-enc0123456789abcdef"
    assert parsed.timestamp == 1_800_000_000_000
    assert parsed.pcrs == aws.pcrs()
    assert (*parsed.cabundle, parsed.certificate) == aws.nitro().ders
    assert (parsed.public_key, parsed.user_data, parsed.nonce) == (None, aws.USER_DATA, aws.NONCE)
    assert (parsed.algorithm, parsed.protected, parsed.payload) == (-35, b"\xa1\x01\x38\x22", PAYLOAD)
    assert parsed.signed == b"\x84\x6aSignature1\x44\xa1\x01\x38\x22\x40" + cbor2.dumps(PAYLOAD)


def test_may_stand_behind_the_tag_of_cose_and_behind_no_other() -> None:
    assert parse_document(b"\xd2" + DOCUMENT) == parse_document(DOCUMENT)
    for tag in (b"\xd1", b"\xd3", b"\xd8\x12", b"\xd2\xd2"):
        with pytest.raises(MalformedEvidence):
            parse_document(tag + DOCUMENT)


def test_the_payloads_map_may_be_streamed() -> None:
    streamed = b"\xbf" + PAYLOAD[1:] + b"\xff"
    parsed = parse_document(aws.sign(streamed, KEY))
    assert (parsed.pcrs, parsed.payload) == (aws.pcrs(), streamed)


@pytest.mark.parametrize("payload", [PAYLOAD + b"\xff", b"\xbf" + PAYLOAD[1:], b"\xbf" + PAYLOAD[1:] + b"\xff\xff"])
def test_a_streamed_map_ends_once(payload: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        parse_document(aws.sign(payload, KEY))


def test_nothing_else_may_be_streamed() -> None:
    pcrs = cbor2.dumps(aws.pcrs())
    inner = PAYLOAD.replace(pcrs, b"\xbf" + pcrs[1:] + b"\xff")
    assert inner != PAYLOAD
    streamed = b"\xbf" + inner[1:] + b"\xff"
    for data in (b"\x9f" + DOCUMENT[1:] + b"\xff", aws.sign(inner, KEY), aws.sign(streamed, KEY)):
        with pytest.raises(MalformedEvidence):
            parse_document(data)


def test_a_streamed_map_repeats_no_key() -> None:
    twice = b"\xbf" + PAYLOAD[1:] + b"\x66digest\x66SHA384\xff"
    with pytest.raises(MalformedEvidence):
        parse_document(aws.sign(twice, KEY))


def test_what_is_optional_may_be_absent() -> None:
    parsed = parse_document(without("public_key", "user_data", "nonce"))
    assert (parsed.public_key, parsed.user_data, parsed.nonce) == (None, None, None)


@pytest.mark.parametrize("name", ["module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle"])
def test_what_is_not_optional_may_not(name: str) -> None:
    with pytest.raises(MalformedEvidence):
        parse_document(without(name))


@pytest.mark.parametrize(
    "changes",
    [
        {"module_id": ""},
        {"module_id": "i-\x1b[0m"},
        {"module_id": "i" * 129},
        {"module_id": b"i-0"},
        {"digest": "SHA256"},
        {"digest": None},
        {"timestamp": 0},
        {"timestamp": -1},
        {"timestamp": 2**53},
        {"timestamp": "1"},
        {"pcrs": {}},
        {"pcrs": []},
        {"pcrs": {at: bytes(48) for at in range(33)}},
        {"pcrs": {32: bytes(48)}},
        {"pcrs": {-1: bytes(48)}},
        {"pcrs": {"0": bytes(48)}},
        {"pcrs": {0: bytes(47)}},
        {"pcrs": {0: "x" * 48}},
        {"pcrs": {0: None}},
        {"certificate": b""},
        {"certificate": bytes(1025)},
        {"certificate": None},
        {"cabundle": []},
        {"cabundle": [b""]},
        {"cabundle": [bytes(1025)]},
        {"cabundle": [b"x"] * 9},
        {"cabundle": b"x"},
        {"cabundle": {}},
        {"public_key": b""},
        {"public_key": bytes(1025)},
        {"public_key": "x"},
        {"user_data": bytes(513)},
        {"user_data": 1},
        {"nonce": bytes(513)},
        {"nonce": []},
        {"more": None},
    ],
    ids=str,
)
def test_refuses_fields_out_of_awss_bounds(changes: dict[str, Any]) -> None:
    with pytest.raises(MalformedEvidence):
        parse_document(aws.document(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"user_data": b""},
        {"user_data": bytes(512)},
        {"nonce": bytes(512)},
        {"public_key": bytes(1024)},
        {"pcrs": {at: bytes(48) for at in range(32)}},
        {"pcrs": {0: bytes(32), 1: bytes(64)}},
        {"certificate": bytes(1024), "cabundle": [bytes(1024)] * 8},
    ],
    ids=["empty", "user_data", "nonce", "public_key", "32 PCRs", "other digests", "certificates"],
)
def test_takes_fields_at_awss_bounds(changes: dict[str, Any]) -> None:
    parsed = parse_document(aws.document(**changes))
    assert all(getattr(parsed, name) == (tuple(v) if isinstance(v, list) else v) for name, v in changes.items())


@pytest.mark.parametrize(
    "protected",
    [
        bytes.fromhex(header)
        for header in [
            "a0",
            "a101f6",
            "a10140",
            "a1043822",
            "a20138220401",
            "3822",
            "a101390022",
            "a101382200",
            "bf013822ff",
            "a118013822",
        ]
    ],
    ids=bytes.hex,
)
def test_the_protected_header_holds_one_algorithm(protected: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        parse_document(aws.sign(PAYLOAD, KEY, protected=protected))


@pytest.mark.parametrize(
    ("protected", "algorithm"), [(b"\xa1\x01\x26", -7), (b"\xa1\x01\x00", 0), (b"\xa1\x01\x18\xff", 255)]
)
def test_another_algorithm_is_the_verifiers_to_refuse(protected: bytes, algorithm: int) -> None:
    assert parse_document(aws.sign(PAYLOAD, KEY, protected=protected)).algorithm == algorithm


@pytest.mark.parametrize("unprotected", [{4: b"key"}, [], b"", 0])
def test_there_are_no_unprotected_headers(unprotected: object) -> None:
    with pytest.raises(MalformedEvidence):
        parse_document(aws.sign(PAYLOAD, KEY, unprotected=unprotected))


@pytest.mark.parametrize(
    "outer",
    [[], [b"", {}, b""], [b"\xa1\x01\x38\x22", {}, PAYLOAD, bytes(96), 0], {}, 1, None, b"x"]
    + [[b"\xa1\x01\x38\x22", {}, PAYLOAD, bytes(size)] for size in (0, 95, 97)]
    + [[b"\xa1\x01\x38\x22", {}, None, bytes(96)], [b"\xa1\x01\x38\x22", {}, b"", bytes(96)]],
)
def test_refuses_messages_of_another_shape(outer: object) -> None:
    with pytest.raises(MalformedEvidence):
        parse_document(cbor2.dumps(outer))


@pytest.mark.parametrize(
    "data",
    [
        DOCUMENT + b"\0",
        b"\x98\x04" + DOCUMENT[1:],
        DOCUMENT.replace(b"\x44\xa1\x01\x38\x22", b"\x58\x04\xa1\x01\x38\x22"),
        b"\x81" * 1000,
        b"\xbf" * 1000,
        b"\x9b\x7f" + b"\xff" * 7,
        b"\x5b\x7f" + b"\xff" * 7,
        b"\xbb\x7f" + b"\xff" * 7,
        b"\xfb" + bytes(8),
        b"\x1c",
        bytes(65_537),
    ],
    ids=[
        "trailing",
        "long array",
        "long string",
        "deep",
        "deep map",
        "list",
        "string",
        "map",
        "float",
        "reserved",
        "size",
    ],
)
def test_refuses_cbor_that_is_not_strict(data: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        parse_document(data)


@pytest.mark.parametrize(
    "payload",
    [
        b"\xb8\x09" + PAYLOAD[1:],
        PAYLOAD.replace(b"\x66SHA384", b"\x78\x06SHA384"),
        PAYLOAD.replace(b"\x66SHA384", b"\x66SHA38\xff"),
        PAYLOAD.replace(b"\x01\x58\x30" + b"\x02" * 48, b"\x00\x58\x30" + b"\x02" * 48),
        PAYLOAD.replace(b"\x01\x58\x30", b"\x18\x01\x58\x30", 1),
        PAYLOAD.replace(b"\x66digest", b"\xc0\x66digest"),
    ],
    ids=["long map", "long text", "not UTF-8", "repeated PCR", "long key", "tag"],
)
def test_refuses_payloads_that_are_not_strict(payload: bytes) -> None:
    assert payload != PAYLOAD
    with pytest.raises(MalformedEvidence):
        parse_document(aws.sign(payload, KEY))


def test_refuses_truncation_everywhere() -> None:
    for length in range(len(DOCUMENT)):
        with pytest.raises(MalformedEvidence):
            parse_document(DOCUMENT[:length])


@given(st.binary(max_size=200))
def test_is_total_over_bytes(data: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        parse_document(data)


@given(data=st.data())
def test_is_total_over_mangled_documents(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(DOCUMENT)))
    mangled = DOCUMENT[:at] + data.draw(st.binary(max_size=6)) + DOCUMENT[at + data.draw(st.integers(0, 6)) :]
    try:
        parse_document(mangled)
    except MalformedEvidence:
        return


def test_the_launch_register_is_one_extension_from_zero() -> None:
    assert len(launch_extension(b"x")) == len(launch_pcr(b"x")) == 48
    assert len({launch_pcr(b""), launch_pcr(b"x"), launch_extension(b""), launch_extension(b"x")}) == 4


@pytest.mark.skipif(not CASES, reason="real vectors lie beside the repository, in ../shared/vectors")
@pytest.mark.parametrize("case", CASES, ids=lambda path: path.parent.name)
def test_real_documents_are_read_as_their_case_claims(case: Path) -> None:
    claims = json.loads(case.read_text())["claims"]
    parsed = parse_document((case.parent / "document.cbor").read_bytes())
    if claims:
        assert parsed.module_id == claims["module_id"]
        assert {str(at): pcr.hex() for at, pcr in parsed.pcrs.items() if any(pcr)} == claims["pcrs"]
        for name in ("nonce", "user_data", "public_key"):
            value = getattr(parsed, name)
            assert (None if value is None else value.hex()) == claims[name]
