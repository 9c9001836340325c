"""A policy as a file: read with the signatures that it must carry, named by a fingerprint, written, and signed.

```
fingerprint = SHA-256("cloister/policy/fingerprint/v1\\0" || canonical JSON of what the policy says, without `trust`)
FILE.sig    = JSON {"key": "ed25519:…", "signature": base64url of Ed25519 over "cloister/policy/v1\\0" || FILE's bytes}
```

A fingerprint is about the content: comments, order and layout do not count, and the simulator's root counts with its
bytes. A signature is about FILE's exact bytes, and does not cover the simulator's root, which lies in another file.
"""

import dataclasses
import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from cloister.errors import MalformedPolicy, NotTrusted, WrongUse
from cloister.evidence.launch import NO_LOGS, OWNER_KEY
from cloister.evidence.strict_json import Fields, b64url, load_object
from cloister.private_file import refuse_shared
from cloister.verify import Policy, parse_policy
from cloister.verify.provenance import public_key

__all__ = [
    "canonical",
    "fingerprint",
    "grouped",
    "key_name",
    "load_policy",
    "read_file",
    "read_key",
    "signature_file",
    "signature_of",
    "signed_by",
    "to_toml",
    "write_file",
]

_MOST_BYTES = 1 << 20
_SIGNED = b"cloister/policy/v1\0"
_NAMED = b"cloister/policy/fingerprint/v1\0"
_UNSIGNED = "`cloister policy sign FILE --key OWNER.pem` makes FILE.sig; the person whom the settings name has to."


def read_file(path: Path) -> bytes:
    """At most one byte over 1 MiB, which whoever parses it refuses. Raises: WrongUse."""
    try:
        with path.open("rb") as file:
            return file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise WrongUse(f"{path} cannot be read: {error.strerror}.") from error


def write_file(path: Path, text: str) -> None:
    """Whole or not at all. Raises: WrongUse."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise WrongUse(f"{path} cannot be written: {error.strerror}.") from error


def load_policy(path: Path, signers: Iterable[str] = ()) -> Policy:
    """The policy in a file, which each of `signers` ("ed25519:…") must have signed.

    Raises: MalformedPolicy; NotTrusted for a signature that is missing, another's, or of other bytes; WrongUse.
    """
    data = read_file(path)
    for signer in signers:
        _demand(path, data, signer)
    return parse_policy(data, read=lambda name: read_file(path.parent / name))


# Fingerprints


def canonical(policy: Policy) -> dict[str, Any]:
    """What the policy says, as plain data without `trust` and without what it leaves at its default."""
    plain = _plain_fields(policy)
    plain.pop("trust", None)
    return plain


def _plain_fields(value: Any) -> dict[str, Any]:
    default = type(value)()
    names = [field.name for field in dataclasses.fields(value)]
    pairs = [(name, getattr(value, name)) for name in names]
    return {name: _plain(one) for name, one in pairs if one != getattr(default, name)}


def _plain(value: Any) -> Any:
    """Lists and sets are alternatives, whose order says nothing."""
    if dataclasses.is_dataclass(value):
        return _plain_fields(value)
    if isinstance(value, bytes):
        return f"sha256:{hashlib.sha256(value).hexdigest()}"
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in sorted(value.items())}
    if isinstance(value, tuple | list | frozenset):
        return sorted((_plain(one) for one in value), key=_json)
    return value


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def fingerprint(policy: Policy) -> str:
    """64 lower-case hexadecimal digits."""
    return hashlib.sha256(_NAMED + _json(canonical(policy)).encode("ascii")).hexdigest()


def grouped(digits: str) -> str:
    """Four by four, to be read out and compared."""
    return " ".join(digits[at : at + 4] for at in range(0, len(digits), 4))


# Signatures


def signature_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sig")


def read_key(path: Path) -> Ed25519PrivateKey:
    """An owner's private key (PEM, PKCS #8, without a password), which nobody else may read. Raises: WrongUse."""
    data = read_file(path)
    refuse_shared(path)
    try:
        key = load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        hint = "`openssl genpkey -algorithm ed25519 -out owner.pem` makes one; `cloister serve` has made its own."
        raise WrongUse(f"{path} does not hold an Ed25519 private key.", hint=hint)
    return key


