"""The manifest of one enclave under Gramine: what it is made of goes in, Gramine's own text comes out. Pure.

Every file that the enclave may open is trusted, which is to say named with its digest. The launch config is one of them,
so MRENCLAVE is of this deployment alone; the model is another. Nothing is "allowed" unhashed, nothing of the host's
environment or command line gets in, and what is written lies in memory. There is one process: a child would be another
enclave, so the engine runs in a thread.

Sources: Gramine's documentation, "Manifest syntax"; its release 1.9.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from cloister.deploy.gramine_syntax import check_manifest, parse_manifest
from cloister.errors import NotTrusted, WrongUse

__all__ = [
    "APP",
    "ARGV",
    "ENGINE",
    "LAUNCH",
    "LIBRARIES",
    "MODEL",
    "NAME",
    "PACKAGES",
    "PYTHON",
    "ROOT",
    "CpuFeatures",
    "Enclave",
    "Gramine",
    "Memory",
    "most_threads",
    "power_of_two",
    "refuse_weak",
    "render",
]

NAME = "cloister"
"""Of the manifest's files: `cloister.manifest`, and signed `cloister.manifest.sgx` and `cloister.sig`."""

ROOT = "root"
"""The folder beside the manifest that holds the enclave's files."""

# Where things lie, seen from inside: the same wherever they came from, or each machine would measure another enclave.
PYTHON = "/python"
APP = "/app"
PACKAGES = "/app/packages"
LIBRARIES = "/app/lib"
ENGINE = "/app/packages/llama_cpp/lib"
MODEL = "/model.gguf"
LAUNCH = "/launch.json"
_RUNTIME = "/lib"  # Gramine's C library, which its loader looks for here first
_SCRATCH = "/tmp"  # noqa: S108 (inside the enclave: memory)

_INTERPRETER = f"{PYTHON}/bin/python3"
_START = (
    f"import sys; sys.path += [{APP!r}, {PACKAGES!r}]; sys.pycache_prefix = '/dev/null'; "
    "import runpy; runpy.run_module('cloister.enclave.sgx', run_name='__main__')"
)
ARGV = (_INTERPRETER, "-I", "-S", "-B", "-c", _START)
"""Isolated, without `site` and without cached bytecode, as the host starts an enclave elsewhere."""

_ENVIRONMENT = {
    "LC_ALL": "C.UTF-8",
    "LD_LIBRARY_PATH": f"{_RUNTIME}:{LIBRARIES}",
    "MALLOC_ARENA_MAX": "1",  # each further arena reserves 64 MiB of the enclave
}
_STACK = "2M"
_FRONT = 3  # the main thread, the one that waits for standard input to end, the engine's supervisor
_ENGINE_THREADS = 4  # it decodes, reads, prepares, and gives signs of life in long calls
_MOST_COMPUTING = 63  # beside the one that decodes: `llm.llama.config.physical_cores` takes 64 at most
_MOST_ASKING = 32  # asyncio's own pool, in which quotes are made
_LIBUV = 4
_GRAMINE_OWN = 3  # messages between processes, timers, and the handshake of a new pipe
_MIB = 1 << 20
_LEAST = 1 << 30

Feature: TypeAlias = Literal["unspecified", "disabled", "required"]


@dataclass(frozen=True, slots=True)
class Gramine:
    """Where Gramine lies on the machine that signs, as absolute paths: its library OS, and the folder of its C library.
    The signer hashes both; they are part of MRENCLAVE."""

    libos: str
    runtime: str


