import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import MalformedEvidence
from cloister.evidence.document import Document, Item, gpu_labels, parse_document

ITEMS = {
    "statement": Item("application/json", b"{}"),
    "cpu": Item("application/octet-stream", bytes(range(256)), 4),
    "gpu-10": Item("application/cbor", b"\xa0"),
    "gpu-2": Item("application/cbor", b"\xa0"),
}


def document(**records: object) -> bytes:
    return json.dumps(records).encode()


def test_encodes_as_a_cmw_collection() -> None:
    encoded = Document({"cpu": Item("application/cose", b"\xff\xfe", 4), "launch": Item("a/b", b"")}).encode()
    assert json.loads(encoded) == {"cpu": ["application/cose", "__4", 4], "launch": ["a/b", ""]}


def test_round_trips_in_order() -> None:
    parsed = parse_document(Document(ITEMS).encode())
    assert parsed == Document(ITEMS)
    assert list(parsed.items) == list(ITEMS)


def test_gpus_are_ordered_by_number() -> None:
    assert gpu_labels(Document(ITEMS)) == ("gpu-2", "gpu-10")


def test_items_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        Document(ITEMS).items["cpu"] = ITEMS["cpu"]  # type: ignore[index]


@pytest.mark.parametrize(
    "label", ["", "CPU", "gpu-", "gpu-01", "gpu-100", "gpu-x", "__cmwc_t", "cpu ", "cpu\n", "secret", "\ud800"]
)
def test_refuses_unknown_labels(label: str) -> None:
    with pytest.raises(MalformedEvidence):
        parse_document(json.dumps({label: ["a/b", ""]}).encode())


@pytest.mark.parametrize(
    "record",
    [
        [],
        ["a/b"],
        ["a/b", "", 1, 1],
        ["a/b", None],
        ["a/b", 1],
        [1, ""],
        ["a", ""],
        ["A/B", ""],
        ["a/b;c=d", ""],
        ["a/b\n", ""],
        ["a/b", "", "1"],
        ["a/b", "", True],
        ["a/b", "", 0],
        ["a/b", "", 16],
        ["a/b", "", -1],
        ["a/b", "", None],
        ["a/b", "", 1.0],
        ["a/b", "AA=="],
        ["a/b", "AB"],
        ["a/b", "A"],
        ["a/b", "A+"],
        ["a/b", "A A"],
        ["a/b", "é"],
        {"type": "a/b"},
        "a/b",
        None,
    ],
)
def test_refuses_records_that_are_not_cmw(record: object) -> None:
    with pytest.raises(MalformedEvidence):
        parse_document(document(cpu=record))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"{}x",
        b'\xef\xbb\xbf{"cpu":["a/b",""]}',
        '{"cpu":["a/b",""]}'.encode("utf-16"),
        b'{"cpu":["a/b",""],"cpu":["a/b",""]}',
        b'{"cpu":["a/b","\xff"]}',
        b'{"cpu":' + b"[" * 100_000,
        b'{"cpu":["a/b","",' + b"9" * 5000 + b"]}",
        b'{"cpu":["a/b","",NaN]}',
    ],
)
def test_refuses_what_is_not_strict_json(data: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        parse_document(data)


@pytest.mark.parametrize(
    ("label", "limit"), [("cpu", 65_536), ("statement", 65_536), ("eventlog", 1_048_576), ("endorsements", 1_048_576)]
)
def test_items_are_capped(label: str, limit: int) -> None:
    data = Document({label: Item("a/b", bytes(limit))}).encode()
    assert len(parse_document(data).items[label].content) == limit
    with pytest.raises(MalformedEvidence, match="too long"):
        Document({label: Item("a/b", bytes(limit + 1))})


def test_documents_are_capped() -> None:
    large = {label: Item("a/b", bytes(1_048_576)) for label in ("eventlog", "endorsements", "provenance")}
    with pytest.raises(MalformedEvidence, match="4 MiB"):
        Document(large).encode()
    with pytest.raises(MalformedEvidence, match="too long"):
        parse_document(b" " * (4 * 1_048_576 + 1))


def test_refuses_truncation_everywhere() -> None:
    data = Document(ITEMS).encode()
    for length in range(len(data)):
        with pytest.raises(MalformedEvidence):
            parse_document(data[:length])


@given(st.binary(max_size=200))
def test_is_total_over_bytes(data: bytes) -> None:
    try:
        parse_document(data)
    except MalformedEvidence:
        return


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(["cpu", "launch", "gpu-0", "other"]), JSON))
def test_is_total_over_json(value: object) -> None:
    try:
        parse_document(json.dumps(value).encode())
    except MalformedEvidence:
        return
