"""Runs the inner app for one request that is whole, and its answer out; either ends with the other side."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeAlias

from cloister.channel import bhttp
from cloister.enclave.gateway import inner
from cloister.enclave.gateway.answer import Answer
from cloister.enclave.gateway.problems import Message, Receive, Send

__all__ = ["App", "Inside", "Scope"]

Scope: TypeAlias = dict[str, Any]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]


class Inside:
    """`now` in Unix seconds: what a request's `Date` is held against."""

    def __init__(self, app: App, now: Callable[[], float]) -> None:
        self._app = app
        self._now = now

    async def answer(self, request: bhttp.Request, answer: Answer, scope: Scope, receive: Receive, send: Send) -> None:
        """`scope`, `receive` and `send` are the outer request's, whose body has been read. Raises: EngineDied."""
        if not inner.is_timely(request, now := self._now()):
            answer.replace(*inner.date_problem(now))
            await answer.pump(send)
            return
        app = asyncio.create_task(self._run(request, scope, answer))
        app.add_done_callback(answer.app_ended)
        watch = asyncio.create_task(_watch(receive, answer, app))
        try:
            await answer.pump(send)
            await asyncio.wait({app})  # what the app does after its answer is its own, and is not cut short
        finally:
            answer.abandon()
            app.cancel()
            watch.cancel()
            await asyncio.gather(app, watch, return_exceptions=True)

    async def _run(self, request: bhttp.Request, scope: Scope, answer: Answer) -> None:
        """Runs the inner app. Whatever it raises ends here: its text may hold what was asked, so it is not passed on."""
        body: Message | None = {"type": "http.request", "body": request.content, "more_body": False}

        async def receive() -> Message:
            nonlocal body
            if body is not None:
                message, body = body, None
                return message
            await answer.complete.wait()
            return {"type": "http.disconnect"}

        with suppress(Exception):
            await self._app(inner.scope_of(request, scope.get("state")), receive, answer.send)


async def _watch(receive: Receive, answer: Answer, app: asyncio.Task[None]) -> None:
    """Ends the inner app as soon as the other side is gone. After a complete answer the server says "disconnect" too."""
    while (await receive())["type"] != "http.disconnect":
        pass
    if not answer.complete.is_set():
        answer.abandon()
        app.cancel()
