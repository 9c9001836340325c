"""EHBP, the encrypted HTTP body protocol (tinfoilsh/encrypted-http-body-protocol, SPEC.md), as its receiver.

    request  = { u32(len) || Seal(aad="", pt) }*    under the context of the header `Ehbp-Encapsulated-Key`
    response = { u32(len) || AEAD(key, nonce XOR i, "", pt) }*    with the nonce of the header `Ehbp-Response-Nonce`

Bodies only are sealed. Method, path, headers and status travel in clear, and anybody on the way can change them; a body
that is cut between two frames opens without an error; its length shows; the key is classical. `ohttp` has none of these.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from cloister.channel.bhttp import Field
from cloister.channel.hpke import AEAD_AES_256_GCM, TAG_LENGTH, AeadSequence, Context, broken, setup_receiver
from cloister.channel.keys import KeyRing, ReceiverKey
from cloister.channel.limits import DEFAULT_LIMITS, Limits
from cloister.channel.ohttp import response_sequence
from cloister.errors import ChannelBroken, CloisterError, KeyUnknown, MalformedMessage, WrongUse

__all__ = ["MAX_FRAME", "FrameReader", "OpenedBody", "RequestOpener", "ResponseSealer", "parse_enc"]

MAX_FRAME = 1 << 20
"""Bytes of one sealed frame at most, its tag included and its length not. EHBP itself sets no limit."""

REQUEST_INFO = b"ehbp request"
RESPONSE_LABEL = b"ehbp response"
NONCE_LENGTH = 32
_PREFIX = 4
_ENC = re.compile(rb"[0-9a-fA-F]{64}")
_SENT_PIECE = 1 << 16  # bytes of plaintext in one frame of a response


def parse_enc(values: Iterable[bytes]) -> bytes:
    """The encapsulated secret (32 bytes) from all values of `Ehbp-Encapsulated-Key`.

    Raises: MalformedMessage unless there is one, of 64 hexadecimal digits.
    """
    match list(values):
        case [value] if _ENC.fullmatch(value):
            return bytes.fromhex(value.decode("ascii"))
    raise _malformed("its encapsulated key is not 64 hexadecimal digits, given once")


def _malformed(what: str) -> MalformedMessage:
    return MalformedMessage(f"Not an EHBP request: {what}.", step="ehbp")


class FrameReader:
    """Cuts a stream into sealed frames, storing none whose length is out of bounds."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def __len__(self) -> int:
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def take(self) -> bytes | None:
        """The next whole frame, or None. Frames of no bytes are passed over (SPEC.md, section 4.3).

        Raises: MalformedMessage for a frame that is no longer than its tag, or over 1 MiB.
        """
        buffer = self._buffer
        while len(buffer) >= _PREFIX:
            length = int.from_bytes(buffer[:_PREFIX], "big")
            if length:
                return self._cut(length)
            del buffer[:_PREFIX]
        return None

    def _cut(self, length: int) -> bytes | None:
        if not TAG_LENGTH < length <= MAX_FRAME:
            raise _malformed("a frame is empty or too large")
        end = _PREFIX + length
        if len(self._buffer) < end:
            return None
        sealed = bytes(self._buffer[_PREFIX:end])
        del self._buffer[:end]
        return sealed


@dataclass(frozen=True, slots=True)
class OpenedBody:
    """A request's content, every frame of which has opened, and the way to answer it."""

    content: bytes
    response: "ResponseSealer"


class RequestOpener:
    """The gateway's side of one request's body: feed what arrives, run nothing before `finish` returned.

    The first frame opens as soon as it is whole, with whichever live key opens it: a request does not name its key, so
    one that no key opens was sealed to another key, or changed, and nobody can tell which (KeyUnknown).

    After an error the opener takes nothing more. Not its business: the request's head, how long it may take, and how
    much all connections hold together (`Limits` has numbers). That the body is all that its sender wrote is not known.
    """

    def __init__(self, ring: KeyRing, enc: bytes, *, limits: Limits = DEFAULT_LIMITS) -> None:
        self._ring = ring
        self._enc = enc
        self._limits = limits
        self._context: Context | None = None
        self._frames = FrameReader()
        self._content = bytearray()
        self._closed = False

    @property
    def unauthenticated(self) -> int:
        """Stored bytes that no opened frame vouches for."""
        return len(self._frames)

    def feed(self, data: bytes, now: float) -> None:
        """Raises: KeyUnknown, Replayed, ChannelBroken, MalformedMessage (`step` is "size" when over a limit)."""
        self._check_open()
        self._frames.feed(data)
        try:
            while (sealed := self._frames.take()) is not None:
                self._add(self._open(sealed, now))
        except CloisterError:
            self._closed = True
            raise

    def finish(self, now: float) -> OpenedBody:
        """The whole body, once its bytes have ended. Raises: ChannelBroken when it was cut inside a frame, or had none."""
        self._check_open()
        self._closed = True
        if self._context is None or len(self._frames):
            raise broken()
        nonce = self._ring.entropy(NONCE_LENGTH)
        sequence = response_sequence(self._context, self._enc, nonce, RESPONSE_LABEL)
        return OpenedBody(bytes(self._content), ResponseSealer(nonce, sequence))

    def _check_open(self) -> None:
        if self._closed:
            raise WrongUse("This request has ended.", step="ehbp")

    def _open(self, sealed: bytes, now: float) -> bytes:
        if self._context is not None:
            return self._context.open(b"", sealed)
        key, self._context, plaintext = self._open_first(sealed, now)
        self._ring.remember(key, self._enc, now)
        return plaintext

    def _open_first(self, sealed: bytes, now: float) -> tuple[ReceiverKey, Context, bytes]:
        for key in self._ring.find_ehbp(now):
            try:
                context = setup_receiver(key.private, AEAD_AES_256_GCM, self._enc, REQUEST_INFO)
                return key, context, context.open(b"", sealed)
            except ChannelBroken:
                continue
        raise KeyUnknown(
            "The request is sealed to a key that this enclave does not hold, or was changed.",
            hint="Verify the enclave again.",
            step="key",
        )

    def _add(self, plaintext: bytes) -> None:
        if len(self._content) + len(plaintext) > self._limits.request_bytes:
            raise MalformedMessage("The request is too large.", step="size", expected=str(self._limits.request_bytes))
        self._content += plaintext


class ResponseSealer:
    """The gateway's side of one response, driven like `ohttp.ResponseSealer`. Every method returns bytes to send at
    once, possibly none. `nonce` (32 bytes) belongs into the header `Ehbp-Response-Nonce`.

    Head and end are not sealed: a client cannot tell an answer that was cut between two frames from a whole one.
    """

    def __init__(self, nonce: bytes, sequence: AeadSequence) -> None:
        self.nonce = nonce
        self._sequence = sequence

    def start(self, status: int, headers: Iterable[Field], *, stream: bool = False) -> bytes:
        """Nothing: EHBP's heads travel in clear."""
        return b""

    def data(self, body: bytes) -> bytes:
        pieces = (body[at : at + _SENT_PIECE] for at in range(0, len(body), _SENT_PIECE))
        sealed = [self._sequence.seal(b"", piece) for piece in pieces]
        return b"".join([len(one).to_bytes(_PREFIX, "big") + one for one in sealed])

    def finish(self, trailers: Iterable[Field] = (), *, pad: bool = True) -> bytes:
        """Nothing: EHBP has no end of its own, no trailers and no padding."""
        return b""
