import os

import pytest

from cloister.channel.sections import CHUNK, SectionOpener, SectionSealer
from cloister.errors import ChannelBroken, WrongUse
from cloister.evidence.bundle import Section

KEY = bytes(range(32))
SIZES = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 5)


def seal(content: bytes, *, key: bytes = KEY, name: str = "code") -> list[bytes]:
    sealer, chunks, at = SectionSealer(key, name, len(content)), [], 0
    while not sealer.ended:
        length = sealer.next_length
        out = bytearray(length + 16)
        assert sealer.seal_into(memoryview(content)[at : at + length], memoryview(out)) == length + 16
        chunks.append(bytes(out))
        at += length
    return chunks


def open_all(chunks: list[bytes], size: int, *, key: bytes = KEY, name: str = "code") -> bytes:
    opener, found = SectionOpener(key, name, size), b""
    for chunk in chunks:
        out = bytearray(max(len(chunk) - 16, 0))
        opener.open_into(memoryview(chunk), memoryview(out))
        found += out
    assert opener.ended
    return found


@pytest.mark.parametrize("size", SIZES)
def test_what_was_sealed_opens_and_is_as_long_as_foretold(size: int) -> None:
    content = os.urandom(size)
    chunks = seal(content)
    assert sum(map(len, chunks)) == Section("code", "", size).sealed_size
    assert open_all(chunks, size) == content


def test_the_opener_says_how_much_it_wants_next() -> None:
    opener = SectionOpener(KEY, "code", CHUNK + 3)
    chunks = seal(bytes(CHUNK + 3))
    wanted = []
    for chunk in chunks:
        wanted.append(opener.next_sealed)
        opener.open_into(memoryview(chunk), memoryview(bytearray(CHUNK)))
    assert [*wanted, opener.next_sealed] == [CHUNK + 16, 19, 0]


def test_a_section_that_ends_early_or_goes_on_does_not_open() -> None:
    """A shorter one's last chunk is not a longer one's first, nor the other way round."""
    content = os.urandom(2 * CHUNK)
    longer, shorter = seal(content), seal(content[:CHUNK])
    with pytest.raises(ChannelBroken):
        open_all(longer[:1], CHUNK)
    with pytest.raises(ChannelBroken):
        open_all([shorter[0], longer[1]], 2 * CHUNK)
    with pytest.raises(ChannelBroken):
        open_all([*shorter, shorter[0]], CHUNK)


def test_chunks_do_not_open_in_another_order() -> None:
    first, second, third = seal(os.urandom(3 * CHUNK))
    with pytest.raises(ChannelBroken):
        open_all([second, first, third], 3 * CHUNK)


def test_a_chunk_of_another_section_or_another_key_does_not_open() -> None:
    chunks = seal(b"content")
    for other in ({"name": "model"}, {"key": bytes(32)}):
        with pytest.raises(ChannelBroken):
            open_all(chunks, 7, **other)


def test_no_bit_of_a_chunk_may_be_another() -> None:
    (chunk,) = seal(b"content")
    for at in range(len(chunk)):
        changed = chunk[:at] + bytes([chunk[at] ^ 1]) + chunk[at + 1 :]
        with pytest.raises(ChannelBroken):
            open_all([changed], 7)


def test_a_sealer_takes_exactly_what_was_announced() -> None:
    sealer = SectionSealer(KEY, "code", 5)
    with pytest.raises(ChannelBroken):
        sealer.seal_into(memoryview(b"four"), memoryview(bytearray(32)))


def test_a_file_key_has_32_bytes() -> None:
    with pytest.raises(WrongUse):
        SectionSealer(bytes(16), "code", 5)