@dataclass(frozen=True, slots=True)
class CpuFeatures:
    """What the enclave may use of the processor: "unspecified" takes it where it is, "required" starts nowhere else."""

    avx: Feature = "required"
    avx512: Feature = "unspecified"
    amx: Feature = "unspecified"


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """`size`: bytes, a power of two. `edmm`: pages are added when they are used (SGX2), and `size` is the most; without it
    all of them are there from the start. `preheat`: and touched at the start, which pays where the EPC holds them all."""

    size: int
    edmm: bool = False
    preheat: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Enclave:
    """What is measured. `files`: absolute path inside -> SHA-256 (hex), each lying in the folder `ROOT` under its path;
    without the launch config, whose exact bytes are `launch`. `threads`: at a time, at most (`most_threads`)."""

    launch: bytes
    files: Mapping[str, str]
    gramine: Gramine
    memory: Memory
    threads: int
    cpu: CpuFeatures = CpuFeatures()


def most_threads(tensors: int) -> int:
    """How many threads the one process can have at a time, on any machine: while a model is loaded, llama.cpp may check
    each of its `tensors` in a thread of its own; later it computes in 63 at most. Gramine's own are counted in.

    Too few would end the enclave; one that is never used costs some 0.2 MiB.
    """
    once_loaded = _MOST_COMPUTING + _MOST_ASKING + _LIBUV
    return _FRONT + _ENGINE_THREADS + _GRAMINE_OWN + max(once_loaded, _MOST_ASKING + tensors)


def power_of_two(size: int) -> int:
    """The least that an enclave can have of `size` bytes or more: a power of two, and a gibibyte at least."""
    return max(_LEAST, 1 << max(size - 1, 0).bit_length())


def render(enclave: Enclave) -> str:
    """The manifest's text: the same for the same enclave, to the byte.

    Raises: WrongUse for an enclave that no manifest can say; NotTrusted for one that would be weak (`refuse_weak`).
    """
    if enclave.memory.size != power_of_two(enclave.memory.size):
        raise WrongUse("An enclave's size is a power of two.", step="manifest", got=str(enclave.memory.size))
    if enclave.memory.edmm and enclave.memory.preheat:
        raise WrongUse("With EDMM there are no pages to touch at the start.", step="manifest")
    text = "".join(f"{line}\n" for line in _lines(enclave))
    refuse_weak(text, enclave.launch)
    return text


def _lines(enclave: Enclave) -> Iterator[str]:
    memory, cpu = enclave.memory, enclave.cpu
    yield f"loader.entrypoint.uri = {_text(f'file:{enclave.gramine.libos}')}"
    yield f"loader.argv = [{', '.join(map(_text, ARGV))}]"
    yield 'loader.log_level = "error"'
    for name, value in sorted(_ENVIRONMENT.items()):
        yield f"loader.env.{name} = {_text(value)}"
    yield f"libos.entrypoint = {_text(_INTERPRETER)}"
    yield f'fs.root = {{ type = "chroot", uri = "file:{ROOT}" }}'
    yield "fs.mounts = ["
    yield f'  {{ type = "chroot", path = "{_RUNTIME}", uri = {_text(f"file:{enclave.gramine.runtime}")} }},'
    yield f'  {{ type = "tmpfs", path = "{_SCRATCH}" }},'
    yield "]"
    yield f'sys.stack.size = "{_STACK}"'
    yield "sys.disallow_subprocesses = true"
    yield "sgx.debug = false"
    yield 'sgx.remote_attestation = "dcap"'
    yield f"sgx.edmm_enable = {_truth(memory.edmm)}"
    yield f'sgx.enclave_size = "{memory.size // _MIB}M"'
    yield f"sgx.preheat_enclave = {_truth(memory.preheat)}"
    yield f"sgx.max_threads = {enclave.threads}"
    for feature in ("avx", "avx512", "amx"):
        yield f"sgx.cpu_features.{feature} = {_text(getattr(cpu, feature))}"
    yield 'sgx.file_check_policy = "strict"'
    yield "sgx.trusted_files = ["
    yield f"  {_text(f'file:{enclave.gramine.runtime}/')},"  # hashed by the signer, file by file
    for path, sha256 in sorted({**enclave.files, LAUNCH: hashlib.sha256(enclave.launch).hexdigest()}.items()):
        yield f"  {{ uri = {_text(_uri(path))}, sha256 = {_text(sha256)} }},"
    yield "]"


