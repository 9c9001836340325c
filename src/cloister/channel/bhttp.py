"""Binary HTTP (RFC 9292): requests and responses as bytes, decoded as they arrive.

All four framings are read, informational responses too. Requests are written known-length with padding, responses
indeterminate-length in pieces. Field names and values are held to HTTP/2's rules (RFC 9113, section 8.2.1).
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable
from dataclasses import dataclass

from cloister.channel.limits import Limits
from cloister.channel.padding import padded_length
from cloister.errors import MalformedMessage

__all__ = [
    "Field",
    "Informational",
    "Request",
    "RequestControl",
    "RequestDecoder",
    "ResponseDecoder",
    "ResponseEnd",
    "ResponseEvent",
    "ResponseHead",
    "decode_varint_length",
    "encode_content",
    "encode_request",
    "encode_response_end",
    "encode_response_head",
    "encode_varint",
]

Field = tuple[bytes, bytes]
"""A lower-case name and a value."""

_KNOWN_REQUEST, _KNOWN_RESPONSE, _INDETERMINATE_REQUEST, _INDETERMINATE_RESPONSE = range(4)
_METHOD = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+\-.]*")
_VISIBLE = re.compile(r"[\x21-\x7e]*")
_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_BAD_VALUE = re.compile(rb"[\0\r\n]|\A[ \t]|[ \t]\Z")
_NUMBERS = (1 << 6, 1 << 14, 1 << 30, 1 << 62)


@dataclass(frozen=True, slots=True)
class RequestControl:
    """A request's first line. `path` holds the query too. Visible ASCII, all of it."""

    method: str
    scheme: str
    authority: str
    path: str


@dataclass(frozen=True, slots=True)
class Request:
    """A whole request. The first four fields as in `RequestControl`."""

    method: str
    scheme: str
    authority: str
    path: str
    headers: tuple[Field, ...] = ()
    content: bytes = b""
    trailers: tuple[Field, ...] = ()


@dataclass(frozen=True, slots=True)
class Informational:
    """A 1xx response that came before the final one."""

    status: int
    headers: tuple[Field, ...]


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """`status` is a final one, 200 to 599."""

    status: int
    headers: tuple[Field, ...]
    informational: tuple[Informational, ...] = ()


@dataclass(frozen=True, slots=True)
class ResponseEnd:
    """Nothing of the response comes after this."""

    trailers: tuple[Field, ...] = ()


ResponseEvent = ResponseHead | bytes | ResponseEnd


def _malformed(what: str) -> MalformedMessage:
    return MalformedMessage(f"Not a Binary HTTP message: {what}.", step="binary http")


def encode_varint(number: int) -> bytes:
    """The shortest variable-length integer (RFC 9000, section 16) for 0 to 2^62 - 1."""
    for exponent, limit in enumerate(_NUMBERS):
        if number < limit:
            return (number | exponent << (8 << exponent) - 2).to_bytes(1 << exponent, "big")
    raise _malformed("a number is over 2^62")


def decode_varint_length(first: int) -> int:
    """How many bytes the variable-length integer takes whose first byte this is: 1, 2, 4 or 8."""
    return 1 << (first >> 6)


def _string(data: bytes) -> bytes:
    return encode_varint(len(data)) + data


def _field_lines(fields: Iterable[Field]) -> bytes:
    lines = []
    for name, value in fields:
        line = (name.lower(), value.strip(b" \t"))
        _check_field(*line)
        lines.append(_string(line[0]) + _string(line[1]))
    return b"".join(lines)


def _check_field(name: bytes, value: bytes) -> None:
    # The messages leave out what was found: a header may be an API key.
    if not _NAME.fullmatch(name):
        raise _malformed("a field name is not a lower-case token")
    if _BAD_VALUE.search(value):
        raise _malformed("a field value holds a line break, a zero byte or outer white space")


def _check_control(control: RequestControl) -> None:
    if not (_METHOD.fullmatch(control.method) and _SCHEME.fullmatch(control.scheme)):
        raise _malformed("the method or the scheme is not a token")
    if not (_VISIBLE.fullmatch(control.authority) and _VISIBLE.fullmatch(control.path)):
        raise _malformed("the authority or the path is not visible ASCII")


def encode_request(request: Request) -> bytes:
    """Known-length framing, then zeros up to a power of two, 1 KiB at least. Field names are lower-cased.

    Raises: MalformedMessage for a method, path, field name or value that HTTP does not allow.
    """
    control = RequestControl(request.method, request.scheme, request.authority, request.path)
    _check_control(control)
    strings = (control.method, control.scheme, control.authority, control.path)
    message = b"".join(
        (
            encode_varint(_KNOWN_REQUEST),
            *(_string(value.encode("ascii")) for value in strings),
            _string(_field_lines(request.headers)),
            _string(request.content),
            _string(_field_lines(request.trailers)),
        )
    )
    return message.ljust(padded_length(len(message)), b"\0")


