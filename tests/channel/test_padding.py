import pytest

from cloister.channel.padding import EVENT_MULTIPLE, event_padding, padded_length


@pytest.mark.parametrize(
    ("length", "padded"),
    [(0, 1024), (1, 1024), (1024, 1024), (1025, 2048), (2048, 2048), (2049, 4096), (1 << 25, 1 << 25)],
)
def test_whole_messages_grow_to_powers_of_two(length: int, padded: int) -> None:
    assert padded_length(length) == padded


def test_events_grow_to_multiples_of_512_by_one_comment_block() -> None:
    for length in range(1030):
        comment = event_padding(length)
        assert (length + len(comment)) % EVENT_MULTIPLE == 0
        assert len(comment) < EVENT_MULTIPLE + 3
        assert comment == b"" or (comment.startswith(b":") and comment.endswith(b"\n\n") and comment.count(b"\n") == 2)
