"""Gramine's programs, as far as they can be had without it: each keeps the real one's options and files.

`gramine-manifest` fills in where Gramine lies. `gramine-sgx-sign` hashes what has no digest yet and leaves a SIGSTRUCT;
its MRENCLAVE is a digest over the manifest, so it changes whenever the real one would. `gramine-sgx` starts the manifest's
program with nothing but the manifest's files, arguments and environment, with the system calls that Gramine 1.9 has, no
child processes, and the manifest's stack. Run as `python gramine_programs.py SETTINGS NAME OPTIONS…`.
"""

import argparse
import ctypes
import hashlib
import json
import os
import resource
import signal
import socket
import struct
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key

ATTESTATION_FD = 100

# Gramine 1.9's table of system calls (libos/src/arch/x86_64/libos_table.c): what is not in it answers ENOSYS. `flock` is
# in it but off, and `fork`, `vfork` and a `clone` that makes no thread are what `sys.disallow_subprocesses` refuses.
_KNOWN = frozenset().union(
    (
        *range(25),
        *range(26, 29),
        *range(32, 57),
        *range(59, 64),
        72,
        *range(74, 86),
        87,
        *range(89, 94),
        95,
        96,
        97,
        99,
    ),
    (102, *range(104, 113), 115, 116, 121, *range(124, 129), 130, 131, 133, 137, 138, *range(140, 153), 158, 160, 161),
    (170, 171, 186, *range(200, 205), 213, 217, 218, 221, *range(228, 235), 237, 247, *range(257, 261), 262, 263, 264),
    (*range(267, 272), 273, 274, 281, 284, 285, 288, *range(290, 294), 299, 302, 307, 309, 318, 325),
)
_CLONE, _CLONE_THREAD = 56, 0x10000
_ENOSYS, _EACCES = 38, 13
_LOAD, _EQUAL, _SET, _RETURN = 0x20, 0x15, 0x45, 0x06  # BPF: ld abs, jeq, jset, ret
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_X86_64 = 0xC000003E
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _FILTER = 1, 22, 38, 2
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000


def manifest_main(settings: Mapping[str, str], options: list[str]) -> None:
    template, output = options
    text = Path(template).read_text()
    text = text.replace("{{ gramine.libos }}", settings["libos"])
    Path(output).write_text(text.replace("{{ gramine.runtimedir() }}", settings["runtime"]))


def sign_main(_: Mapping[str, str], options: list[str]) -> None:
    parser = argparse.ArgumentParser()
    for name in ("manifest", "output", "key", "sigfile"):
        parser.add_argument(f"--{name}", required=True)
    given = parser.parse_args(options)
    text = Path(given.manifest).read_text()
    measured = hashlib.sha256(text.encode())
    for entry in tomllib.loads(text)["sgx"]["trusted_files"]:
        if isinstance(entry, str):
            for path in _expanded(entry):
                measured.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
        else:
            Path(entry["uri"].removeprefix("file:")).stat()  # the real one fails where it is not, too
    Path(given.output).write_text(text)
    key = load_pem_private_key(Path(given.key).read_bytes(), None)
    assert isinstance(key, rsa.RSAPrivateKey)
    Path(given.sigfile).write_bytes(sigstruct(measured.digest(), key))


def _expanded(uri: str) -> list[Path]:
    path = Path(uri.removeprefix("file:"))
    assert uri.endswith("/") == path.is_dir(), uri
    return sorted(path.iterdir()) if path.is_dir() else [path]


def sigstruct(
    mr_enclave: bytes, key: rsa.RSAPrivateKey, *, flags: int = 0x04, product: int = 0, version: int = 0
) -> bytes:
    """Intel SDM, volume 3D, "Enclave Signature Structure (SIGSTRUCT)"."""
    head = bytes.fromhex("06000000e10000000000010000000000") + bytes(4) + struct.pack("<I", 0x20261126)
    head += bytes.fromhex("01010000600000006000000001000000") + bytes(88)
    body = struct.pack("<II", 0, 0xFFFFFFFF) + bytes(20) + struct.pack("<QQ", flags, 3) + b"\xff" * 16 + mr_enclave
    body += bytes(32) + struct.pack("<HH", product, version)
    signature = key.sign(head + body, PKCS1v15(), SHA256())[::-1]
    modulus = key.public_key().public_numbers().n.to_bytes(384, "little")
    made = head + modulus + struct.pack("<I", 3) + signature + body + bytes(12) + bytes(768)
    assert len(made) == 1808
    return made