def encode_response_head(status: int, headers: Iterable[Field]) -> bytes:
    """The start of an indeterminate-length response, up to its content.

    Raises: MalformedMessage for a status that is not final, or fields as in `encode_request`.
    """
    if not 200 <= status <= 599:
        raise _malformed("a final status is 200 to 599")
    return encode_varint(_INDETERMINATE_RESPONSE) + encode_varint(status) + _field_lines(headers) + b"\0"


def encode_content(content: bytes) -> bytes:
    """One piece of an indeterminate-length message's content; of nothing, nothing."""
    return _string(content) if content else b""


def encode_response_end(trailers: Iterable[Field] = ()) -> bytes:
    """The content's terminator, then the trailers with theirs."""
    return b"\0" + _field_lines(trailers) + b"\0"


Steps = Generator[None, None, None]


class _Reader:
    """Bytes that may still be arriving. Its generators yield while they wait for more and return what they read."""

    __slots__ = ("buffer", "ended")

    def __init__(self, data: bytes = b"", *, ended: bool = False) -> None:
        self.buffer = bytearray(data)
        self.ended = ended

    def at_end(self) -> Generator[None, None, bool]:
        """Whether the message stops here, where it may: cut before empty sections (RFC 9292, section 3.8)."""
        while not self.buffer:
            if self.ended:
                return True
            yield
        return False

    def exactly(self, length: int) -> Generator[None, None, bytes]:
        buffer = self.buffer
        while len(buffer) < length:
            if self.ended:
                raise _malformed("it ends inside a field")
            yield
        data = bytes(buffer[:length])
        del buffer[:length]
        return data

    def varint(self) -> Generator[None, None, int]:
        first = (yield from self.exactly(1))[0]
        rest = yield from self.exactly(decode_varint_length(first) - 1)
        return (first & 0x3F) << (8 * len(rest)) | int.from_bytes(rest, "big")

    def string(self, budget: "_Budget") -> Generator[None, None, bytes]:
        length = yield from self.varint()
        budget.spend(length + 1)
        return (yield from self.exactly(length))


class _Budget:
    """Counts what was announced against a cap, before any of it is stored."""

    __slots__ = ("left", "what")

    def __init__(self, cap: int, what: str) -> None:
        self.left = cap
        self.what = what

    def spend(self, length: int) -> None:
        self.left -= length
        if self.left < 0:
            raise MalformedMessage(f"A sealed message's {self.what} is over its limit.", step="size")


class _Decoder(ABC):
    """Drives one generator over the bytes as they arrive; after an error nothing more is taken."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._reader = _Reader()
        self._steps = self._message()
        self._known = False
        self._open = True

    @abstractmethod
    def _message(self) -> Steps: ...

    @abstractmethod
    def _content(self, piece: bytes) -> None: ...

    def _feed(self, data: bytes) -> None:
        self._run(data)
        self._open = True

    def _finish(self) -> None:
        self._reader.ended = True
        self._run(b"")

    def _run(self, data: bytes) -> None:
        if not self._open:
            raise _malformed("it has ended, or failed, before")
        self._open = False
        self._reader.buffer += data
        next(self._steps, None)

    def _framing(self, known: int, indeterminate: int) -> Steps:
        framing = yield from self._reader.varint()
        if framing not in (known, indeterminate):
            raise _malformed("the framing indicator is not that of this kind of message")
        self._known = framing == known

    def _budget(self, what: str) -> _Budget:
        return _Budget(self._limits.header_section_bytes, what)

    def _fields(self, budget: _Budget) -> Generator[None, None, tuple[Field, ...]]:
        reader = self._reader
        if (yield from reader.at_end()):
            return ()
        if self._known:
            section = yield from reader.string(budget)
            return _parse_fields(section)
        fields: list[Field] = []
        while True:
            length = yield from reader.varint()
            if not length:
                return tuple(fields)
            budget.spend(length + 1)
            name = yield from reader.exactly(length)
            value = yield from reader.string(budget)
            _check_field(name, value)
            fields.append((name, value))

    def _body(self) -> Generator[None, None, bool]:
        """Content as it comes. Returns whether its end was in the message, not implied by the message's own end."""
        reader = self._reader
        if (yield from reader.at_end()):
            return False
        while length := (yield from reader.varint()):
            yield from self._piece(length)
            if self._known:
                break
        return True

    def _piece(self, length: int) -> Steps:
        reader = self._reader
        while length:
            if (yield from reader.at_end()):
                raise _malformed("it ends inside its content")
            piece = bytes(reader.buffer[:length])
            del reader.buffer[: len(piece)]
            length -= len(piece)
            self._content(piece)

    def _padding(self) -> Steps:
        buffer = self._reader.buffer
        while True:
            if buffer.count(0) != len(buffer):
                raise _malformed("its padding is not all zeros")
            buffer.clear()
            if self._reader.ended:
                return
            yield


