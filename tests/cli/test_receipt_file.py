"""What is heard of an answer beside who reads it, and kept."""

from collections.abc import Iterator

import httpx2
import pytest

from cloister.cli.receipt_file import Kept, _Overheard, parse_kept
from cloister.cli.verify import Saved
from cloister.errors import MalformedEvidence, TruncatedResponse

EVENT, END, RECEIPT = b"data: {}\n\n", b"data: [DONE]\n\n", b": cloister-receipt a b\n\n"


class Stream(httpx2.SyncByteStream):
    def __init__(self, *parts: bytes | Exception) -> None:
        self._parts = parts
        self.taken = 0
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        for part in self._parts:
            if isinstance(part, Exception):
                raise part
            self.taken += 1
            yield part

    def close(self) -> None:
        self.closed = True


def heard(stream: Stream, *, until: bytes) -> list[bytes]:
    """What was kept of a stream whose reader stopped after this part."""
    kept: list[bytes] = []
    over = _Overheard(stream, kept.append)
    for part in over:
        if part == until:
            break
    over.close()
    assert stream.closed
    return kept


def test_what_stands_behind_the_last_event_is_heard_too() -> None:
    assert heard(Stream(EVENT, END, RECEIPT, b": padding\n\n"), until=END) == [EVENT + END + RECEIPT + b": padding\n\n"]


def test_an_end_in_two_parts_is_one() -> None:
    assert heard(Stream(EVENT, END[:5], END[5:], RECEIPT), until=END[5:]) == [EVENT + END + RECEIPT]


def test_of_an_answer_that_was_stopped_no_more_is_asked_for() -> None:
    stream = Stream(EVENT, EVENT, END, RECEIPT)
    assert heard(stream, until=EVENT) == []
    assert stream.taken == 1


def test_what_an_answer_says_of_its_end_is_none() -> None:
    said = b'data: {"content": "\\ndata: [DONE]\\n"}\n\n'
    stream = Stream(said, EVENT, END, RECEIPT)
    assert heard(stream, until=said) == []
    assert stream.taken == 1


def test_an_answer_that_was_cut_behind_its_last_event_is_not_kept() -> None:
    assert heard(Stream(EVENT, END, TruncatedResponse("cut")), until=END) == []
    assert heard(Stream(EVENT, END, *[b":" * 1024] * 100), until=END) == []


KEPT = Kept(b"request", b"answer", Saved(b"document", bytes(32), 7.5))


def test_what_is_kept_is_read_back() -> None:
    assert parse_kept(KEPT.encode()) == KEPT


@pytest.mark.parametrize("content", [b"", b"data: {}\n\n", b'{"choices": []}', b"[1]", b"[" * 100_000, b"\xff"])
def test_a_bare_answer_is_no_such_file(content: bytes) -> None:
    assert parse_kept(content) is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"cloister_receipt": 1', b'"cloister_receipt": 2'),
        (b'"request": "', b'"request": "%'),
        (b'"document": {', b'"document": [], "x": {'),
        (b'"nonce": "00', b'"nonce": "zz'),
        (b'"at": 7.5', b'"at": 1e300'),
    ],
)
def test_a_damaged_one_is_malformed(old: bytes, new: bytes) -> None:
    content = KEPT.encode()
    assert old in content
    with pytest.raises(MalformedEvidence):
        parse_kept(content.replace(old, new))
