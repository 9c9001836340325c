"""The release: an app's keys, secrets and settings in one message, sealed to one enclave's single-use key and signed by
the owner, or the owner's broker, whose keys stand in the launch config (PROTOCOL, "Provisioning").

    context   = "cloister/release/v1" || 00 || u8(len purpose) || purpose || u8(len deployment) || deployment
                || launch_sha256 || u64(release) || SHA-256(statement) || nonce
    sealed    = enc || Seal(aad "", contents)            HPKE base mode: X-Wing, HKDF-SHA256, AES-256-GCM; info = context
    signature = Ed25519(owner_key or broker_key, context || SHA-256(sealed))
    message   = signature (64) || nonce (32) || sealed

Both ends make the context from what they know themselves, so a message for another purpose, deployment, launch config,
release, statement or nonce does not verify, and nobody can put another sealed text beside an owner's signature.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cloister.channel.hpke import AEAD_AES_256_GCM, KEM_XWING, KEMS, Entropy, PrivateKey, setup_receiver, setup_sender
from cloister.channel.sections import FILE_KEY
from cloister.errors import ChannelBroken, MalformedEvidence, NotTrusted
from cloister.evidence.bundle import SECRET_NAME, SECTIONS
from cloister.evidence.strict_json import Fields, b64url, from_b64url, load_object

__all__ = [
    "MAX_RELEASE",
    "PROVISION_KEY",
    "ApiKeyHash",
    "Context",
    "Release",
    "nonce_of",
    "open_release",
    "parse_release",
    "seal_release",
]

MAX_RELEASE = 1 << 20
"""Bytes of a message."""

PROVISION_KEY = KEMS[KEM_XWING].public_length
"""Bytes of a provision key: X-Wing and nothing else, so that what is recorded today stays closed."""

_LABEL = b"cloister/release/v1\0"
_SIGNATURE, _NONCE, _DIGEST = 64, 32, 32
_MAX_SECRET = 64 * 1024


@dataclass(frozen=True, slots=True)
class ApiKeyHash:
    """A name for the owner, and the key's SHA-256 in hex."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What is handed over. `keys`: section -> file key (32 bytes). `secrets` and `settings`: name -> text.

    `time_floor`: Unix seconds before which the enclave's clock may not stand. `expires`: when it shall stop serving;
    None: when somebody stops it. Its `repr` tells no value.
    """

    time_floor: int
    keys: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    settings: Mapping[str, str] = field(default_factory=dict, repr=False)
    api_keys: tuple[ApiKeyHash, ...] = field(default=(), repr=False)
    expires: int | None = None

    def encode(self) -> bytes:
        members = {
            "v": 1,
            "time_floor": self.time_floor,
            "expires": self.expires,
            "keys": {name: b64url(key) for name, key in self.keys.items()},
            "secrets": {name: b64url(value.encode()) for name, value in self.secrets.items()},
            "settings": {name: b64url(value.encode()) for name, value in self.settings.items()},
            "api_keys": [{"name": key.name, "sha256": key.sha256} for key in self.api_keys],
        }
        present = {name: value for name, value in members.items() if value is not None}
        return json.dumps(present, separators=(",", ":"), ensure_ascii=False).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a release is for. Digests and `nonce` are 32 raw bytes."""

    deployment: str
    launch_sha256: bytes
    release: int
    statement_sha256: bytes
    nonce: bytes
    purpose: str = "provision"

    def encode(self) -> bytes:
        words = b"".join(bytes([len(word)]) + word for word in (self.purpose.encode(), self.deployment.encode()))
        return (
            _LABEL + words + self.launch_sha256 + self.release.to_bytes(8, "big") + self.statement_sha256 + self.nonce
        )


