import pytest

from cloister.errors import MalformedEvidence
from cloister.evidence.strict_cbor import load_map


def load(data: bytes) -> dict[str, object]:
    return load_map(data, keys=frozenset({"a"}), max_bytes=100, what="x")


def test_reads_a_map_of_exactly_these_keys() -> None:
    assert load(b"\xa1\x61a\x41z") == {"a": b"z"}


@pytest.mark.parametrize(
    "data",
    [
        b"\xa1\x61a\xc1\x00",  # a tag: seconds since 1970
        b"\xa1\x61a\xd8\x1c\x81\xd8\x1d\x00",  # a list that holds itself
        b"\xa1\x61a\xc2\x49\x01" + bytes(8),  # 2**64, by a tag
        b"\xa1\x61a\xd8\x25\x50" + bytes(16),  # a UUID, by a tag
        b"\xa1\x61a\xd9\xd9\xf7\x00",  # the tag that says nothing
        b"\xa1\x61a\x18\x01",  # not the shortest form
        b"\xbf\x61a\x01\xff",  # indefinite length
        b"\xa2\x61a\x01\x61a\x01",
        b"\xa2\x61a\x01\x61b\x01",
        b"\xa1\x61b\x01",
        b"\xa0",
        b"\xa1\x61a\x01\x00",
        b"\xa1\x61a" + b"\x81" * 20 + b"\x00",
        b"\xa1\x61a\x58\x60" + bytes(96),  # over the limit
        b"\xa1\x61a\x5b" + b"\xff" * 8,
    ],
)
def test_refuses_anything_else(data: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        load(data)
