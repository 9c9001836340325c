"""Chunked Oblivious HTTP (draft-ietf-ohai-chunked-ohttp-08) between a verified enclave's gateway and its client.

    request  = key_id(1) kem(2) kdf(2) aead(2) || enc || { varint(len) || sealed }* || 00 || sealed with AAD "final"
    response = nonce || { varint(len) || sealed }* || 00 || sealed with AAD "final"

Every failure to open says the same. What a chunk's length announces is checked before the chunk is stored.
"""

import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass

from cloister.channel.bhttp import (
    Field,
    Request,
    RequestControl,
    RequestDecoder,
    ResponseDecoder,
    ResponseEnd,
    ResponseEvent,
    ResponseHead,
    decode_varint_length,
    encode_content,
    encode_request,
    encode_response_end,
    encode_response_head,
    encode_varint,
)
from cloister.channel.hpke import (
    AEADS,
    KDF_HKDF_SHA256,
    KEMS,
    TAG_LENGTH,
    AeadSequence,
    Context,
    Entropy,
    broken,
    expand,
    extract,
    setup_receiver,
    setup_sender,
)
from cloister.channel.keys import KeyConfig, KeyRing, ReceiverKey, choose, parse_configs, replica_of
from cloister.channel.limits import DEFAULT_LIMITS, MAX_CHUNK, Limits
from cloister.channel.padding import EVENT_MULTIPLE, padded_length
from cloister.errors import ChannelBroken, CloisterError, MalformedMessage, NotTrusted, TruncatedResponse, WrongUse
from cloister.verify import Verified

__all__ = [
    "AUTHORITY",
    "ChunkReader",
    "Limits",
    "OpenedRequest",
    "RequestOpener",
    "ResponseEnd",
    "ResponseHead",
    "ResponseOpener",
    "ResponseSealer",
    "SealedRequest",
    "request_info",
    "response_sequence",
    "seal_chunk",
    "seal_final_chunk",
    "seal_request",
    "seal_to",
]

AUTHORITY = "enclave.invalid"
"""The only authority inside: an address that goes nowhere, should a request ever leave unsealed."""

REQUEST_LABEL = b"message/bhttp chunked request"
RESPONSE_LABEL = b"message/bhttp chunked response"
_FINAL = b"final"
_HEADER_LENGTH = 7
# A piece of content and its length prefix fill one chunk.
_MAX_PIECE = MAX_CHUNK - 2


def request_info(header: bytes, label: bytes = REQUEST_LABEL) -> bytes:
    """HPKE's `info`: the request's label and its seven-byte header (RFC 9458, section 4.3)."""
    return label + b"\0" + header


def nonce_length(aead_id: int) -> int:
    """Bytes of a response's nonce: max(Nn, Nk)."""
    return max(AEADS[aead_id].nonce_length, AEADS[aead_id].key_length)


def response_sequence(context: Context, enc: bytes, nonce: bytes, label: bytes = RESPONSE_LABEL) -> AeadSequence:
    """The response's key and nonces, from the request's context (RFC 9458, section 4.4)."""
    aead = AEADS[context.aead_id]
    prk = extract(enc + nonce, context.export(label, nonce_length(context.aead_id)))
    return AeadSequence(context.aead_id, expand(prk, b"key", aead.key_length), expand(prk, b"nonce", aead.nonce_length))


def seal_chunk(sequence: AeadSequence, plaintext: bytes) -> bytes:
    sealed = sequence.seal(b"", plaintext)
    return encode_varint(len(sealed)) + sealed


def seal_final_chunk(sequence: AeadSequence, plaintext: bytes) -> bytes:
    return b"\0" + sequence.seal(_FINAL, plaintext)


def _seal_all(sequence: AeadSequence, message: bytes) -> bytes:
    """The rest of a message, its last chunk the final one."""
    last = max(0, len(message) - 1) // MAX_CHUNK * MAX_CHUNK
    chunks = [seal_chunk(sequence, message[i : i + MAX_CHUNK]) for i in range(0, last, MAX_CHUNK)]
    return b"".join([*chunks, seal_final_chunk(sequence, message[last:])])


