"""The launch digest of a SEV-SNP guest under QEMU: firmware, the hashes of the kernel it was given, and each CPU's state.

Sources: AMD, "SEV Secure Nested Paging Firmware ABI Specification", section 8.17 (SNP_LAUNCH_UPDATE, PAGE_INFO); AMD64
Architecture Programmer's Manual, volume 2, table B-4 (VMSA); EDK II, `OvmfPkg/ResetVector` (GUIDed table, SEV metadata);
QEMU, `target/i386/sev.c` (table of hashes, order of pages) and KVM (initial VMSA).
"""

import hashlib
import struct
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NoReturn

from cloister.errors import MalformedImage, WrongUse

__all__ = ["CPUS", "SNP_CPU", "Firmware", "launch_digest", "parse_firmware"]

_PAGE = 4096
_FOUR_GIB = 1 << 32
_MAX_FIRMWARE = 64 << 20
_MOST_VCPUS = 1024
_MOST_AREAS = 64
_MAX_AREA = 256 << 20

_TABLE = uuid.UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
_RESET_BLOCK = uuid.UUID("00f771de-1a7e-4fcb-890e-68c77e2fb44e").bytes_le
_METADATA = uuid.UUID("dc886566-984a-4798-a75e-5585a7bf67cc").bytes_le
_HASHES_AREA = uuid.UUID("7255371f-3a3b-4b04-927b-1da6efa8d454").bytes_le

_HASHES = uuid.UUID("9438d606-4f22-4cc9-b479-a793d411fd21").bytes_le
_HASH_OF_COMMAND_LINE = uuid.UUID("97d02dd8-bd20-4c94-aa78-e7714d36ab2a").bytes_le
_HASH_OF_INITRD = uuid.UUID("44baf731-3a2f-4bd7-9af1-41e29169781d").bytes_le
_HASH_OF_KERNEL = uuid.UUID("4de79437-abd2-427f-b835-d5b172d2045b").bytes_le

_NORMAL, _VMSA, _ZERO, _SECRETS, _CPUID = 1, 2, 3, 5, 6
"""Types of pages in PAGE_INFO."""

_ZEROED, _SECRETS_AREA, _CPUID_AREA, _SVSM_AREA, _HASHES_PAGE = 1, 2, 3, 4, 0x10
"""Types of areas in the firmware's SEV metadata."""

_PAGES_OF_AREA = MappingProxyType({_ZEROED: _ZERO, _SVSM_AREA: _ZERO, _SECRETS_AREA: _SECRETS, _CPUID_AREA: _CPUID})

_VMSA_ADDRESS = 0xFFFFFFFFF000
_RESET_VECTOR = 0xFFFFFFF0

SNP_CPU = "EPYC-v4"
"""What QEMU's examples start guests with: its signature is the same on every generation of hosts."""

_CHECKING = "Build OVMF from OvmfPkg/AmdSev/AmdSevX64.dsc."

SEV_FEATURES = 1
"""SNP is active, and nothing else is."""


def _signature(family: int, model: int, stepping: int) -> int:
    """CPUID Fn0000_0001_EAX of a family from 15 on."""
    return (family - 15) << 20 | model >> 4 << 16 | 15 << 8 | (model & 15) << 4 | stepping


_ROME, _MILAN = _signature(23, 49, 0), _signature(25, 1, 1)

CPUS: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("EPYC", "EPYC-v1", "EPYC-v2", "EPYC-v3", "EPYC-v4", "EPYC-IBPB"), _signature(23, 1, 2)),
        **dict.fromkeys(("EPYC-Rome", "EPYC-Rome-v1", "EPYC-Rome-v2", "EPYC-Rome-v3", "EPYC-Rome-v4"), _ROME),
        **dict.fromkeys(("EPYC-Milan", "EPYC-Milan-v1", "EPYC-Milan-v2"), _MILAN),
        **dict.fromkeys(("EPYC-Genoa", "EPYC-Genoa-v1"), _signature(25, 17, 0)),
        **dict.fromkeys(("EPYC-Turin", "EPYC-Turin-v1"), _signature(26, 0, 0)),
    }
)
"""QEMU's word for a CPU -> its signature, with which each virtual CPU starts."""


@dataclass(frozen=True, slots=True)
class Firmware:
    """`areas`: (guest address, bytes, type) of its SEV metadata, in order. `reset_address`: where further CPUs begin.

    `hashes_at`: guest address of the table of hashes, None in a firmware that takes none.
    """

    data: bytes
    areas: tuple[tuple[int, int, int], ...]
    reset_address: int
    hashes_at: int | None


