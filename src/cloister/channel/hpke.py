"""Hybrid public key encryption, base mode (RFC 9180): one sealed sequence of messages from a sender to a key's holder.

KEMs: 0x0020 DHKEM(X25519, HKDF-SHA256) and 0x647A X-Wing (draft-connolly-cfrg-xwing-kem). KDF: 0x0001 HKDF-SHA256.
AEADs: 0x0001 AES-128-GCM, 0x0002 AES-256-GCM, 0x0003 ChaCha20Poly1305.

Base mode says nothing about who the sender is. Whatever fails to open fails with the same words.
"""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from cloister.errors import ChannelBroken, MalformedMessage

__all__ = [
    "AEADS",
    "AEAD_AES_128_GCM",
    "AEAD_AES_256_GCM",
    "AEAD_CHACHA20_POLY1305",
    "KDF_HKDF_SHA256",
    "KEMS",
    "KEM_X25519",
    "KEM_XWING",
    "TAG_LENGTH",
    "Aead",
    "AeadSequence",
    "Context",
    "Entropy",
    "PrivateKey",
    "X25519Key",
    "XWingKey",
    "broken",
    "expand",
    "extract",
    "generate",
    "setup_receiver",
    "setup_sender",
]

KEM_X25519 = 0x0020
KEM_XWING = 0x647A
KDF_HKDF_SHA256 = 0x0001
AEAD_AES_128_GCM = 0x0001
AEAD_AES_256_GCM = 0x0002
AEAD_CHACHA20_POLY1305 = 0x0003
TAG_LENGTH = 16

Entropy = Callable[[int], bytes]
"""`os.urandom`, or in tests a fixed sequence. The X-Wing sender's ML-KEM half draws from the library by itself."""

_XWING_LABEL = rb"\.//^" + b"\\"
_MLKEM_PUBLIC = 1184
_MLKEM_CIPHERTEXT = 1088