def sgx_main(settings: Mapping[str, str], options: list[str]) -> None:
    (name,) = options
    manifest = tomllib.loads(Path(f"{name}.manifest.sgx").read_text())
    assert Path(f"{name}.sig").stat().st_size == 1808
    root = Path(manifest["fs"]["root"]["uri"].removeprefix("file:")).absolute()
    outside = socket.socket(socket.AF_UNIX)
    outside.connect(settings["attestation"])
    os.dup2(outside.fileno(), ATTESTATION_FD)
    argv = [*manifest["loader"]["argv"]]
    argv[-1] = _with_attestation(argv[-1])
    _mount(root, manifest)
    os.chroot(root)
    os.chdir("/")
    environment = manifest["loader"]["env"]
    stack = int(manifest["sys"]["stack"]["size"].removesuffix("M")) << 20
    resource.setrlimit(resource.RLIMIT_STACK, (stack, stack))
    _end_with_parent()
    _restrict()
    os.execve(manifest["libos"]["entrypoint"], argv, environment)


def _mount(root: Path, manifest: Mapping[str, Any]) -> None:
    """The manifest's mounts, and what Gramine makes itself: some devices and /proc."""
    call = ctypes.CDLL(None, use_errno=True).mount

    def mount(source: str, target: Path, kind: str, flags: int) -> None:
        if call(source.encode(), str(target).encode(), kind.encode(), flags, None) != 0:
            raise OSError(ctypes.get_errno(), "mount", str(target))

    mount("none", Path("/"), "none", _MS_REC | _MS_PRIVATE)
    for one in manifest["fs"]["mounts"]:
        target = root / one["path"].lstrip("/")
        if one["type"] == "tmpfs":
            mount("tmpfs", target, "tmpfs", 0)
        else:
            mount(one["uri"].removeprefix("file:"), target, "none", _MS_BIND)
    for folder in ("lib64", "proc", "dev"):
        (root / folder).mkdir(exist_ok=True)
    mount(str(root / "lib"), root / "lib64", "none", _MS_BIND)  # where the kernel looks for the program's loader
    mount("/proc", root / "proc", "none", _MS_BIND | _MS_REC)
    for device in ("null", "zero", "random", "urandom"):
        (root / "dev" / device).touch()
        mount(f"/dev/{device}", root / "dev" / device, "none", _MS_BIND)


def _end_with_parent() -> None:
    """strace, which may be killed: nobody then lets through the calls that it watches, `exit` among them."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def _restrict() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    program = list(_filter())
    code = b"".join(struct.pack("<HBBI", *one) for one in program)
    buffer = ctypes.create_string_buffer(code)
    head = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(buffer)))
    for words in ((_PR_SET_NO_NEW_PRIVS, 1, 0), (_PR_SET_SECCOMP, _FILTER, ctypes.addressof(head))):
        if libc.prctl(words[0], ctypes.c_ulong(words[1]), ctypes.c_ulong(words[2]), 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


def _filter() -> Iterator[tuple[int, int, int, int]]:
    """(code, jump if true, jump if false, operand)."""
    yield (_LOAD, 0, 0, 4)  # the architecture
    yield (_EQUAL, 1, 0, _X86_64)
    yield (_RETURN, 0, 0, _KILL)
    yield (_LOAD, 0, 0, 0)  # the call's number
    yield (_EQUAL, 0, 4, _CLONE)
    yield (_LOAD, 0, 0, 16)  # its first argument's lower half
    yield (_SET, 0, 1, _CLONE_THREAD)
    yield (_RETURN, 0, 0, _ALLOW)
    yield (_RETURN, 0, 0, _ERRNO | _EACCES)
    for number in sorted(_KNOWN - {_CLONE}):
        yield (_EQUAL, 0, 1, number)
        yield (_RETURN, 0, 0, _ALLOW)
    yield (_RETURN, 0, 0, _ERRNO | _ENOSYS)


def _with_attestation(code: str) -> str:
    """The program's first words, with /dev/attestation before the enclave starts."""
    inside = Path(__file__).with_name("gramine_attestation.py").read_text()
    assert code.count("import runpy; ") == 1
    return code.replace("import runpy; ", f"exec({inside!r}, {{}}); import runpy; ")


if __name__ == "__main__":
    mains = {"gramine-manifest": manifest_main, "gramine-sgx-sign": sign_main, "gramine-sgx": sgx_main}
    mains[sys.argv[2]](json.loads(sys.argv[1]), sys.argv[3:])