class ChunkReader:
    """Cuts a stream into sealed chunks, storing no chunk whose length is out of bounds."""

    __slots__ = ("_buffer", "final")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.final = False

    def __len__(self) -> int:
        return len(self._buffer)

    def feed(self, data: bytes | bytearray) -> None:
        self._buffer += data

    def take(self) -> bytes | None:
        """The next whole chunk that is not the final one, or None. Once `final` is set there are none.

        Raises: MalformedMessage for an empty chunk and for one over 16,384 bytes.
        """
        buffer = self._buffer
        if not self.final and buffer:
            start = decode_varint_length(buffer[0])
            if len(buffer) < start:
                return None
            length = int.from_bytes(buffer[:start], "big") & ((1 << 8 * start - 2) - 1)
            if length:
                return self._cut(start, length)
            del buffer[:start]
            self.final = True
        if self.final and len(buffer) > MAX_CHUNK + TAG_LENGTH:
            raise _malformed("its final chunk is too large, or there is data after its end")
        return None

    def rest(self) -> bytes:
        """The final chunk as far as it has come: it reaches to the end of the message."""
        return bytes(self._buffer)

    def clear(self) -> None:
        self._buffer.clear()

    def _cut(self, start: int, length: int) -> bytes | None:
        if not TAG_LENGTH < length <= MAX_CHUNK + TAG_LENGTH:
            raise _malformed("a chunk is empty or too large")
        end = start + length
        if len(self._buffer) < end:
            return None
        sealed = bytes(self._buffer[start:end])
        del self._buffer[:end]
        return sealed


def _malformed(what: str) -> MalformedMessage:
    return MalformedMessage(f"Not a chunked Oblivious HTTP message: {what}.", step="oblivious http")


@dataclass(frozen=True, slots=True)
class OpenedRequest:
    """A request whose final chunk has opened, and the way to answer it."""

    request: Request
    response: "ResponseSealer"


class RequestOpener:
    """The gateway's side of one request: feed what arrives, run nothing before `finish` returned.

    The first chunk opens as soon as it is whole: from then on every stored byte came from somebody who holds the
    ring's public key, and method, authority and path (`control`) were checked before more is stored.

    After an error the opener takes nothing more. Not its business: who the client is, the request's date
    (`freshness.check_date`), how long it may take and how much all connections hold together (`Limits` has numbers).
    """

    def __init__(self, ring: KeyRing, *, limits: Limits = DEFAULT_LIMITS) -> None:
        self._ring = ring
        self._limits = limits
        self._head = bytearray()
        self._keys: tuple[ReceiverKey, ...] = ()
        self._header = self._enc = b""
        self._context: Context | None = None
        self._chunks = ChunkReader()
        self._decoder = RequestDecoder(limits)
        self._length = 0
        self._closed = False

    @property
    def unauthenticated(self) -> int:
        """Stored bytes that no opened chunk vouches for."""
        return len(self._head) + len(self._chunks)

    @property
    def control(self) -> RequestControl | None:
        """Method, authority and path, once they are in: the gateway may refuse on them."""
        return self._decoder.control

    def feed(self, data: bytes, now: float) -> None:
        """Raises: KeyUnknown, Replayed, ChannelBroken, MalformedMessage (`step` is "size" when over a limit)."""
        self._check_open()
        try:
            self._take(data, now)
        except CloisterError:
            self._closed = True
            raise

    def finish(self, now: float) -> OpenedRequest:
        """The whole request, once its bytes have ended. Raises: as `feed`; ChannelBroken when it was cut."""
        self._check_open()
        self._closed = True
        if not self._enc or not self._chunks.final:
            raise broken()
        context = self._open(_FINAL, self._chunks.rest(), now)
        self._chunks.clear()
        request = self._decoder.finish()
        nonce = self._ring.entropy(nonce_length(context.aead_id))
        return OpenedRequest(request, ResponseSealer(nonce, response_sequence(context, self._enc, nonce)))

    def _check_open(self) -> None:
        if self._closed:
            raise WrongUse("This request has ended.", step="oblivious http")

    def _take(self, data: bytes, now: float) -> None:
        if self._enc:
            self._chunks.feed(data)
        else:
            self._head += data
            self._set_up(now)
        while self._enc and (sealed := self._chunks.take()) is not None:
            self._open(b"", sealed, now)

    def _set_up(self, now: float) -> None:
        head = self._head
        if not self._keys:
            if len(head) < _HEADER_LENGTH:
                return
            kem_id, kdf_id, aead_id = (int.from_bytes(head[i : i + 2], "big") for i in (1, 3, 5))
            self._keys = self._ring.find(head[0], kem_id, kdf_id, aead_id, now)
        end = _HEADER_LENGTH + KEMS[self._keys[0].config.kem_id].enc_length
        if len(head) < end:
            return
        self._header, self._enc = bytes(head[:_HEADER_LENGTH]), bytes(head[_HEADER_LENGTH:end])
        self._chunks.feed(head[end:])
        head.clear()

    def _open(self, aad: bytes, sealed: bytes, now: float) -> Context:
        if self._context is None:
            self._context, plaintext = self._open_first(aad, sealed, now)
        else:
            plaintext = self._context.open(aad, sealed)
        self._length += len(plaintext)
        if self._length > self._limits.request_bytes:
            raise MalformedMessage("The request is too large.", step="size", expected=str(self._limits.request_bytes))
        checked = self._decoder.control is not None
        self._decoder.feed(plaintext)
        if not checked and self._decoder.control is not None:
            _check_target(self._decoder.control)
        return self._context

    def _open_first(self, aad: bytes, sealed: bytes, now: float) -> tuple[Context, bytes]:
        for key in self._keys:
            try:
                aead_id = int.from_bytes(self._header[5:], "big")
                context = setup_receiver(key.private, aead_id, self._enc, request_info(self._header))
                plaintext = context.open(aad, sealed)
            except ChannelBroken:
                continue
            self._keys = ()
            self._ring.remember(key, self._enc, now)  # only now is this somebody's request
            return context, plaintext
        raise broken()


