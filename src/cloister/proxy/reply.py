"""An answer of the proxy's own: its whole body at once."""

import json
from dataclasses import dataclass
from typing import Any

__all__ = ["Reply", "json_reply"]


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


def json_reply(status: int, value: dict[str, Any], *more: tuple[bytes, bytes]) -> Reply:
    body = json.dumps(value).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
        (b"cross-origin-resource-policy", b"same-origin"),
        (b"x-content-type-options", b"nosniff"),
    ]
    if status >= 400:
        headers.append((b"x-should-retry", b"false"))  # heeded by OpenAI's SDKs
    return Reply(status, (*headers, *more), body)
