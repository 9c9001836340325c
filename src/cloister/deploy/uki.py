"""A unified kernel image: one EFI program that holds systemd's stub, a kernel, its initrd and its command line.

Sources: UAPI Group, "Unified Kernel Image (UKI)"; systemd-stub(7) and its code (`src/boot`, `src/fundamental/uki.h`) of
versions 252 and 257 (Debian 12 and 13): which sections are measured in which order, and what the kernel is handed.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NoReturn

from cloister.deploy.pe import Program, parse_program
from cloister.errors import MalformedImage

__all__ = ["Image", "parse_image"]

_SECTIONS: Mapping[int, tuple[str, ...]] = MappingProxyType(
    {
        252: (".linux", ".osrel", ".cmdline", ".initrd", ".splash", ".dtb", ".pcrpkey"),
        257: (
            *(".linux", ".osrel", ".cmdline", ".initrd", ".ucode", ".splash"),
            *(".dtb", ".uname", ".sbat", ".pcrpkey"),
        ),
    }
)
"""What each version of the stub measures into PCR 11, in this order. Not `.pcrsig`: it signs the result.

These versions are those whose predictions were held against what a machine measured. Newer ones are not among them: they
may hand the kernel a secret, or an initrd of the host's.
"""

_HANDED_ON: Mapping[int, tuple[tuple[str, str], ...]] = MappingProxyType(
    {
        252: ((".pcrsig", "tpm2-pcr-signature.json"), (".pcrpkey", "tpm2-pcr-public-key.pem")),
        257: (
            *((".pcrsig", "tpm2-pcr-signature.json"), (".pcrpkey", "tpm2-pcr-public-key.pem")),
            (".osrel", "os-release"),
        ),
    }
)
"""Sections that the stub hands on as files below `/.extra`, each in an archive of its own behind the initrd."""

_CHOSEN = (".profile", ".dtbauto", ".hwids")
"""Signs that the stub chooses among several sections: as it is told to, or by the machine at hand."""

_OLDEST_KERNEL = (6, 1)
"""Since then Linux measures what it is handed; older ones were not looked at."""

_BLANK = "".join(map(chr, range(0x21))) + "\x7f"
_STUB = re.compile(rb"#### LoaderInfo: systemd-stub ([0-9]{3})[^#]{0,60} ####")
_KERNEL_RELEASE = re.compile(rb"([0-9]{1,3})\.([0-9]{1,3})[^\0]{0,200}")


@dataclass(frozen=True, slots=True)
class Image:
    """`stub`: systemd's version. `kernel`: the program in `.linux`, `kernel_version` its major and minor number.

    `sections`: what the stub measures, in its order. `initrd`: the bytes that the kernel is handed, b"" for none.
    `load_options`: the command line as the kernel is handed it, UTF-16-LE with its final zero.
    """

    program: Program
    stub: int
    kernel: Program
    kernel_version: tuple[int, int]
    sections: tuple[tuple[str, bytes], ...]
    initrd: bytes
    load_options: bytes


def parse_image(data: bytes) -> Image:
    """The parts of an image that its measurement depends on.

    Raises: MalformedImage for other programs, for a stub or kernel whose measurements are not known here, and for an image
    of several profiles: which of them starts is not in the image.
    """
    program = parse_program(data)
    names = [section.name for section in program.sections]
    if ".linux" not in names:
        _refuse("It has no kernel in it.", got=" ".join(sorted(names))[:100])
    stub = _stub(program)
    if any(names.count(name) > 1 for name in _SECTIONS[stub]) or any(name in names for name in _CHOSEN):
        _refuse("It has several profiles or devices, of which one is chosen when it starts.")
    kernel = parse_program(program.content(".linux"))
    return Image(
        program=program,
        stub=stub,
        kernel=kernel,
        kernel_version=_kernel_version(kernel.data),
        sections=tuple((name, program.content(name)) for name in _SECTIONS[stub] if name in names),
        initrd=b"".join(_initrds(program, stub)),
        load_options=_load_options(program),
    )


def _refuse(message: str, *, expected: str | None = None, got: str | None = None) -> NoReturn:
    hint = "A unified kernel image is needed: an EFI program, as `ukify` or mkosi makes it."
    raise MalformedImage(message, step="image", hint=hint, expected=expected, got=got)


def _stub(program: Program) -> int:
    found = _STUB.search(program.content(".sdmagic")) if program.has(".sdmagic") else None
    version = int(found[1]) if found else 0
    if version not in _SECTIONS:
        got = str(version) if version else "none that says its version"
        expected = f"systemd-stub {' or '.join(map(str, _SECTIONS))}"
        _refuse("Its boot stub is not one whose measurements are known.", expected=expected, got=got)
    return version


def _kernel_version(kernel: bytes) -> tuple[int, int]:
    """Of a bzImage: the text that its header points to (Linux, "The Linux/x86 Boot Protocol", `kernel_version`)."""
    at = int.from_bytes(kernel[0x20E:0x210], "little") + 0x200
    found = _KERNEL_RELEASE.match(kernel[at : at + 256]) if kernel[0x202:0x206] == b"HdrS" else None
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if version < _OLDEST_KERNEL:
        _refuse("Its kernel is not a Linux kernel for x86-64 from 6.1 on.", got=".".join(map(str, version)))
    return version


def _load_options(program: Program) -> bytes:
    """Without what a stub takes off its end; b"" without a command line. What stubs treat differently is refused."""
    if not program.has(".cmdline"):
        return b""
    try:
        text = program.content(".cmdline").partition(b"\0")[0].decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedImage("Its command line is not UTF-8.", step="image") from error
    line = text.rstrip(_BLANK)
    if not line or line[0] == " " or any(letter != " " and letter in _BLANK for letter in line):
        _refuse("Its command line is empty, begins with a space, or has control characters in it.")
    return (line + "\0").encode("utf-16-le")


def _initrds(program: Program, stub: int) -> Iterator[bytes]:
    """Each part filled up to four bytes where another follows: the kernel takes them for one file."""
    parts = [program.content(name) for name in (".ucode", ".initrd") if program.has(name)]
    parts += [_archive(file, program.content(name)) for name, file in _HANDED_ON[stub] if program.has(name)]
    for part in parts:
        yield part + bytes(-len(part) % 4 if len(parts) > 1 else 0)


def _archive(name: str, content: bytes) -> bytes:
    """A cpio archive (Linux, "initramfs buffer format") of `/.extra/NAME`, as the stub packs it: no time, no owner."""
    entries = [(".extra", 0o040555, b""), (f".extra/{name}", 0o100444, content)]
    packed = b"".join(_entry(at, path, mode, data) for at, (path, mode, data) in enumerate(entries, 1))
    return packed + b"070701" + b"0" * 32 + b"00000001" + b"0" * 48 + b"0000000B" + b"0" * 8 + b"TRAILER!!!" + bytes(4)


def _entry(inode: int, path: str, mode: int, data: bytes) -> bytes:
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path) + 1, 0)
    head = b"070701" + b"".join(f"{value:08x}".encode() for value in fields) + path.encode() + b"\0"
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)