def _check_target(control: RequestControl) -> None:
    if control.authority != AUTHORITY or control.scheme not in ("http", "https") or not control.path.startswith("/"):
        raise MalformedMessage("The request is for somewhere else.", step="target", expected=AUTHORITY)


class ResponseSealer:
    """The gateway's side of one response. Every method returns bytes to send at once, possibly none.

    A stream goes out as it comes, one chunk per call (and 16,382 bytes); its padding is the caller's
    (`padding.event_padding`). Any other response is held back until a chunk is full, so that its chunks tell no more
    than its padded size.

    On a failure drop the sealer and abort the connection: the client sees that the end is missing.
    """

    def __init__(self, nonce: bytes, sequence: AeadSequence) -> None:
        self._nonce = nonce
        self._sequence = sequence
        self._pending = bytearray()
        self._sent = 0
        self._stream = False
        self._state = "new"

    def begin(self) -> bytes:
        """The nonce, which tells nothing and may leave before there is an answer: the client can make its keys meanwhile."""
        nonce, self._nonce = self._nonce, b""
        return nonce

    def start(self, status: int, headers: Iterable[Field], *, stream: bool = False) -> bytes:
        """Raises: MalformedMessage for a status or fields that HTTP does not allow."""
        self._move("new", "started")
        self._stream = stream
        return self.begin() + self._put(encode_response_head(status, headers))

    def data(self, body: bytes) -> bytes:
        self._move("started", "started")
        if len(body) <= _MAX_PIECE:
            return self._put(encode_content(body))
        pieces = (body[i : i + _MAX_PIECE] for i in range(0, len(body), _MAX_PIECE))
        return b"".join([self._put(encode_content(piece)) for piece in pieces])

    def finish(self, trailers: Iterable[Field] = (), *, pad: bool = True) -> bytes:
        """The end; only after this does the client take the response for whole.

        Padding brings a whole response to a power of two, 1 KiB at least, and a stream's end to a multiple of 512.
        """
        self._move("started", "finished")
        message = bytes(self._pending) + encode_response_end(trailers)
        self._pending.clear()
        if pad and self._stream:
            message += bytes(-len(message) % EVENT_MULTIPLE)
        elif pad:
            message += bytes(padded_length(self._sent + len(message)) - self._sent - len(message))
        return _seal_all(self._sequence, message)

    def _move(self, before: str, after: str) -> None:
        if self._state != before:
            raise WrongUse(f"The response is {self._state}.", step="oblivious http")
        self._state = after

    def _put(self, plaintext: bytes) -> bytes:
        if self._stream and 0 < len(plaintext) <= MAX_CHUNK:
            return seal_chunk(self._sequence, plaintext)
        self._pending += plaintext
        chunks = []
        while len(self._pending) > (0 if self._stream else MAX_CHUNK):
            chunk = bytes(self._pending[:MAX_CHUNK])
            del self._pending[:MAX_CHUNK]
            self._sent += len(chunk)
            chunks.append(seal_chunk(self._sequence, chunk))
        return b"".join(chunks)


