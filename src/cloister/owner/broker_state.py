"""What a broker keeps: one root secret, from which its keys are derived, and a sealed record for each deployment.

    key    = HKDF-SHA256(root (32 bytes), no salt, "cloister/broker/v1" || 00 || purpose, 32)
             purpose: "sign" (an Ed25519 seed; the public half is the launch config's broker_key) or "records"
    record = nonce (12) || AES-256-GCM(records key, nonce, deployment, content)

`root` may lie elsewhere than the rest (a memory-only mount, another disk): a copy of the records is worth nothing without it.
Every file is its user's alone, and written whole or not at all.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister import private_file
from cloister.channel.hpke import Entropy
from cloister.channel.release import MAX_RELEASE, ApiKeyHash, Release, parse_release
from cloister.errors import MalformedEvidence, NotFound, NotTrusted, WrongUse
from cloister.evidence.strict_json import Fields, b64url, from_b64url, load_object
from cloister.owner.deployment import owner_name

__all__ = ["BrokerKeys", "Record", "Records", "make_root", "read_root"]

_ROOT = 32
_NONCE = 12
_LABEL = b"cloister/broker/v1\0"
_DEPLOYMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class BrokerKeys:
    """All derived from the root secret. `name`: the public half of `signing`, as it stands in a launch config."""

    signing: Ed25519PrivateKey = field(repr=False)
    records: bytes = field(repr=False)

    @classmethod
    def derive(cls, root: bytes) -> "BrokerKeys":
        return cls(Ed25519PrivateKey.from_private_bytes(_derive(root, "sign")), _derive(root, "records"))

    @property
    def name(self) -> str:
        return owner_name(self.signing)


def _derive(root: bytes, purpose: str) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=_LABEL + purpose.encode()).derive(root)


def make_root(path: Path, *, entropy: Entropy = os.urandom) -> bytes:
    """A fresh one, unless one is there: then that. Raises: OSError; WrongUse."""
    private_file.write_once(path, b64url(entropy(_ROOT)).encode() + b"\n")
    return read_root(path)


def read_root(path: Path) -> bytes:
    """Raises: WrongUse when there is none, it is none, or others can reach it."""
    try:
        private_file.refuse_shared(path, step="root")
        root = from_b64url(path.read_text(encoding="ascii").removesuffix("\n"), what="root")
    except FileNotFoundError as error:
        hint = "`cloister broker init` makes it."
        raise WrongUse("There is no broker here.", step="root", hint=hint) from error
    except (OSError, UnicodeDecodeError, MalformedEvidence) as error:
        raise WrongUse(f"{path} holds no root secret.", step="root", hint="Bring it back from a copy.") from error
    if len(root) != _ROOT:
        raise WrongUse(f"{path} holds no root secret.", step="root", hint="Bring it back from a copy.")
    return root


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What may be released for a deployment. `app`: the SHA-256 (hex) of the manifest that the keys belong to. `expires`: Unix
    seconds after which no enclave serves it; None: when the owner revokes it. `revoked`: nothing is, and nothing is kept."""

    deployment: str
    app: str
    keys: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    settings: Mapping[str, str] = field(default_factory=dict, repr=False)
    api_keys: tuple[ApiKeyHash, ...] = field(default=(), repr=False)
    expires: int | None = None
    revoked: bool = False

    def release(self, now: float) -> Release:
        return Release(
            time_floor=int(now),
            keys=self.keys,
            secrets=self.secrets,
            settings=self.settings,
            api_keys=self.api_keys,
            expires=self.expires,
        )

    def encode(self) -> bytes:
        members = {"v": 1, "app": self.app, "revoked": self.revoked, "release": b64url(self.release(0).encode())}
        return json.dumps(members, separators=(",", ":")).encode()


def _parse_record(data: bytes, deployment: str) -> Record:
    fields = Fields(load_object(data, max_bytes=2 * MAX_RELEASE, what="record"), what="record")
    fields.integer("v", low=1, high=1)
    app, revoked = fields.sha256("app"), fields.boolean("revoked")
    release = parse_release(fields.binary("release", low=1, high=MAX_RELEASE))
    fields.end()
    return Record(
        deployment=deployment,
        app=app,
        revoked=revoked,
        keys=release.keys,
        secrets=release.secrets,
        settings=release.settings,
        api_keys=release.api_keys,
        expires=release.expires,
    )


class Records:
    """One file for each deployment, sealed."""

    def __init__(self, folder: Path, key: bytes, *, entropy: Entropy = os.urandom) -> None:
        self._folder = folder
        self._key = key
        self._entropy = entropy

    def check(self, record: Record) -> None:
        """Whether it can be kept. Raises: WrongUse."""
        self._path(record.deployment)
        if len(record.encode()) > MAX_RELEASE:
            raise WrongUse("A release has at most 1 MiB.", step="record")

    def save(self, record: Record) -> None:
        """In the place of what was there for that deployment. Raises: WrongUse."""
        self.check(record)
        nonce = self._entropy(_NONCE)
        sealed = AESGCM(self._key).encrypt(nonce, record.encode(), record.deployment.encode())
        path = self._path(record.deployment)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            private_file.write(path, nonce + sealed)
        except OSError as error:
            raise WrongUse(f"{path} cannot be written.", step="record", got=error.strerror) from error

    def load(self, deployment: str) -> Record:
        """Raises: NotFound for a deployment that was not handed over; NotTrusted for a record that does not open; WrongUse."""
        path = self._path(deployment)
        try:
            private_file.refuse_shared(path, step="record")
            content = path.read_bytes()
        except FileNotFoundError as error:
            hint = f"cloister broker add {deployment}"
            raise NotFound("This deployment was not handed to the broker.", step="record", hint=hint) from error
        except OSError as error:
            raise WrongUse(f"{path} cannot be read.", step="record", got=error.strerror) from error
        try:
            data = AESGCM(self._key).decrypt(content[:_NONCE], content[_NONCE:], deployment.encode())
            return _parse_record(data, deployment)
        except (InvalidTag, ValueError, MalformedEvidence) as error:
            hint = "It was changed, is another deployment's, or another broker's. Hand it over again."
            raise NotTrusted("The record of this deployment does not open.", step="record", hint=hint) from error

    def _path(self, deployment: str) -> Path:
        if not _DEPLOYMENT.fullmatch(deployment):
            expected = "1 to 63 letters, digits, dots, dashes"
            raise WrongUse("That is no deployment's name.", step="deployment", expected=expected)
        return self._folder / f"{deployment}.record"
