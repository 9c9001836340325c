"""A disk's partition table, as the firmware measures it before it starts a program from that disk.

Sources: UEFI 2.10, section 5.3 (GUID Partition Table); TCG "PC Client Platform Firmware Profile", section 10.2.6
(UEFI_GPT_DATA): the header, how many partitions there are, and their entries.
"""

import struct
import zlib
from typing import BinaryIO, NoReturn

from cloister.errors import MalformedImage

__all__ = ["read_table"]

_SECTOR = 512
_HEADER_SIZE = 92
_ENTRY_SIZE = 128
_MOST_ENTRIES = 1024


def read_table(disk: BinaryIO) -> bytes:
    """UEFI_GPT_DATA of a disk of 512-byte sectors, from its first table.

    Raises: MalformedImage for a disk without such a table, with one that its own checksums do not fit, or that is larger
    than any in use.
    """
    disk.seek(_SECTOR)
    sector = disk.read(_SECTOR)
    header = sector[:_HEADER_SIZE]
    if len(header) != _HEADER_SIZE or header[:8] != b"EFI PART":
        _refuse("It has no GUID partition table, or not sectors of 512 bytes.")
    size, checksum = struct.unpack_from("<II", header, 12)
    at, count, entry_size, entries_checksum = struct.unpack_from("<QIII", header, 72)
    if size != _HEADER_SIZE or zlib.crc32(header[:16] + bytes(4) + header[20:]) != checksum:
        _refuse("Its partition table's header does not fit its checksum.")
    if entry_size != _ENTRY_SIZE or count > _MOST_ENTRIES or at >= 1 << 32:
        _refuse("Its partition table has an unusual size.", got=f"{count} entries of {entry_size} bytes")
    disk.seek(at * _SECTOR)
    data = disk.read(count * _ENTRY_SIZE)
    if zlib.crc32(data) != entries_checksum:
        _refuse("Its partitions do not fit their checksum.")
    entries = [data[start : start + _ENTRY_SIZE] for start in range(0, len(data), _ENTRY_SIZE)]
    used = [entry for entry in entries if any(entry[:16])]
    return header + struct.pack("<Q", len(used)) + b"".join(used)


def _refuse(message: str, *, got: str | None = None) -> NoReturn:
    hint = "--disk takes the raw image of the disk that the machine boots from."
    raise MalformedImage(message, step="disk", hint=hint, got=got)
