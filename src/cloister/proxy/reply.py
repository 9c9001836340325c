"""An answer of the proxy's own: its whole body at once."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = ["Message", "Reply", "Send", "answer", "json_reply", "text_reply"]

Message: TypeAlias = MutableMapping[str, Any]
Send: TypeAlias = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


def json_reply(status: int, value: dict[str, Any], *more: tuple[bytes, bytes]) -> Reply:
    return _reply(status, b"application/json", json.dumps(value).encode(), *more)


def text_reply(text: str, media_type: bytes) -> Reply:
    return _reply(200, media_type, text.encode())


def _reply(status: int, media_type: bytes, body: bytes, *more: tuple[bytes, bytes]) -> Reply:
    headers = [
        (b"content-type", media_type),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
        (b"cross-origin-resource-policy", b"same-origin"),
        (b"x-content-type-options", b"nosniff"),
    ]
    if status >= 400:
        headers.append((b"x-should-retry", b"false"))  # heeded by OpenAI's and Anthropic's SDKs
    return Reply(status, (*headers, *more), body)


async def answer(send: Send, reply: Reply) -> None:
    await send({"type": "http.response.start", "status": reply.status, "headers": list(reply.headers)})
    await send({"type": "http.response.body", "body": reply.body})
