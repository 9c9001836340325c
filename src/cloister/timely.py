"""uvicorn's HTTP protocol on httptools, with patience that ends."""

import asyncio
from typing import ClassVar, Literal

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cloister.patience import PATIENCE, Deadline, Patience, Wait

__all__ = ["Timely", "timely"]

_FIELD = 32
_NO_HTTP = "Invalid HTTP request received."


class Timely(HttpToolsProtocol):
    """uvicorn's, which waits for five seconds between requests, and by itself for nothing else: neither it nor its parser
    bounds a head or a trailer. This one closes a connection that outwears its `patience`."""

    patience: ClassVar[Patience] = PATIENCE
    _deadline: Deadline
    _part: Literal["next", "head", "body"] = "next"
    _number = 0  # requests begun
    _fields = 0  # bytes of this request's URL and fields
    _raw = 0  # bytes since the parser told of the last step: of a field that does not end, for one
    _body = 0  # bytes since the last progress
    _moved = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline = Deadline(self.loop, wanted=self._wanted, excused=self._excused, late=transport.close)
        self._deadline.look()

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._moved = False
        super().data_received(data)
        self._raw = 0 if self._moved else self._raw + len(data)
        if self._raw > self.patience.head_bytes and not self.transport.is_closing():
            self.send_400_response(_NO_HTTP)
        self._deadline.look()
        if self._body >= self.patience.body_bytes:
            self._body = 0
            self._deadline.progress()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._moved = True
        self._part = "head"
        self._number += 1
        self._fields = self._body = 0

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + _FIELD)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._moved = True
        self._part = "body"
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._moved = True
        if self._unanswered():
            self._body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._moved = True
        self._part = "next"
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._deadline.look()

    def _count(self, size: int) -> None:
        """Raises: ValueError, which the parser turns into one of its own: uvicorn answers 400 and closes."""
        self._fields += size
        if self._fields > self.patience.head_bytes:
            raise ValueError("The request's head is too large.")

    def _wanted(self) -> Wait | None:
        if self.transport.is_closing():
            return None
        if self._part == "head":
            return Wait("head", self._number, self.patience.head_seconds)
        answered = self.cycle is None or self.cycle.response_complete
        if self._part == "body":
            if answered:
                return Wait("rest", self._number, self.patience.head_seconds)
            return Wait("body", self._number, self.patience.body_seconds) if self._unanswered() else None
        if answered and self.timeout_keep_alive_task is None:
            return Wait("next", self._number, self.patience.head_seconds)
        return None

    def _unanswered(self) -> bool:
        return not self.cycle.response_started

    def _excused(self) -> bool:
        """Who cannot go on: we do not read, or have not said yet that the body may come."""
        return self.flow.read_paused or (self.cycle is not None and self.cycle.waiting_for_100_continue)


def timely(patience: Patience) -> type[asyncio.Protocol]:
    """For uvicorn's `http`."""
    return type("Timely", (Timely,), {"patience": patience})
