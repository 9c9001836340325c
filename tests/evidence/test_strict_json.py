import pytest

from cloister.errors import MalformedEvidence
from cloister.evidence.strict_json import Fields, from_b64url, load_object


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":1.0}',
        b'{"a":1e2}',
        b'{"a":NaN}',
        b'{"a":{"b":1,"b":1}}',
        b"[]",
        b"{} {}",
        b'{"a":"\xff"}',
        b"\xef\xbb\xbf{}",
    ],
)
def test_refuses_what_can_be_read_in_two_ways(data: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        load_object(data, max_bytes=100, what="x")


def test_the_limit_is_one_of_bytes() -> None:
    assert load_object(b'{"a":1}', max_bytes=7, what="x") == {"a": 1}
    with pytest.raises(MalformedEvidence, match="too long"):
        load_object(b'{"a":1}', max_bytes=6, what="x")


@pytest.mark.parametrize("text", ["", "x" * 257, "a\x1bb", "a\nb", "a\x9bb", "a\x7f", "\ud800", 1, None])
def test_text_has_no_controls(text: object) -> None:
    with pytest.raises(MalformedEvidence, match=r"x\.name is not text"):
        Fields({"name": text}, what="x").text("name")


def test_a_member_that_nobody_asked_for_is_refused() -> None:
    fields = Fields({"a": "1", "b": "2"}, what="x")
    assert fields.text("a") == "1"
    with pytest.raises(MalformedEvidence, match="unknown key"):
        fields.end()


@pytest.mark.parametrize("text", ["AA==", "AB", "A", "A\nA", "+/", "AA "])
def test_base64url_has_one_spelling(text: str) -> None:
    assert from_b64url("AA", what="x") == b"\0"
    with pytest.raises(MalformedEvidence):
        from_b64url(text, what="x")
