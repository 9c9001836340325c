"""Makes EFI programs, unified kernel images, SEV-SNP firmware and partition tables of our own, as small as can be."""

import struct
import uuid
import zlib
from collections.abc import Mapping, Sequence

ALIGNMENT = 512
HEADERS = 1024


def program(
    sections: Sequence[tuple[str, bytes]],
    *,
    certificates: bytes = b"",
    checksum: int = 0,
    wide: bool = True,
    directories: int = 16,
    tail: bytes = b"",
    backwards: bool = False,
) -> bytes:
    """A PE32+ program (PE32 unless `wide`), its headers 1 KiB. `backwards`: the sections lie in the file in the opposite
    order. `tail`: bytes after the last section, before the certificates."""
    raw: dict[int, tuple[int, bytes]] = {}
    at = HEADERS
    for index in reversed(range(len(sections))) if backwards else range(len(sections)):
        content = sections[index][1]
        padded = content + bytes(-len(content) % ALIGNMENT)
        raw[index] = (at, padded)
        at += len(padded)
    body = b"".join(padded for _, padded in sorted(raw.values())) + tail
    optional_at = 64 + 24
    fixed = 112 if wide else 96
    optional = bytearray(fixed + 8 * directories)
    struct.pack_into("<H", optional, 0, 0x20B if wide else 0x10B)
    struct.pack_into("<II", optional, 60, HEADERS, checksum)
    struct.pack_into("<I", optional, fixed - 4, directories)
    if certificates:
        struct.pack_into("<II", optional, fixed + 32, HEADERS + len(body), len(certificates))
    headers = bytearray(HEADERS)
    headers[:2] = b"MZ"
    struct.pack_into("<I", headers, 0x3C, 64)
    struct.pack_into("<4sHHIIIHH", headers, 64, b"PE\0\0", 0x8664, len(sections), 0, 0, 0, len(optional), 0x22E)
    headers[optional_at : optional_at + len(optional)] = optional
    for index, (name, content) in enumerate(sections):
        place, padded = raw[index]
        entry = struct.pack("<8sIIII16x", name.encode(), len(content), 0x1000 * (index + 1), len(padded), place)
        start = optional_at + len(optional) + 40 * index
        headers[start : start + 40] = entry
    return bytes(headers) + body + certificates


def kernel(release: str = "6.12.9-cloister", code: bytes = b"kernel code") -> bytes:
    """An EFI program that says its release as a bzImage does."""
    data = bytearray(program([(".text", bytes(64) + release.encode() + b" (builder) #1\0" + code)]))
    data[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", data, 0x20E, HEADERS + 64 - 0x200)
    return bytes(data)


OSREL = b"ID=cloister\nVERSION_ID=1\n"
CMDLINE = b"console=ttyS0 roothash=00ff"
INITRD = b"070701 an initrd of ours"


def sdmagic(version: str) -> bytes:
    return f"#### LoaderInfo: systemd-stub {version} ####".encode()


def uki(stub: str = "257.8-1~deb13u2", **changes: bytes | None) -> bytes:
    """A unified kernel image. `changes`: section (without its dot) -> content, None to leave it out."""
    sections: dict[str, bytes | None] = {
        "text": b"the stub's own code",
        "sbat": b"sbat,1,SBAT Version\n",
        "sdmagic": sdmagic(stub),
        "osrel": OSREL,
        "cmdline": CMDLINE,
        "uname": b"6.12.9-cloister",
        "initrd": INITRD,
        "linux": kernel(),
        **changes,
    }
    return program([(f".{name}", content) for name, content in sections.items() if content is not None])


def firmware(*, hashes: bool = True, areas: Sequence[tuple[int, int, int]] | None = None, code: bytes = b"") -> bytes:
    """An OVMF of 64 KiB for SEV-SNP: table at its end, metadata before it. `hashes`: it checks the kernel it is given."""
    named = [(0x800000, 0x3000, 1), (0x80A000, 0x1000, 2), (0x80B000, 0x1000, 3), (0x80D000, 0x1000, 4)]
    named += [(0x810000, 0x1000, 0x10)] if hashes else []
    data = bytearray(65536)
    data[: len(code)] = code
    listed = areas if areas is not None else named
    metadata = struct.pack("<4sIII", b"ASEV", 16 + 12 * len(listed), 1, len(listed))
    metadata += b"".join(struct.pack("<III", *area) for area in listed)
    start = len(data) - 4096
    data[start : start + len(metadata)] = metadata
    entries = {
        "dc886566-984a-4798-a75e-5585a7bf67cc": struct.pack("<I", 4096),
        "00f771de-1a7e-4fcb-890e-68c77e2fb44e": struct.pack("<I", 0x80B004),
    }
    if hashes:
        entries["7255371f-3a3b-4b04-927b-1da6efa8d454"] = struct.pack("<II", 0x810C00, 1024)
    table = _table(entries)
    data[len(data) - 32 - len(table) : len(data) - 32] = table
    return bytes(data)


def _table(entries: Mapping[str, bytes]) -> bytes:
    def entry(guid: str, content: bytes, size: int) -> bytes:
        return content + struct.pack("<H", size) + uuid.UUID(guid).bytes_le

    body = b"".join(entry(guid, content, len(content) + 18) for guid, content in entries.items())
    return body + entry("96b582de-1fb2-45f7-baea-a366c55a082d", b"", len(body) + 18)


def disk(entries: Sequence[bytes], *, count: int = 128) -> bytes:
    """The first sectors of a disk with these partition entries (128 bytes each)."""
    array = b"".join(entries) + bytes(128 * (count - len(entries)))
    body = struct.pack("<QQQQ16sQIII", 1, 99999, 34, 99966, bytes(range(16)), 2, count, 128, zlib.crc32(array))
    start = struct.pack("<8sII", b"EFI PART", 0x10000, 92)
    checksum = zlib.crc32(start + bytes(8) + body)
    header = start + struct.pack("<I4x", checksum) + body
    return bytes(512) + header + bytes(512 - len(header)) + array