class ResponseOpener:
    """The client's side of one response: feed what arrives, take the events that come out.

    Head and content are authentic when they come out, in order and without gaps; that they are all there is known
    only when `ResponseEnd` comes out: the final chunk has opened and the content's own end was in the message. The
    final chunk reaches to the end of the connection, so it is tried whenever more of it has come.
    """

    def __init__(self, context: Context, enc: bytes) -> None:
        self._context = context
        self._enc = enc
        self._nonce = bytearray()
        self._sequence: AeadSequence | None = None
        self._chunks = ChunkReader()
        self._decoder = ResponseDecoder(DEFAULT_LIMITS)
        self._broken: CloisterError | None = None
        self._complete = False

    def feed(self, data: bytes) -> list[ResponseEvent]:
        """Raises: ChannelBroken, MalformedMessage, TruncatedResponse; the same again on every later call."""
        if self._broken is not None:
            raise self._broken
        try:
            return self._take(data)
        except CloisterError as error:
            self._broken = error
            raise

    def finish(self) -> None:
        """Call it when the connection has ended, however it did.

        Raises: TruncatedResponse unless `ResponseEnd` came out before; whatever `feed` raised.
        """
        if self._broken is not None:
            raise self._broken
        if not self._complete:
            raise _truncated()

    def _take(self, data: bytes) -> list[ResponseEvent]:
        if self._complete:
            if data:
                raise _malformed("there is data after its end")
            return []
        if self._sequence is None:
            data = self._set_up(data)
        self._chunks.feed(data)
        events: list[ResponseEvent] = []
        if (sequence := self._sequence) is not None:
            while (sealed := self._chunks.take()) is not None:
                events += self._decoder.feed(sequence.open(b"", sealed))
            if self._chunks.final:
                events += self._try_final(sequence)
        return events

    def _set_up(self, data: bytes) -> bytes:
        """Collects the nonce. Returns what came after it."""
        self._nonce += data
        length = nonce_length(self._context.aead_id)
        if len(self._nonce) < length:
            return b""
        self._sequence = response_sequence(self._context, self._enc, bytes(self._nonce[:length]))
        return bytes(self._nonce[length:])

    def _try_final(self, sequence: AeadSequence) -> list[ResponseEvent]:
        sealed = self._chunks.rest()
        if len(sealed) < TAG_LENGTH:
            return []
        try:
            plaintext = sequence.open(_FINAL, sealed)
        except CloisterError:
            return []  # more of it may come; if not, `finish` tells
        self._chunks.clear()
        events = self._decoder.feed(plaintext) + self._decoder.finish()
        if not self._decoder.content_ended:
            raise _truncated()
        self._complete = True
        return events


def _truncated() -> TruncatedResponse:
    return TruncatedResponse(
        "The response ended before its authenticated end.",
        hint="What came before is genuine but not all of it. Ask again.",
        step="channel",
    )


@dataclass(frozen=True, slots=True)
class SealedRequest:
    """`body` is the whole of a `message/ohttp-chunked-req`; `replica` the value of the header `Cloister-Replica`."""

    body: bytes
    response: ResponseOpener
    replica: str


def seal_request(
    verified: Verified, request: Request, *, require_pq: bool = False, entropy: Entropy = os.urandom
) -> SealedRequest:
    """Seals a request to an enclave that was verified, under the strongest of its attested keys.

    Does not check that `verified` is still valid: the caller holds `expires_at` against its own clock. Adds no `date`.

    Raises: NotTrusted for a statement whose purpose is not to serve; otherwise as `seal_to`.
    """
    if verified.statement.purpose != "serve":
        raise NotTrusted(
            "The enclave's statement is not for serving.",
            step="purpose",
            expected="serve",
            got=verified.statement.purpose,
        )
    return seal_to(verified.ohttp_keys, request, require_pq=require_pq, entropy=entropy)


@functools.lru_cache(maxsize=32)
def _chosen(ohttp_keys: bytes, *, require_pq: bool) -> tuple[KeyConfig, int]:
    """A session seals to the same keys again and again."""
    return choose(parse_configs(ohttp_keys), require_pq=require_pq)


def seal_to(
    ohttp_keys: bytes, request: Request, *, require_pq: bool = False, entropy: Entropy = os.urandom
) -> SealedRequest:
    """`seal_request` without its proof: `ohttp_keys` may be anybody's. For tests and for tools that seal to no enclave.

    Raises: NotTrusted when no key is offered that will do; MalformedMessage for keys that are none or a request that
    HTTP does not allow; WrongUse for another authority than `enclave.invalid` or over 32 MiB.
    """
    if request.authority != AUTHORITY:
        raise WrongUse("Sealed requests go to http://enclave.invalid only.", step="target", expected=AUTHORITY)
    config, aead_id = _chosen(ohttp_keys, require_pq=require_pq)
    message = encode_request(request)
    if len(message) > DEFAULT_LIMITS.request_bytes:
        raise WrongUse("The request is too large.", step="size", expected=str(DEFAULT_LIMITS.request_bytes))
    numbers = (config.kem_id, KDF_HKDF_SHA256, aead_id)
    header = bytes([config.key_id]) + b"".join(number.to_bytes(2, "big") for number in numbers)
    enc, context = setup_sender(config.kem_id, aead_id, config.public, request_info(header), entropy=entropy)
    body = header + enc + _seal_all(context, message)
    return SealedRequest(body, ResponseOpener(context, enc), replica_of(ohttp_keys))