def _uri(path: str) -> str:
    return f"file:{ROOT}{path}"


def _truth(value: bool) -> str:
    return "true" if value else "false"


def _text(value: str) -> str:
    """A TOML string: JSON's escapes are TOML's, but for pairs of surrogates, which no parser of TOML takes."""
    return json.dumps(value)


def refuse_weak(manifest: str, launch: bytes) -> None:
    """Whether an enclave of this manifest runs what was hashed, for this launch config, and nothing that the host says.

    Gramine takes much more than this; whoever wants it builds another enclave, which no policy of ours names.
    Raises: NotTrusted with everything that is weak; WrongUse for text that is no manifest.
    """
    parsed = parse_manifest(manifest)
    check_manifest(parsed)
    weak = tuple(_weaknesses(parsed, launch))
    if weak:
        raise NotTrusted(
            f"This manifest makes a weak enclave: {'; '.join(weak)}.",
            step="manifest",
            hint="`cloister image gramine` writes one that is not.",
        )


def _weaknesses(manifest: Mapping[str, Any], launch: bytes) -> Iterator[str]:
    loader, libos, sgx, fs, system = (manifest.get(name, {}) for name in ("loader", "libos", "sgx", "fs", "sys"))
    yield from (f"{name} is set" for name in sorted(_settings(manifest)) if "insecure__" in name or "debug__" in name)
    if sgx.get("debug", False) is not False:
        yield "sgx.debug is on"
    if sgx.get("remote_attestation") != "dcap":
        yield 'sgx.remote_attestation is not "dcap"'
    if sgx.get("file_check_policy", "strict") != "strict":
        yield "sgx.file_check_policy is not strict"
    yield from (
        f"{name} is set" for name in ("allowed_files", "enable_stats", "profile", "vtune_profile") if sgx.get(name)
    )
    if not loader.get("argv"):
        yield "loader.argv is not fixed"
    elif tuple(loader["argv"]) != ARGV:
        yield "loader.argv is not that of the isolated interpreter (-I)"
    yield from (f"loader.{name} is set" for name in ("argv_src_file", "env_src_file") if name in loader)
    if loader.get("log_level", "error") not in ("error", "none") or "log_file" in loader:
        yield "Gramine's log says more than errors"
    passed = [
        name for name, value in loader.get("env", {}).items() if isinstance(value, dict) and "passthrough" in value
    ]
    yield from (f"loader.env.{name} is the host's" for name in passed)
    yield from _weak_mounts(fs)
    if system.get("allowed_ioctls") or system.get("disallow_subprocesses") is not True:
        yield "sys lets devices or other processes in"
    given = ("enable_extra_runtime_domain_names_conf", "enable_sigterm_injection")
    yield from (f"sys.{name} lets the host in" for name in given if system.get(name))
    if libos.get("check_invalid_pointers") is False:
        yield "libos.check_invalid_pointers is off"
    if {"uri": _uri(LAUNCH), "sha256": hashlib.sha256(launch).hexdigest()} not in sgx.get("trusted_files", []):
        yield "the launch config is not a trusted file"


def _weak_mounts(fs: Mapping[str, Any]) -> Iterator[str]:
    mounts = [*fs.get("mounts", []), fs.get("root", {})]
    kinds = {mount.get("type", "chroot") for mount in mounts}
    yield from (f"a mount is {kind}" for kind in sorted(kinds - {"chroot", "tmpfs"}))
    if any(mount.get("uri", "").startswith("dev:") for mount in mounts):
        yield "a mount is a device of the host's"
    paths = {mount["path"] for mount in fs.get("mounts", [])}
    yield from (f"a mount lies over {ascii(path)[1:-1]}" for path in sorted(paths - {_RUNTIME, _SCRATCH}))


def _settings(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
