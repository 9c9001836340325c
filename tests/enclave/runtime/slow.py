"""A client that sends something, or nothing, and then no more."""

import asyncio
from typing import Any

__all__ = ["Slow"]


class Slow:
    """Any number of such requests; `end` lets all of them go."""

    def __init__(self, sent: bytes = b"") -> None:
        self._sent = sent
        self._ended = asyncio.Event()
        self._began: set[Any] = set()

    async def receive(self) -> Any:
        task = asyncio.current_task()
        if self._sent and task not in self._began:
            self._began.add(task)
            return {"type": "http.request", "body": self._sent, "more_body": True}
        await self._ended.wait()
        return {"type": "http.disconnect"}

    def end(self) -> None:
        self._ended.set()

    async def ask(self, app: Any, path: str) -> None:
        headers = [(b"content-type", b"application/octet-stream")]
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}

        async def send(_message: Any) -> None:
            pass

        await app(scope, self.receive, send)
