import pytest

from cloister.channel.padding import pad_event, padded_event_length, padded_length
from cloister.errors import WrongUse


@pytest.mark.parametrize(
    ("length", "padded"),
    [(0, 1024), (1, 1024), (1024, 1024), (1025, 2048), (2048, 2048), (2049, 4096), (1 << 25, 1 << 25)],
)
def test_whole_messages_grow_to_powers_of_two(length: int, padded: int) -> None:
    assert padded_length(length) == padded


@pytest.mark.parametrize("length", range(8, 8 + 1030))
def test_events_grow_to_multiples_of_512_by_a_comment(length: int) -> None:
    event = b"data: " + b"x" * (length - 8) + b"\n\n"
    padded = pad_event(event)
    assert len(padded) == padded_event_length(length)
    assert len(padded) % 512 == 0
    assert len(padded) - length <= 513
    comment = padded[:-length]
    assert padded.endswith(event)
    assert not comment or (comment.startswith(b":") and comment.endswith(b"\n") and comment.count(b"\n") == 1)


@pytest.mark.parametrize("part", [b"", b"data: x", b"data: x\n", b"\n"])
def test_refuses_to_pad_inside_an_event(part: bytes) -> None:
    with pytest.raises(WrongUse):
        pad_event(part)