def parse_firmware(data: bytes) -> Firmware:
    """Total over bytes and bounded. Raises: MalformedImage for a firmware that is not made for SEV-SNP."""
    if not data or len(data) % _PAGE or len(data) > _MAX_FIRMWARE:
        _refuse("It has not whole pages, or too many.", got=str(len(data)))
    table = _table(data)
    if _RESET_BLOCK not in table or _METADATA not in table:
        _refuse("It is not made for SEV-SNP.")
    (offset,) = _numbers("<I", table[_METADATA], 0)
    hashes = table.get(_HASHES_AREA)
    return Firmware(
        data=data,
        areas=_areas(data, len(data) - offset),
        reset_address=_numbers("<I", table[_RESET_BLOCK], 0)[0],
        hashes_at=_numbers("<I", hashes, 0)[0] if hashes else None,
    )


def launch_digest(
    firmware: Firmware, kernel: bytes, *, vcpus: int, cpu: str, command_line: str = "", features: int = SEV_FEATURES
) -> bytes:
    """48 bytes: what the report's `measurement` will be. `kernel`: the unified kernel image, started by QEMU's `-kernel`
    with `kernel-hashes=on`, which needs no initrd beside it; `command_line`: QEMU's `-append`.

    `cpu`: QEMU's word, of `CPUS`. `features`: SEV_FEATURES in the VMSA, as the host's KVM sets them.

    Raises: WrongUse for a CPU that is not known, and for none or more than 1024 of them; MalformedImage for a firmware
    that does not check the kernel: its digest would say nothing about what runs.
    """
    if cpu not in CPUS:
        raise WrongUse("That CPU's signature is not known.", expected=", ".join(CPUS), got=ascii(cpu)[:40])
    if not 1 <= vcpus <= _MOST_VCPUS:
        raise WrongUse("A guest has 1 to 1024 CPUs.", got=str(vcpus))
    table = _hashes(kernel, command_line)
    offset = _offset_of_hashes(firmware, len(table))
    page = bytes(offset) + table + bytes(_PAGE - offset - len(table))
    digest = _extended(bytes(48), _firmware_pages(firmware))
    digest = _extended(digest, _area_pages(firmware, page))
    return _extended(digest, _cpu_pages(firmware, vcpus, CPUS[cpu], features))


_PageInfo = tuple[int, int, bytes]
"""Type, guest address, SHA-384 of the content (zeros for a page whose content is not measured)."""


def _extended(digest: bytes, pages: Iterable[_PageInfo]) -> bytes:
    """Each page's PAGE_INFO: digest so far, content, size, type, no permissions for other VMPLs, address."""
    for kind, address, content in pages:
        info = digest + content + struct.pack("<HB5xQ", 0x70, kind, address)
        digest = hashlib.sha384(info).digest()
    return digest


def _firmware_pages(firmware: Firmware) -> Iterator[_PageInfo]:
    """Right below 4 GiB."""
    start = _FOUR_GIB - len(firmware.data)
    for at in range(0, len(firmware.data), _PAGE):
        yield _NORMAL, start + at, hashlib.sha384(firmware.data[at : at + _PAGE]).digest()


def _offset_of_hashes(firmware: Firmware, size: int) -> int:
    """Where in its page the table of hashes lies, whose area the metadata must name."""
    if firmware.hashes_at is None:
        _refuse("It does not check the kernel that it is given.", hint=_CHECKING)
    offset = firmware.hashes_at % _PAGE
    pages = [area for area in firmware.areas if area[2] == _HASHES_PAGE]
    if pages != [(firmware.hashes_at - offset, _PAGE, _HASHES_PAGE)] or offset + size > _PAGE:
        _refuse("It does not check the kernel that it is given.", hint=_CHECKING)
    return offset


def _area_pages(firmware: Firmware, hashes: bytes) -> Iterator[_PageInfo]:
    for start, size, kind in firmware.areas:
        if kind == _HASHES_PAGE:
            yield _NORMAL, start, hashlib.sha384(hashes).digest()
        elif kind in (_ZEROED, _SVSM_AREA):
            for at in range(start, start + size, _PAGE):
                yield _ZERO, at, bytes(48)
        else:
            yield _PAGES_OF_AREA[kind], start, bytes(48)


def _hashes(kernel: bytes, command_line: str) -> bytes:
    """QEMU's table, filled up to 16 bytes: SHA-256 of command line with its final zero, of initrd, of kernel."""
    texts = (
        (_HASH_OF_COMMAND_LINE, command_line.encode() + b"\0"),
        (_HASH_OF_INITRD, b""),
        (_HASH_OF_KERNEL, kernel),
    )
    entries = b"".join(guid + struct.pack("<H", 50) + hashlib.sha256(text).digest() for guid, text in texts)
    table = _HASHES + struct.pack("<H", 18 + len(entries)) + entries
    return table + bytes(-len(table) % 16)