def key_name(key: Ed25519PrivateKey) -> str:
    """`ed25519:` and the public half in base64url."""
    return "ed25519:" + b64url(key.public_key().public_bytes_raw())


def signature_of(data: bytes, key: Ed25519PrivateKey) -> str:
    """The content of FILE.sig for FILE's bytes."""
    return json.dumps({"key": key_name(key), "signature": b64url(key.sign(_SIGNED + data))}, indent=1) + "\n"


def signed_by(path: Path, data: bytes) -> str:
    """Who signed these bytes of `path`, by the signature beside it; "" when there is none.

    Raises: NotTrusted for a signature of other bytes; MalformedPolicy for a file that is none; WrongUse.
    """
    beside = signature_file(path)
    if not beside.exists():
        return ""
    fields = Fields(_load(beside), what="signature", error=MalformedPolicy)
    key = fields.matching("key", OWNER_KEY, "ed25519: and 43 characters of base64url")
    signature = fields.binary("signature", low=64, high=64)
    fields.end()
    try:
        public_key(key).verify(signature, _SIGNED + data)
    except (InvalidSignature, ValueError) as error:
        hint = "The policy was changed after it was signed, or the signature belongs to another file."
        raise NotTrusted(f"{beside} does not fit {path}.", hint=hint, step="policy.signature") from error
    return key


def _load(path: Path) -> dict[str, Any]:
    return load_object(read_file(path), max_bytes=4096, what=path.name)


def _demand(path: Path, data: bytes, signer: str) -> None:
    got = signed_by(path, data)
    if got != signer:
        raise NotTrusted(
            f"{path} is not signed by whom it must be signed by.",
            hint=_UNSIGNED,
            step="policy.signature",
            expected=signer,
            got=got or "no signature",
        )


# Writing


def to_toml(policy: Policy, *, comment: str, root: Path | None = None) -> str:
    """A policy file that says what `policy` says. `root`: where its simulator's root lies."""
    head: dict[str, Any] = {
        "version": 1,
        "trust": policy.trust,
        "deployment": policy.deployment,
        "owner_key": policy.owner_key,
        "broker_key": policy.broker_key,
        "models": _digests(policy.models),
        "config": None if policy.config is None else f"sha256:{policy.config}",
        "app": None if policy.app is None else f"sha256:{policy.app}",
        "logs": None if policy.logs == NO_LOGS else policy.logs,
        "platforms": policy.platforms,
        "require_pq": policy.require_pq or None,
        "measurements_signer": policy.measurements_signer,
        "dangerously_trust_simulator": None if policy.simulator_root is None else str(root),
        "dangerously_tolerate_insecure": sorted(policy.tolerate_insecure) or None,
    }
    tables: dict[str, Mapping[str, Any]] = {
        "measurements": policy.measurements,
        "sigstore": policy.sigstore or {},
        "tcb": _plain_fields(policy.tcb),
        "limits": _plain_fields(policy.limits),
    }
    lines = [f"# {comment}", *_assignments(head)]
    for name, table in tables.items():
        if table:
            lines += ["", f"[{name}]", *_assignments(table)]
    return "\n".join(lines) + "\n"


def _digests(values: frozenset[str] | None) -> list[str] | None:
    return None if values is None else [f"sha256:{value}" for value in sorted(values)]


def _assignments(table: Mapping[str, Any]) -> list[str]:
    return [f"{name} = {_toml(value)}" for name, value in table.items() if value is not None]


def _toml(value: Any) -> str:
    """Of texts without control characters, numbers, lists and tables: JSON's strings are TOML's."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(_assignments(value)) + " }"
    if isinstance(value, tuple | list):
        if value and isinstance(value[0], Mapping):
            return "[\n" + "".join(f"    {_toml(one)},\n" for one in value) + "]"
        return "[" + ", ".join(_toml(one) for one in value) + "]"
    return json.dumps(value, ensure_ascii=False)