def seal_release(
    release: Release, context: Context, provision_key: bytes, sign: Callable[[bytes], bytes], *, entropy: Entropy
) -> bytes:
    """The message. `sign` is the owner's Ed25519. Whoever calls this has verified the document that `provision_key` and
    the context's digests are from. Raises: MalformedMessage for a key that is none."""
    info = context.encode()
    enc, sealer = setup_sender(KEM_XWING, AEAD_AES_256_GCM, provision_key, info, entropy=entropy)
    sealed = enc + sealer.seal(b"", release.encode())
    return sign(info + hashlib.sha256(sealed).digest()) + context.nonce + sealed


def nonce_of(message: bytes) -> bytes:
    """The nonce that a message names, 32 bytes; fewer when it is cut. Says nothing about who wrote it."""
    return message[_SIGNATURE : _SIGNATURE + _NONCE]


def open_release(
    message: bytes, context: Context, key: PrivateKey, owner_key: str, broker_key: str | None = None
) -> Release:
    """Both keys as in the launch config: the owner may sign, and the broker that it names, if any. The signature is judged
    first: nothing of a stranger's is opened.

    Raises: NotTrusted when it is neither's word for this context; ChannelBroken when it does not open;
    MalformedEvidence when the owner sealed something else than a release.
    """
    signature, sealed = message[:_SIGNATURE], message[_SIGNATURE + _NONCE :]
    info = context.encode()
    signed = info + hashlib.sha256(sealed).digest()
    if not any(_signed_by(name, signature, signed) for name in (owner_key, broker_key) if name is not None):
        raise NotTrusted(
            "This release is not its owner's for this enclave.",
            step="release",
            hint="Another owner's key, or made for another deployment, launch config, statement or nonce.",
        )
    length = KEMS[KEM_XWING].enc_length
    if len(sealed) < length:
        raise ChannelBroken("The release did not open.", step="release")
    opener = setup_receiver(key, AEAD_AES_256_GCM, sealed[:length], info)
    return parse_release(opener.open(b"", sealed[length:]))


def _signed_by(name: str, signature: bytes, signed: bytes) -> bool:
    public = Ed25519PublicKey.from_public_bytes(from_b64url(name.removeprefix("ed25519:"), what="key"))
    try:
        public.verify(signature, signed)
    except InvalidSignature:
        return False
    return True


def parse_release(data: bytes) -> Release:
    """Raises: MalformedEvidence, without any value."""
    fields = Fields(load_object(data, max_bytes=MAX_RELEASE, what="release"), what="release")
    fields.integer("v", low=1, high=1)
    release = Release(
        time_floor=fields.integer("time_floor"),
        expires=fields.integer("expires") if fields.has("expires") else None,
        keys=_parse_keys(fields.take("keys")),
        secrets=_parse_texts(fields.take("secrets"), "release.secrets"),
        settings=_parse_texts(fields.take("settings"), "release.settings"),
        api_keys=tuple(_parse_api_key(value) for value in fields.items("api_keys", max_items=4096)),
    )
    fields.end()
    return release


def _parse_keys(value: object) -> Mapping[str, bytes]:
    fields = Fields(value, what="release.keys")
    keys = {name: fields.binary(name, low=FILE_KEY, high=FILE_KEY) for name in SECTIONS if fields.has(name)}
    fields.end()
    return keys


def _parse_texts(value: object, what: str) -> Mapping[str, str]:
    fields = Fields(value, what=what)
    found = {}
    for name in fields.names():
        if not SECRET_NAME.fullmatch(name):
            raise MalformedEvidence(f"{what} has a name that no environment takes.", step=what)
        try:
            text = fields.binary(name, low=0, high=_MAX_SECRET).decode()
        except UnicodeDecodeError as error:
            raise MalformedEvidence(f"{what}.{name} is not UTF-8.", step=what) from error
        if "\0" in text:
            raise MalformedEvidence(f"{what}.{name} has a zero byte, which no environment takes.", step=what)
        found[name] = text
    return found


def _parse_api_key(value: object) -> ApiKeyHash:
    fields = Fields(value, what="release.api_keys")
    key = ApiKeyHash(fields.text("name", max_length=64), fields.sha256("sha256"))
    fields.end()
    return key
