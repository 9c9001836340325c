"""EFI programs (PE/COFF files), as far as their measurement needs them: sections, and the Authenticode digest.

Sources: Microsoft, "PE Format" and "Windows Authenticode Portable Executable Signature Format"; what the firmware of EDK
II measures of a program (TCG, "PC Client Platform Firmware Profile", section 3.3.4) is that digest.
"""

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from cloister.errors import MalformedImage

__all__ = ["MAX_PROGRAM", "Program", "Section", "parse_program"]

MAX_PROGRAM = 1 << 30
"""Bytes. A whole system in one file has a few hundred million."""

_MOST_SECTIONS = 96
_SECTION_SIZE = 40
_DIRECTORIES_AT = {0x10B: 96, 0x20B: 112}
"""Optional header's magic (PE32, PE32+) -> where in it the data directories begin."""

_CERTIFICATES = 4


@dataclass(frozen=True, slots=True)
class Section:
    """`size`: its bytes once it is loaded. In the file it has `raw_size` bytes from `at` on."""

    name: str
    size: int
    at: int
    raw_size: int


@dataclass(frozen=True, slots=True)
class Program:
    """`headers`: the parts [from, to) of the file's headers that count; `certificates`: bytes of signatures at its end."""

    data: bytes
    sections: tuple[Section, ...]
    headers: tuple[tuple[int, int], ...]
    certificates: int

    def has(self, name: str) -> bool:
        return any(section.name == name for section in self.sections)

    def content(self, name: str) -> bytes:
        """A section as it lies in memory. Raises: MalformedImage unless there is exactly one, whole in the file."""
        found = [section for section in self.sections if section.name == name]
        if len(found) != 1:
            _refuse(f"It has {len(found)} sections {name}.", expected="one")
        (section,) = found
        if not 0 < section.size <= section.raw_size:
            _refuse(f"Its section {name} is empty, or larger than what the file has of it.", got=str(section.size))
        return self.data[section.at : section.at + section.size]

    def authenticode(self, algorithm: str) -> bytes:
        """The digest that a signature is over, and that the firmware measures. `algorithm`: hashlib's name."""
        digest, view = hashlib.new(algorithm), memoryview(self.data)
        for start, end in self._hashed():
            digest.update(view[start:end])
        return digest.digest()

    def _hashed(self) -> Iterator[tuple[int, int]]:
        """Headers but for the checksum and the place of the signatures, sections in their order in the file, the rest."""
        yield from self.headers
        end = self.headers[-1][1]
        for section in sorted(self.sections, key=lambda section: section.at):
            yield section.at, section.at + section.raw_size
            end += section.raw_size
        yield end, len(self.data) - self.certificates


def parse_program(data: bytes) -> Program:
    """Total over bytes and bounded; what would leave open what a loader reads is refused.

    Raises: MalformedImage for more than 1 GiB or 96 sections; for parts that lie outside of the file; for signatures that
    are not at its end.
    """
    if len(data) > MAX_PROGRAM:
        _refuse("It is over 1 GiB.", got=str(len(data)))
    if data[:2] != b"MZ":
        _refuse("It does not begin as an EFI program does.", expected="MZ")
    (at,) = _numbers("<I", data, 0x3C)
    count, optional_size = _numbers("<6xH12xH", data, at)
    if data[at : at + 4] != b"PE\0\0":
        _refuse("It has no PE header.")
    optional = at + 24
    (magic,) = _numbers("<H", data, optional)
    if magic not in _DIRECTORIES_AT:
        _refuse("Its optional header is of an unknown kind.", got=f"{magic:04x}")
    headers, certificates = _headers(data, optional, _DIRECTORIES_AT[magic], optional_size)
    sections = _sections(data, optional + optional_size, count)
    if headers[-1][1] + sum(section.raw_size for section in sections) > len(data) - certificates:
        _refuse("Its sections overlap, or are cut short.")
    return Program(data, sections, headers, certificates)


def _headers(data: bytes, optional: int, directories_at: int, size: int) -> tuple[tuple[tuple[int, int], ...], int]:
    """What counts of the headers, and how many bytes of signatures stand at the file's end."""
    (end,) = _numbers("<I", data, optional + 60)
    (count,) = _numbers("<I", data, optional + directories_at - 4)
    entry = optional + directories_at + 8 * _CERTIFICATES
    if not optional + size <= end <= len(data) or directories_at > size:
        _refuse("Its headers are cut short.")
    before, after = (0, optional + 64), optional + 68
    if count <= _CERTIFICATES:
        return (before, (after, end)), 0
    if entry + 8 > optional + size:
        _refuse("Its data directories are cut short.")
    certificates_at, certificates = _numbers("<II", data, entry)
    if certificates and certificates_at + certificates != len(data):
        _refuse("Its signatures are not at its end.")
    return (before, (after, entry), (entry + 8, end)), certificates


def _sections(data: bytes, at: int, count: int) -> tuple[Section, ...]:
    if count > _MOST_SECTIONS:
        _refuse("It has more than 96 sections.", got=str(count))
    return tuple(_section(data, at + index * _SECTION_SIZE) for index in range(count))


def _section(data: bytes, at: int) -> Section:
    size, raw_size, raw_at = _numbers("<8xI4xII", data, at)
    if raw_size and raw_at + raw_size > len(data):
        _refuse("One of its sections is cut short.")
    name = data[at : at + 8].rstrip(b"\0").decode("latin-1")
    return Section(name, size, raw_at if raw_size else 0, raw_size)


def _numbers(layout: str, data: bytes, at: int) -> tuple[int, ...]:
    try:
        return struct.unpack_from(layout, data, at)
    except struct.error as error:
        raise MalformedImage("It is cut short.", step="image", hint=_HINT) from error


_HINT = "A unified kernel image is needed: an EFI program, as `ukify` or mkosi makes it."


def _refuse(message: str, *, expected: str | None = None, got: str | None = None) -> NoReturn:
    raise MalformedImage(message, step="image", hint=_HINT, expected=expected, got=got)
