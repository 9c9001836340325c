"""Server-sent events, as bytes. Everything is ASCII: no line separator of any kind can stand in a JSON string."""

import json
from typing import Any

__all__ = ["DONE", "compact", "data", "named", "quote"]

DONE = b"data: [DONE]\n\n"

quote = json.JSONEncoder().encode
"""A string as a JSON string: the one thing that is made anew for each token."""

compact = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def data(payload: Any) -> bytes:
    return f"data: {compact(payload)}\n\n".encode("ascii")


def named(event: str, body: str, number: int | None = None) -> bytes:
    """The original's frames: `id: N`, `event: …`, `data: …`."""
    head = "" if number is None else f"id: {number}\n"
    return f"{head}event: {event}\ndata: {body}\n\n".encode("ascii")
