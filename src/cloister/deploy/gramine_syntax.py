"""What Gramine 1.9 takes for a manifest, by its documentation ("Manifest syntax"): which settings there are, of what kind.

Gramine's own tools check the same when they sign. This is for machines without them: a manifest that is written here
shall not turn out to be none there.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from cloister.errors import WrongUse

__all__ = ["check_manifest", "parse_manifest"]

Shape: TypeAlias = Any
"""A type; a compiled pattern for text; a frozenset of words; [shape] for a list; (shape, …) for either; a table as
{name: shape}, where a name that ends in "!" must be there, and "*" stands for any other."""

_SIZE = re.compile(r"(0x[0-9a-fA-F]+|[0-9]+)[KMG]?")
_URI = re.compile(r"(file|dev):[^\0]+")
_FILE = re.compile(r"file:[^\0]+")
_PATH = re.compile(r"/[^\0]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MASK64, _MASK32 = re.compile(r"0x[0-9a-fA-F]{1,16}"), re.compile(r"0x[0-9a-fA-F]{1,8}")
_KEY = re.compile(r"[0-9a-fA-F]{32}")
_OPTIONAL_FEATURE = frozenset({"unspecified", "disabled", "required"})
_HARDENING_FEATURE = frozenset({"disabled", "required"})

_KINDS = {str: "text", int: "a number", bool: "true or false"}

_MOUNTED: tuple[dict[str, Shape], ...] = (
    {"type": frozenset({"chroot"}), "uri!": _URI},
    {"type!": frozenset({"encrypted"}), "uri!": _FILE, "key_name": str},
    {"type!": frozenset({"tmpfs"}), "uri": str},
    {"type!": frozenset({"untrusted_shm"}), "uri!": _URI},
)

_MANIFEST: Mapping[str, Shape] = {
    "loader!": {
        "entrypoint!": {"uri!": _FILE, "sha256": _SHA256},
        "argv": [str],
        "argv_src_file": _FILE,
        "env": {"*": (str, {"value!": str}, {"passthrough!": frozenset({True})})},
        "env_src_file": _FILE,
        "uid": int,
        "gid": int,
        "log_level": frozenset({"none", "error", "warning", "debug", "trace", "all"}),
        "log_file": str,
        "insecure__use_cmdline_argv": bool,
        "insecure__use_host_env": bool,
        "insecure__disable_aslr": bool,
    },
    "libos!": {"entrypoint!": str, "check_invalid_pointers": bool},
    "fs!": {
        "root": _MOUNTED,
        "mounts!": [tuple({**kind, "path!": _PATH} for kind in _MOUNTED)],
        "start_dir": str,
        "insecure__keys": {"*": _KEY},
    },
    "sys": {
        "stack": {"size": _SIZE},
        "brk": {"max_size": _SIZE},
        "fds": {"limit": int},
        "allowed_ioctls": [{"request_code!": int, "struct": str}],
        "ioctl_structs": {"*": object},
        "disallow_subprocesses": bool,
        "enable_extra_runtime_domain_names_conf": bool,
        "enable_sigterm_injection": bool,
        "experimental__enable_flock": bool,
        "insecure__allow_eventfd": bool,
        "debug__mock_syscalls": [{"name!": str, "return": int}],
    },
    "sgx": {
        "debug": bool,
        "remote_attestation": frozenset({"none", "dcap", "epid"}),
        "ra_client_spid": str,
        "ra_client_linkable": bool,
        "enclave_size": _SIZE,
        "edmm_enable": bool,
        "preheat_enclave": bool,
        "max_threads": int,
        "isvprodid": int,
        "isvsvn": int,
        "cpu_features": {
            **dict.fromkeys(("avx", "avx512", "amx"), _OPTIONAL_FEATURE),
            **dict.fromkeys(("mpx", "pkru"), _HARDENING_FEATURE),
        },
        "use_exinfo": bool,
        "seal_key": {"flags_mask": _MASK64, "xfrm_mask": _MASK64, "misc_mask": _MASK32},
        "allowed_files": [_URI],
        "trusted_files": [(_FILE, {"uri!": _FILE, "sha256": _SHA256})],
        "trusted_files_cache_size": _SIZE,
        "file_check_policy": frozenset({"strict", "allow_all_but_log"}),
        "enable_stats": bool,
        "vtune_profile": bool,
        "profile": {
            "enable": frozenset({"none", "main", "all"}),
            "mode": frozenset({"aex", "ocall_inner", "ocall_outer"}),
            "with_stack": bool,
            "frequency": int,
        },
        "insecure__rpc_thread_num": int,
        "insecure__allow_memfaults_without_exinfo": bool,
    },
}


def parse_manifest(text: str) -> dict[str, Any]:
    """Raises: WrongUse for what is no TOML."""
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise WrongUse(f"The manifest is not TOML: {ascii(str(error))[1:-1][:200]}.", step="manifest") from error


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Whether Gramine would know every setting, and take its value. Raises: WrongUse with everything it would not."""
    wrong = list(_mismatches(_MANIFEST, manifest, "")) or list(_contradictions(manifest))
    if wrong:
        raise WrongUse(f"Gramine would not take this manifest: {'; '.join(wrong)}.", step="manifest")


def _contradictions(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Between settings that are each well formed."""
    sgx = manifest.get("sgx", {})
    if sgx.get("edmm_enable") and sgx.get("preheat_enclave"):
        yield "sgx.preheat_enclave cannot be with sgx.edmm_enable"
    sources = {"argv", "argv_src_file", "insecure__use_cmdline_argv"} & manifest["loader"].keys()
    if len(sources) > 1:
        yield f"loader has both {' and '.join(sorted(sources))}"


def _mismatches(shape: Shape, value: object, where: str) -> Iterator[str]:
    match shape:
        case dict():
            yield from _table_mismatches(shape, value, where)
        case [inner] if isinstance(shape, list):
            if isinstance(value, list):
                for at, one in enumerate(value):
                    yield from _mismatches(inner, one, f"{where}[{at}]")
            else:
                yield f"{where} is no list"
        case tuple():
            if all(any(True for _ in _mismatches(one, value, where)) for one in shape):
                yield f"{where} is none of what it may be"
        case _ if not _is_one(shape, value):
            words = ", ".join(sorted(map(str, shape))) if isinstance(shape, frozenset) else ""
            yield f"{where} is not {words or _KINDS.get(shape, 'written as it must be')}"


def _is_one(shape: Shape, value: object) -> bool:
    """Of the shapes without parts."""
    if isinstance(shape, frozenset):
        return isinstance(value, str | bool) and value in shape
    if isinstance(shape, re.Pattern):
        return isinstance(value, str) and shape.fullmatch(value) is not None
    if shape is int:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return isinstance(value, shape)


def _table_mismatches(shape: Mapping[str, Shape], value: object, where: str) -> Iterator[str]:
    if not isinstance(value, Mapping):
        yield f"{where} is no table"
        return
    prefix = f"{where}." if where else ""
    known = {name.removesuffix("!"): inner for name, inner in shape.items()}
    yield from (f"{prefix}{name[:-1]} is missing" for name in shape if name.endswith("!") and name[:-1] not in value)
    for name, one in value.items():
        if name in known:
            yield from _mismatches(known[name], one, f"{prefix}{name}")
        elif "*" in known:
            yield from _mismatches(known["*"], one, f"{prefix}{name}")
        else:
            yield f"{prefix}{ascii(name)[1:-1][:60]} is unknown"
