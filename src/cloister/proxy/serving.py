"""The local proxy's HTTP server, for a loopback socket that is handed over when it serves."""

import asyncio
import importlib
import importlib.util
from typing import Any, ClassVar

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from cloister.patience import PATIENCE, Deadline, Patience, Wait

__all__ = ["server"]


def server(app: Any, *, patience: Patience = PATIENCE) -> uvicorn.Server:
    """For `create_proxy`'s app, or one around it: nobody else says who a client is, and no request is logged."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=_timely(patience),
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            ws="none",
            h11_max_incomplete_event_size=patience.head_bytes,
        )
    )


class _TimelyH11(H11Protocol):
    """`cloister.timely.Timely` for the parser that is always there, and that bounds heads, trailers and chunks' lines
    by itself."""

    patience: ClassVar[Patience] = PATIENCE
    _deadline: Deadline
    _came = 0

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
        super().data_received(data)
        self._deadline.look()
        self._came += len(data)
        if self._came >= self.patience.body_bytes:
            self._came = 0
            if self._unanswered():
                self._deadline.progress()

    def send_400_response(self, msg: str) -> None:
        """Where an answer has begun there is no place for another."""
        if self.conn.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            super().send_400_response(msg)
        else:
            self.transport.close()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._deadline.look()

    def _wanted(self) -> Wait | None:
        if self.transport.is_closing():
            return None
        answered = self.cycle is None or self.cycle.response_complete
        if self.conn.their_state is h11.SEND_BODY:
            if answered:
                return Wait("rest", self.cycle, self.patience.head_seconds)
            return Wait("body", self.cycle, self.patience.body_seconds) if self._unanswered() else None
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            return Wait("head", self.cycle, self.patience.head_seconds)
        if answered and self.timeout_keep_alive_task is None:
            return Wait("next", self.cycle, self.patience.head_seconds)
        return None

    def _unanswered(self) -> bool:
        return self.conn.their_state is h11.SEND_BODY and not self.cycle.response_started

    def _excused(self) -> bool:
        return self.flow.read_paused or self.conn.they_are_waiting_for_100_continue


def _timely(patience: Patience) -> type[asyncio.Protocol]:
    """On httptools where it is installed: `cloister[proxy]` alone does without."""
    if importlib.util.find_spec("httptools"):
        chosen: type[asyncio.Protocol] = importlib.import_module("cloister.timely").timely(patience)
        return chosen
    return type("TimelyH11", (_TimelyH11,), {"patience": patience})