def _cpu_pages(firmware: Firmware, vcpus: int, signature: int, features: int) -> Iterator[_PageInfo]:
    first = hashlib.sha384(_vmsa(_RESET_VECTOR, signature, features)).digest()
    other = hashlib.sha384(_vmsa(firmware.reset_address, signature, features)).digest()
    for index in range(vcpus):
        yield _VMSA, _VMSA_ADDRESS, other if index else first


def _vmsa(instruction: int, signature: int, features: int) -> bytes:
    """A CPU's state as KVM makes it after a reset, ready to begin at `instruction`."""
    page = bytearray(_PAGE)

    def segment(at: int, selector: int, attributes: int, base: int = 0) -> None:
        struct.pack_into("<HHIQ", page, at, selector, attributes, 0xFFFF, base)

    for at in (0x00, 0x30, 0x40, 0x50):  # es, ds, fs, gs
        segment(at, 0, 0x93)
    segment(0x10, 0xF000, 0x9B, instruction & 0xFFFF0000)  # cs
    segment(0x20, 0, 0x93)  # ss
    for at, attributes in ((0x60, 0), (0x70, 0x82), (0x80, 0), (0x90, 0x8B)):  # gdtr, ldtr, idtr, tr
        segment(at, 0, attributes)
    registers = {
        0xD0: 0x1000,  # efer: SVME
        0x148: 0x40,  # cr4: MCE
        0x158: 0x10,  # cr0
        0x160: 0x400,  # dr7
        0x168: 0xFFFF0FF0,  # dr6
        0x170: 0x2,  # rflags
        0x178: instruction & 0xFFFF,  # rip
        0x268: 0x7040600070406,  # g_pat
        0x310: signature,  # rdx
        0x3B0: features,  # sev_features
        0x3E8: 0x1,  # xcr0
    }
    for at, value in registers.items():
        struct.pack_into("<Q", page, at, value)
    struct.pack_into("<I", page, 0x408, 0x1F80)  # mxcsr
    struct.pack_into("<H", page, 0x410, 0x37F)  # x87_fcw
    return bytes(page)


def _table(data: bytes) -> Mapping[bytes, bytes]:
    """GUID -> data of the table that ends 32 bytes before the firmware's end, read from its end."""
    end = len(data) - 32
    if data[end - 16 : end] != _TABLE:
        _refuse("It has no table of an OVMF.")
    (size,) = _numbers("<H", data, end - 18)
    start, at = end - size, end - 18
    if size < 18 or start < 0:
        _refuse("Its table is cut short.")
    found: dict[bytes, bytes] = {}
    while at - 18 >= start:
        (length,) = _numbers("<H", data, at - 18)
        if not 18 <= length <= at - start:
            _refuse("Its table has an entry of a wrong length.")
        found.setdefault(data[at - 16 : at], data[at - length : at - 18])
        at -= length
    return MappingProxyType(found)


def _areas(data: bytes, at: int) -> tuple[tuple[int, int, int], ...]:
    if at < 0 or data[at : at + 4] != b"ASEV":
        _refuse("Its SEV metadata is not where it says.")
    (count,) = _numbers("<12xI", data, at)
    if count > _MOST_AREAS:
        _refuse("Its SEV metadata names more areas than any firmware has.", got=str(count))
    areas = tuple(_area(data, at + 16 + 12 * index) for index in range(count))
    if sum(size for _, size, _ in areas) > _MAX_AREA:
        _refuse("Its SEV metadata names more memory than any firmware takes.")
    return areas


def _area(data: bytes, at: int) -> tuple[int, int, int]:
    start, size, kind = _numbers("<III", data, at)
    if kind not in (*_PAGES_OF_AREA, _HASHES_PAGE) or start % _PAGE or size % _PAGE:
        _refuse("Its SEV metadata has an area of an unknown kind.", got=f"{kind:#x}")
    return start, size, kind


def _numbers(layout: str, data: bytes, at: int) -> tuple[int, ...]:
    try:
        return struct.unpack_from(layout, data, at)
    except struct.error as error:
        raise MalformedImage("The firmware is cut short.", step="firmware") from error


def _refuse(message: str, *, got: str | None = None, hint: str = "") -> NoReturn:
    raise MalformedImage(message, step="firmware", got=got, hint=hint or "An OVMF for SEV-SNP is needed.")