def _parse_fields(section: bytes) -> tuple[Field, ...]:
    fields = []
    position = 0
    while position < len(section):
        name, position = _parse_string(section, position)
        value, position = _parse_string(section, position)
        _check_field(name, value)
        fields.append((name, value))
    return tuple(fields)


def _parse_string(section: bytes, position: int) -> tuple[bytes, int]:
    if position >= len(section):
        raise _malformed("a field section ends inside a field")
    start = position + decode_varint_length(section[position])
    number = int.from_bytes(section[position:start], "big")
    length = number & ((1 << 8 * (start - position) - 2) - 1)
    end = start + length
    if end > len(section):
        raise _malformed("a field section ends inside a field")
    return section[start:end], end


class RequestDecoder(_Decoder):
    """Feed the plaintext, then finish. `control` is there as soon as its last byte was fed.

    A request may be cut before empty sections (RFC 9292, section 3.8): that it is whole, its seal must prove.
    """

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self.control: RequestControl | None = None
        self._headers: tuple[Field, ...] = ()
        self._trailers: tuple[Field, ...] = ()
        self._pieces = bytearray()

    def feed(self, data: bytes) -> None:
        """Raises: MalformedMessage."""
        self._feed(data)

    def finish(self) -> Request:
        """Raises: MalformedMessage."""
        self._finish()
        control = self.control
        if control is None:
            raise _malformed("it has no control data")
        return Request(
            control.method,
            control.scheme,
            control.authority,
            control.path,
            self._headers,
            bytes(self._pieces),
            self._trailers,
        )

    def _message(self) -> Steps:
        yield from self._framing(_KNOWN_REQUEST, _INDETERMINATE_REQUEST)
        budget = self._budget("control data")
        method = yield from self._reader.string(budget)
        scheme = yield from self._reader.string(budget)
        authority = yield from self._reader.string(budget)
        path = yield from self._reader.string(budget)
        # Latin-1 takes any byte; the check then leaves ASCII only.
        control = RequestControl(*(value.decode("latin-1") for value in (method, scheme, authority, path)))
        _check_control(control)
        self.control = control
        self._headers = yield from self._fields(self._budget("header section"))
        yield from self._body()
        self._trailers = yield from self._fields(self._budget("trailer section"))
        yield from self._padding()

    def _content(self, piece: bytes) -> None:
        self._pieces += piece


class ResponseDecoder(_Decoder):
    """Feed the plaintext; events come out: one head, content, and from `finish` the end.

    `content_ended` tells whether the content's end was in the message. `finish` does not ask for it: a response cut
    before its content is a legal one (RFC 9292, section 3.8), and whoever must not take it for a whole one asks.
    """

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self.content_ended = False
        self._events: list[ResponseEvent] = []

    def feed(self, data: bytes) -> list[ResponseEvent]:
        """Raises: MalformedMessage."""
        self._feed(data)
        return self._take()

    def finish(self) -> list[ResponseEvent]:
        """Raises: MalformedMessage."""
        self._finish()
        return self._take()

    def _take(self) -> list[ResponseEvent]:
        events, self._events = self._events, []
        return events

    def _message(self) -> Steps:
        yield from self._framing(_KNOWN_RESPONSE, _INDETERMINATE_RESPONSE)
        informational = []
        budget = self._budget("informational responses")
        while (status := (yield from self._reader.varint())) in range(100, 200):
            budget.spend(2)
            informational.append(Informational(status, (yield from self._fields(budget))))
        if not 200 <= status <= 599:
            raise _malformed("a status is 100 to 599")
        headers = yield from self._fields(self._budget("header section"))
        self._events.append(ResponseHead(status, headers, tuple(informational)))
        self.content_ended = yield from self._body()
        trailers = yield from self._fields(self._budget("trailer section"))
        yield from self._padding()
        self._events.append(ResponseEnd(trailers))

    def _content(self, piece: bytes) -> None:
        self._events.append(piece)
