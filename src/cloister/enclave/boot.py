"""What the untrusted host hands to an enclave at start, and what of it changes trust.

`EnclaveConfig` changes trust: its exact bytes are hashed into the launch config, so a client sees them through the
hardware. Everything else in `Boot` (ports, paths, key hashes) is the host's business: the enclave checks what it loads
against the launch config, wherever it came from.
"""

import base64
import binascii
import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_args

from cloister.errors import WrongUse

__all__ = ["Boot", "EnclaveConfig", "EngineMode", "KeyHash", "KvType", "parse_boot", "parse_config"]

T = TypeVar("T")
EngineMode: TypeAlias = Literal["process", "thread"]
KvType: TypeAlias = Literal["f16", "q8_0"]


@dataclass(frozen=True, slots=True)
class EnclaveConfig:
    """One frozen value per enclave; `encode()` is what `config_sha256` is the hash of.

    `context_length`: tokens per conversation, None = the model's own. `slots`: streams in one decode batch.
    `max_waiting`: requests that may wait for a slot. `engine`: a child process, or a thread where a child would be
    another enclave (SGX). `kv_type`: how the engine's cache keeps numbers. `ehbp`: EHBP is spoken too, on a key of its
    own. `plaintext`: the API is answered unsealed too, on this machine's loopback. `tls`: a second listener ends TLS in here,
    for tools that speak nothing else. `upstream`: the server on loopback that
    runs the model, in its one spelling; None: our own engine does. `group_policy`: the policy (TOML) by which replicas let each
    other into the group that shares its keys; None: each has its own. `api_keys` and `padding` off, and `ehbp`, `plaintext`,
    `tls` and `upstream` on, are named in the statement's `insecure`.
    """

    platform: str
    api_keys: bool = True
    padding: bool = True
    ehbp: bool = False
    plaintext: bool = False
    tls: bool = False
    context_length: int | None = None
    slots: int = 16
    max_waiting: int = 64
    engine: EngineMode = "process"
    kv_type: KvType = "f16"
    upstream: str | None = None
    group_policy: str | None = None
    v: int = 1

    def encode(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()

    def digest(self) -> bytes:
        return hashlib.sha256(self.encode()).digest()

    @property
    def insecure(self) -> tuple[str, ...]:
        weakened = {
            "api-keys-off": not self.api_keys,
            "padding-off": not self.padding,
            "ehbp": self.ehbp,
            "plaintext": self.plaintext,
            "tls": self.tls,
            "upstream": self.upstream is not None,
        }
        return tuple(name for name, is_so in weakened.items() if is_so)


@dataclass(frozen=True, slots=True)
class KeyHash:
    """An API key as it rests: a name for the operator, and the key's SHA-256 in hex."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Boot:
    """`listen_fd`: a bound, listening TCP socket. `device_fd`: the platform's device where it is a descriptor.
    `endorsements_path`: a file with the vendor's collateral for clients, read anew for every document; "" for none.
    With an upstream `model_path` and `engine_dir` are "", and `tokenizer_path` is the model's folder, or "" too.
    `bundle_path`: an owner's sealed app, for which the enclave waits until its owner releases it, and then `model_path` is
    ""; itself "" for the built-in app with a model from `model_path`. `tls_fd`: another such socket, where the configuration
    says `tls`, and `tls_origins` are the addresses that clients know it by ("https://name:port"). `founds_group`: where the configuration has a group's policy,
    this start begins the group; otherwise a member must let it in."""

    launch: bytes
    config: bytes
    listen_fd: int
    model_path: str
    model_name: str
    engine_dir: str
    device_fd: int | None = None
    api_keys: tuple[KeyHash, ...] = ()
    endorsements_path: str = ""
    tokenizer_path: str = ""
    bundle_path: str = ""
    tls_fd: int | None = None
    tls_origins: tuple[str, ...] = ()
    founds_group: bool = False

    def encode(self) -> bytes:
        """One line of JSON, as it is written to the enclave's standard input."""
        raw = asdict(self)
        raw["launch"] = base64.b64encode(self.launch).decode()
        raw["config"] = base64.b64encode(self.config).decode()
        return json.dumps(raw).encode() + b"\n"


def _load(data: bytes, kind: type[T], what: str) -> dict[str, Any]:
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WrongUse(f"The {what} is not JSON.", hint="Start enclaves with `cloister serve`.") from error
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(raw, dict) or not set(raw) <= known:
        raise WrongUse(f"The {what} has unknown fields.", hint="Host and enclave must be the same release of cloister.")
    return cast("dict[str, Any]", raw)


def _is(value: object, kind: type, low: int = 0, high: int = 1 << 24) -> bool:
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    return isinstance(value, kind)


def parse_config(data: bytes) -> EnclaveConfig:
    """Raises WrongUse for anything that is not exactly a config of this version."""
    raw = _load(data, EnclaveConfig, "enclave's config")
    context = raw.get("context_length")
    good = (
        _is(raw.get("v"), int, 1, 1)
        and _is(raw.get("platform"), str)
        and _is(raw.get("api_keys"), bool)
        and _is(raw.get("padding"), bool)
        and _is(raw.get("ehbp"), bool)
        and _is(raw.get("plaintext"), bool)
        and _is(raw.get("tls"), bool)
        and (context is None or _is(context, int, 64))
        and _is(raw.get("slots"), int, 1, 64)
        and _is(raw.get("max_waiting"), int, 0, 65536)
        and raw.get("engine") in get_args(EngineMode)
        and raw.get("kv_type") in get_args(KvType)
        and (raw.get("upstream") is None or _is(raw.get("upstream"), str))
        and (raw.get("group_policy") is None or _is(raw.get("group_policy"), str))
    )
    if not good:
        raise WrongUse("The enclave's config has a field of the wrong kind or size.")
    config = EnclaveConfig(**raw)
    if config.encode() != data:  # a field twice, say: whoever reads the bytes must read what the enclave read
        raise WrongUse("The enclave's config is not in its one spelling.", hint="Start enclaves with `cloister serve`.")
    return config


def parse_boot(line: bytes) -> Boot:
    """Raises WrongUse. Paths and descriptors are checked where they are used."""
    raw = _load(line, Boot, "boot message")
    try:
        launch = base64.b64decode(raw["launch"], validate=True)
        config = base64.b64decode(raw["config"], validate=True)
        keys = tuple(KeyHash(str(key["name"]), str(key["sha256"])) for key in raw["api_keys"])
        device, tls = raw["device_fd"], raw["tls_fd"]
        return Boot(
            launch=launch,
            config=config,
            listen_fd=int(raw["listen_fd"]),
            model_path=str(raw["model_path"]),
            model_name=str(raw["model_name"]),
            engine_dir=str(raw["engine_dir"]),
            device_fd=None if device is None else int(device),
            api_keys=keys,
            endorsements_path=str(raw["endorsements_path"]),
            tokenizer_path=str(raw["tokenizer_path"]),
            bundle_path=str(raw["bundle_path"]),
            tls_fd=None if tls is None else int(tls),
            tls_origins=tuple(str(origin) for origin in raw["tls_origins"]),
            founds_group=raw["founds_group"] is True,
        )
    except (KeyError, TypeError, ValueError, OverflowError, binascii.Error) as error:
        raise WrongUse("The boot message lacks a field or has one of the wrong kind.") from error