class Cipher(Protocol):
    def encrypt(self, nonce: bytes, data: bytes, associated_data: bytes, /) -> bytes: ...
    def decrypt(self, nonce: bytes, data: bytes, associated_data: bytes, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Aead:
    """`key_length` is Nk; Nn is 12 for all (RFC 9180, section 7.3)."""

    key_length: int
    cipher: Callable[[bytes], Cipher]
    nonce_length: int = 12


@dataclass(frozen=True, slots=True)
class Kem:
    """Lengths in bytes of an encapsulated secret (Nenc) and of a public key (Npk)."""

    enc_length: int
    public_length: int


AEADS = {
    AEAD_AES_128_GCM: Aead(16, AESGCM),
    AEAD_AES_256_GCM: Aead(32, AESGCM),
    AEAD_CHACHA20_POLY1305: Aead(32, ChaCha20Poly1305),
}
KEMS = {KEM_X25519: Kem(32, 32), KEM_XWING: Kem(_MLKEM_CIPHERTEXT + 32, _MLKEM_PUBLIC + 32)}


def broken() -> ChannelBroken:
    """The one answer to every cryptographic failure: it must not tell which check failed."""
    return ChannelBroken("The sealed message did not open.", step="channel")


def extract(salt: bytes, key_material: bytes) -> bytes:
    """HKDF-Extract with SHA-256 (RFC 5869)."""
    return HKDF.extract(SHA256(), salt, key_material)


def expand(prk: bytes, info: bytes, length: int) -> bytes:
    """HKDF-Expand with SHA-256 (RFC 5869)."""
    return HKDFExpand(SHA256(), length, info).derive(prk)


def _labeled_extract(suite: bytes, salt: bytes, label: bytes, key_material: bytes) -> bytes:
    return extract(salt, b"HPKE-v1" + suite + label + key_material)


def _labeled_expand(suite: bytes, prk: bytes, label: bytes, info: bytes, length: int) -> bytes:
    return expand(prk, length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info, length)


def _dhkem_secret(dh: bytes, enc: bytes, public: bytes) -> bytes:
    suite = b"KEM" + KEM_X25519.to_bytes(2, "big")
    prk = _labeled_extract(suite, b"", b"eae_prk", dh)
    return _labeled_expand(suite, prk, b"shared_secret", enc + public, 32)


def _xwing_secret(mlkem: bytes, dh: bytes, ephemeral: bytes, public: bytes) -> bytes:
    return hashlib.sha3_256(mlkem + dh + ephemeral + public + _XWING_LABEL).digest()


class PrivateKey(Protocol):
    """A receiver's key: `public` as in a key config; `decapsulate` gives the KEM's shared secret or ChannelBroken."""

    @property
    def kem_id(self) -> int: ...
    @property
    def public(self) -> bytes: ...
    def decapsulate(self, enc: bytes) -> bytes: ...


class X25519Key:
    """DHKEM(X25519, HKDF-SHA256) from a 32-byte private key (RFC 9180, section 4.1)."""

    kem_id = KEM_X25519

    def __init__(self, private: bytes) -> None:
        self._private = X25519PrivateKey.from_private_bytes(private)
        self.public = self._private.public_key().public_bytes_raw()

    def decapsulate(self, enc: bytes) -> bytes:
        try:
            dh = self._private.exchange(X25519PublicKey.from_public_bytes(enc))
        except ValueError:
            raise broken() from None
        return _dhkem_secret(dh, enc, self.public)


class XWingKey:
    """X-Wing from its 32-byte seed, expanded by SHAKE256 (draft-connolly-cfrg-xwing-kem, section 5.2)."""

    kem_id = KEM_XWING

    def __init__(self, seed: bytes) -> None:
        expanded = hashlib.shake_256(seed).digest(96)
        self._mlkem = MLKEM768PrivateKey.from_seed_bytes(expanded[:64])
        self._x25519 = X25519PrivateKey.from_private_bytes(expanded[64:])
        self._x25519_public = self._x25519.public_key().public_bytes_raw()
        self.public = self._mlkem.public_key().public_bytes_raw() + self._x25519_public

    def decapsulate(self, enc: bytes) -> bytes:
        ephemeral = enc[_MLKEM_CIPHERTEXT:]
        try:
            mlkem = self._mlkem.decapsulate(enc[:_MLKEM_CIPHERTEXT])
            dh = self._x25519.exchange(X25519PublicKey.from_public_bytes(ephemeral))
        except ValueError:
            raise broken() from None
        return _xwing_secret(mlkem, dh, ephemeral, self._x25519_public)


def generate(kem_id: int, entropy: Entropy) -> PrivateKey:
    """A fresh key of a KEM in `KEMS`, from 32 bytes of entropy."""
    return XWingKey(entropy(32)) if kem_id == KEM_XWING else X25519Key(entropy(32))


@functools.lru_cache(maxsize=32)
def _x25519_half(public: bytes) -> X25519PublicKey:
    """Of either KEM's key. A session seals to the same key again and again."""
    return X25519PublicKey.from_public_bytes(public[-32:])


@functools.lru_cache(maxsize=32)
def _mlkem_half(public: bytes) -> MLKEM768PublicKey:
    return MLKEM768PublicKey.from_public_bytes(public[:-32])


def _encapsulate(kem_id: int, public: bytes, entropy: Entropy) -> tuple[bytes, bytes]:
    ephemeral = X25519PrivateKey.from_private_bytes(entropy(32))
    enc = ephemeral.public_key().public_bytes_raw()
    dh = ephemeral.exchange(_x25519_half(public))
    if kem_id == KEM_X25519:
        return enc, _dhkem_secret(dh, enc, public)
    mlkem, ciphertext = _mlkem_half(public).encapsulate()
    return ciphertext + enc, _xwing_secret(mlkem, dh, enc, public[-32:])


class AeadSequence:
    """Messages sealed or opened in order under one key, the nonce being a base XOR a counter. Never copied or reused.

    A counter that would not fit 96 bits raises OverflowError; nobody gets there.
    """

    __slots__ = ("_base_nonce", "_cipher", "_counter")

    def __init__(self, aead_id: int, key: bytes, nonce: bytes) -> None:
        self._cipher = AEADS[aead_id].cipher(key)
        self._base_nonce = int.from_bytes(nonce, "big")
        self._counter = 0

    def seal(self, aad: bytes, plaintext: bytes) -> bytes:
        nonce = (self._base_nonce ^ self._counter).to_bytes(12, "big")
        self._counter += 1
        return self._cipher.encrypt(nonce, plaintext, aad)

    def open(self, aad: bytes, sealed: bytes) -> bytes:
        """Raises: ChannelBroken; the counter then stays where it was."""
        nonce = (self._base_nonce ^ self._counter).to_bytes(12, "big")
        try:
            plaintext = self._cipher.decrypt(nonce, sealed, aad)
        except InvalidTag:
            raise broken() from None
        self._counter += 1
        return plaintext


@functools.lru_cache(maxsize=32)
def _schedule(kem_id: int, aead_id: int, info: bytes) -> tuple[bytes, bytes]:
    """The suite's identifier and the key schedule's context: the same for all requests to one key."""
    suite = b"HPKE" + b"".join(number.to_bytes(2, "big") for number in (kem_id, KDF_HKDF_SHA256, aead_id))
    psk_id_hash = _labeled_extract(suite, b"", b"psk_id_hash", b"")
    return suite, b"\0" + psk_id_hash + _labeled_extract(suite, b"", b"info_hash", info)  # mode 0 is base


class Context(AeadSequence):
    """What a setup gives to either end (RFC 9180, section 5.1): a sequence of messages, and exported secrets."""

    __slots__ = ("_exporter_secret", "_suite", "aead_id")

    def __init__(self, kem_id: int, aead_id: int, shared_secret: bytes, info: bytes) -> None:
        suite, schedule = _schedule(kem_id, aead_id, info)
        secret = _labeled_extract(suite, shared_secret, b"secret", b"")
        aead = AEADS[aead_id]
        super().__init__(
            aead_id,
            _labeled_expand(suite, secret, b"key", schedule, aead.key_length),
            _labeled_expand(suite, secret, b"base_nonce", schedule, aead.nonce_length),
        )
        self._exporter_secret = _labeled_expand(suite, secret, b"exp", schedule, 32)
        self._suite = suite
        self.aead_id = aead_id

    def export(self, exporter_context: bytes, length: int) -> bytes:
        """A secret of `length` bytes that only the two ends can derive (RFC 9180, section 5.3)."""
        return _labeled_expand(self._suite, self._exporter_secret, b"sec", exporter_context, length)


def setup_sender(kem_id: int, aead_id: int, public: bytes, info: bytes, *, entropy: Entropy) -> tuple[bytes, Context]:
    """`(enc, context)` to the holder of `public` (RFC 9180, section 5.1.1). KEM and AEAD are known ones.

    Raises: MalformedMessage for a public key that is none.
    """
    try:
        enc, secret = _encapsulate(kem_id, public, entropy)
    except ValueError as error:
        raise MalformedMessage("The receiver's public key is not valid.", step="key config") from error
    return enc, Context(kem_id, aead_id, secret, info)


def setup_receiver(key: PrivateKey, aead_id: int, enc: bytes, info: bytes) -> Context:
    """The other end of `setup_sender`. That it succeeds proves nothing: only an opened message does.

    Raises: ChannelBroken.
    """
    return Context(key.kem_id, aead_id, key.decapsulate(enc), info)
