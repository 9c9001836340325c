"""Receipts as answers leave: asked for inside the channel, made of exactly what the client gets, delivered with it."""

import hashlib
from collections.abc import Callable

from cloister.channel.padding import event_padding
from cloister.enclave.gateway import inner
from cloister.evidence.receipt import COMMENT, Receipt, salted
from cloister.evidence.strict_json import b64url

__all__ = ["ASKED", "PendingReceipt", "asked_for"]

ASKED = b"cloister-receipt"
"""The inner header that asks for one: the SHA-256 (hex) of the statement that the client verified."""

_BLOCK_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")


def asked_for(headers: inner.Fields) -> str | None:
    """The statement that a request's receipt shall name; None where none is asked for, or two are."""
    values = [value for name, value in headers if name == ASKED]
    return values[0].decode("latin-1") if len(values) == 1 else None


class PendingReceipt:
    """The receipt of one answer, which is told every byte of its content. `salt` has 32 random bytes."""

    def __init__(
        self, request: bytes, salt: bytes, *, statement_sha256: str, models: tuple[str, ...], iat: int,
        sign: Callable[[bytes], bytes],
    ) -> None:  # fmt: skip
        self._request = salted(salt, request)
        self._salt = salt
        self._statement = statement_sha256
        self._models = models
        self._iat = iat
        self._sign = sign
        self._response = hashlib.sha256(salt)
        self._tail = b""

    def add(self, content: bytes) -> None:
        self._response.update(content)
        self._tail = (self._tail + content)[-4:]

    def trailers(self) -> inner.Fields:
        """After all of the content."""
        jws, salt = self._delivered()
        return [(ASKED, jws), (ASKED + b"-salt", salt)]

    def comment(self, *, pad: bool) -> bytes:
        """The same as the last block of an event stream; b"" for one that ends inside of an event."""
        if not self._tail.endswith(_BLOCK_ENDS):
            return b""
        block = COMMENT + b" ".join(self._delivered()) + b"\n\n"
        return block + event_padding(len(block)) if pad else block

    def _delivered(self) -> tuple[bytes, bytes]:
        receipt = Receipt(self._request, self._response.hexdigest(), self._models, self._statement, self._iat)
        return receipt.sign(self._sign).encode(), b64url(self._salt).encode()
