import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.deploy.efi import HEADERS, program

from cloister.deploy.pe import Program, parse_program
from cloister.errors import MalformedImage

SECTIONS = [(".text", b"code" * 300), (".data", b"data" * 10)]
PLAIN = program(SECTIONS)
CHECKSUM_AT = 64 + 24 + 64
CERTIFICATES_AT = 64 + 24 + 112 + 32


def without(data: bytes, *parts: tuple[int, int]) -> bytes:
    kept, at = b"", 0
    for start, end in parts:
        kept, at = kept + data[at:start], end
    return kept + data[at:]


def test_reads_sections() -> None:
    parsed = parse_program(PLAIN)
    assert [(section.name, section.size, section.raw_size) for section in parsed.sections] == [
        (".text", 1200, 1536),
        (".data", 40, 512),
    ]
    assert parsed.content(".data") == b"data" * 10
    assert parsed.has(".text")
    assert not parsed.has(".nothing")


@pytest.mark.parametrize("algorithm", ["sha256", "sha384"])
def test_authenticode_is_all_but_the_checksum_and_the_signature_and_its_place(algorithm: str) -> None:
    signed = program(SECTIONS, certificates=b"signature" * 8, checksum=77)
    counted = without(signed[: -9 * 8], (CHECKSUM_AT, CHECKSUM_AT + 4), (CERTIFICATES_AT, CERTIFICATES_AT + 8))
    assert parse_program(signed).authenticode(algorithm) == hashlib.new(algorithm, counted).digest()
    assert parse_program(PLAIN).authenticode(algorithm) == hashlib.new(algorithm, counted).digest()


def test_authenticode_takes_sections_in_their_order_in_the_file() -> None:
    data = program(SECTIONS, backwards=True, tail=b"more behind")
    counted = without(data, (CHECKSUM_AT, CHECKSUM_AT + 4), (CERTIFICATES_AT, CERTIFICATES_AT + 8))
    assert parse_program(data).authenticode("sha256") == hashlib.sha256(counted).digest()


def test_a_program_of_the_older_kind() -> None:
    data = program(SECTIONS, wide=False, certificates=b"x" * 8)
    at = CERTIFICATES_AT - 16
    counted = without(data[:-8], (CHECKSUM_AT, CHECKSUM_AT + 4), (at, at + 8))
    assert parse_program(data).authenticode("sha256") == hashlib.sha256(counted).digest()


def test_a_program_without_a_place_for_signatures() -> None:
    data = program(SECTIONS, directories=4)
    counted = without(data, (CHECKSUM_AT, CHECKSUM_AT + 4))
    assert parse_program(data).authenticode("sha256") == hashlib.sha256(counted).digest()


def test_every_byte_that_a_loader_reads_counts() -> None:
    honest = parse_program(PLAIN).authenticode("sha256")
    quiet = []
    for at in range(len(PLAIN)):
        try:
            if parse_program(PLAIN[:at] + bytes([PLAIN[at] ^ 1]) + PLAIN[at + 1 :]).authenticode("sha256") == honest:
                quiet.append(at)
        except MalformedImage:
            continue
    assert set(quiet) <= {*range(CHECKSUM_AT, CHECKSUM_AT + 4), *range(CERTIFICATES_AT, CERTIFICATES_AT + 8)}


def patched(at: int, layout: str, *values: object, data: bytes = PLAIN) -> bytes:
    changed = bytearray(data)
    struct.pack_into(layout, changed, at, *values)
    return bytes(changed)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"ELF" + PLAIN[3:], "begin"),
        (patched(64, "<4s", b"NE\0\0"), "PE header"),
        (patched(0x3C, "<I", 2**32 - 1), "cut short"),
        (patched(64 + 24, "<H", 0x107), "unknown kind"),
        (patched(64 + 6, "<H", 97), "96 sections"),
        (patched(64 + 24 + 60, "<I", len(PLAIN) + 1), "headers are cut"),
        (patched(64 + 24 + 60, "<I", 16), "headers are cut"),
        (patched(64 + 20, "<H", 116), "directories are cut"),
        (patched(CERTIFICATES_AT, "<II", HEADERS, 8), "not at its end"),
        (patched(CERTIFICATES_AT, "<II", 0, 2**32 - 1), "not at its end"),
        (patched(64 + 24 + 240 + 20, "<I", len(PLAIN)), "cut short"),
        (patched(64 + 24 + 240 + 16, "<I", len(PLAIN) - HEADERS), "overlap"),
        (PLAIN[:-1], "cut short"),
        (PLAIN[:70], "cut short"),
        (b"", "begin"),
    ],
)
def test_refuses_what_leaves_open_what_a_loader_reads(data: bytes, words: str) -> None:
    with pytest.raises(MalformedImage, match=words):
        parse_program(data)


def test_a_section_has_to_be_there_once_and_whole() -> None:
    parsed = parse_program(program([(".two", b"a"), (".two", b"b"), (".none", b"")]))
    for name in (".two", ".none", ".absent"):
        with pytest.raises(MalformedImage):
            parsed.content(name)
    size_at = 64 + 24 + 240 + 8
    with pytest.raises(MalformedImage, match="larger"):
        parse_program(patched(size_at, "<I", 1 << 31)).content(".text")


def total(data: bytes) -> None:
    try:
        parsed: Program = parse_program(data)
        parsed.authenticode("sha256")
        parsed.content(".text")
    except MalformedImage:
        return


@given(st.binary(max_size=300))
def test_is_total_over_bytes(data: bytes) -> None:
    total(b"MZ" + data)


@given(at=st.integers(0, HEADERS), junk=st.binary(max_size=8))
def test_is_total_over_mangled_headers(at: int, junk: bytes) -> None:
    total(PLAIN[:at] + junk + PLAIN[at + len(junk) :])
