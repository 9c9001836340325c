"""A bundle's section as ciphertext: large chunks, each bound to its section, its place and whether it is the last (STREAM).

    key    = HKDF-Expand-SHA256(file key, "cloister/section/v1" || 00 || name, 32)
    nonce  = 7 zero bytes || u32(place) || u8(1 for the last chunk, 0 for any other)
    sealed = AES-256-GCM(key, nonce, "", chunk)        every chunk but the last holds exactly `CHUNK` bytes

A file key is drawn for one section of one bundle and used for nothing else, so no nonce ever comes twice, and a chunk of
another section, of another bundle or from another place does not open.
"""

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloister.channel.hpke import TAG_LENGTH, broken, expand
from cloister.errors import WrongUse
from cloister.evidence.bundle import CHUNK

__all__ = ["CHUNK", "FILE_KEY", "SectionOpener", "SectionSealer"]

FILE_KEY = 32
"""Bytes of a file key."""

_LABEL = b"cloister/section/v1\0"


class _Section:
    """The chunks of one section in their order; `size` bytes of plaintext in all, known before."""

    def __init__(self, file_key: bytes, name: str, size: int) -> None:
        if len(file_key) != FILE_KEY:
            raise WrongUse("A file key has 32 bytes.", step="bundle")
        self._cipher = AESGCM(expand(file_key, _LABEL + name.encode(), 32))
        self._size = size
        self._chunks = max(1, -(-size // CHUNK))
        self._place = 0

    @property
    def ended(self) -> bool:
        """Whether every chunk was there."""
        return self._place == self._chunks

    @property
    def next_length(self) -> int:
        """Bytes of plaintext in the chunk that comes next; 0 when none does, and for the one chunk of nothing."""
        return max(0, min(CHUNK, self._size - self._place * CHUNK))

    def _take(self, length: int) -> bytes:
        """The nonce of a chunk whose plaintext has `length` bytes."""
        if self.ended or length != self.next_length:
            raise broken()
        last = self._place == self._chunks - 1
        nonce = bytes(7) + self._place.to_bytes(4, "big") + bytes([last])
        self._place += 1
        return nonce


class SectionSealer(_Section):
    def seal_into(self, chunk: memoryview, out: memoryview) -> int:
        """Seals the next chunk (`next_length` bytes) into the beginning of `out`; how many bytes were written.

        Raises: ChannelBroken for a chunk of another size, or one too many.
        """
        return self._cipher.encrypt_into(self._take(len(chunk)), chunk, b"", out[: len(chunk) + TAG_LENGTH])


class SectionOpener(_Section):
    @property
    def next_sealed(self) -> int:
        """Bytes of ciphertext of the chunk that comes next; 0 when none does."""
        return 0 if self.ended else self.next_length + TAG_LENGTH

    def open_into(self, sealed: memoryview, out: memoryview) -> int:
        """Opens the next chunk into the beginning of `out`; how many bytes were written.

        Raises: ChannelBroken for a chunk that was changed, cut, moved, or is another section's; nothing of it counts.
        """
        length = len(sealed) - TAG_LENGTH
        try:
            return self._cipher.decrypt_into(self._take(length), sealed, b"", out[:length])
        except InvalidTag:
            raise broken() from None
