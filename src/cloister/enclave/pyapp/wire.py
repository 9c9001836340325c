"""One request, one socket: frames of a kind, a length and a payload, in both directions.

    frame    = kind(1) || u32(length) || payload
    request  = R(head) B(body)* E()          head: JSON of the ASGI scope's members, bytes as Latin-1
    response = H(head) B(body)* E()          without E it broke off

Either side says by closing that it has gone. The kernel's buffers are the flow control.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "BODY",
    "END",
    "HEAD",
    "REQUEST",
    "decode_head",
    "decode_scope",
    "encode_head",
    "encode_scope",
    "frame",
    "frames",
    "read",
]

REQUEST, HEAD, BODY, END = b"R", b"H", b"B", b"E"

_MOST = 1 << 20
"""Bytes of a payload, as written."""
_LIMIT = 1 << 25
"""Bytes of a payload, as read."""
_TEXTS = ("type", "http_version", "method", "scheme", "path", "root_path")
_BYTES = ("raw_path", "query_string")


def frame(kind: bytes, payload: bytes = b"") -> bytes:
    return kind + len(payload).to_bytes(4, "big") + payload


def frames(payload: bytes) -> bytes:
    """Body frames for any number of bytes."""
    return b"".join(frame(BODY, payload[at : at + _MOST]) for at in range(0, len(payload), _MOST))


async def read(reader: asyncio.StreamReader) -> tuple[bytes, bytes] | None:
    """The next frame; None when the other side has gone, or sends what is none."""
    try:
        head = await reader.readexactly(5)
        length = int.from_bytes(head[1:], "big")
        return (head[:1], await reader.readexactly(length)) if length <= _LIMIT else None
    except (asyncio.IncompleteReadError, OSError):
        return None


def encode_scope(scope: Mapping[str, Any]) -> bytes:
    members: dict[str, Any] = {name: scope[name] for name in _TEXTS}
    members |= {name: scope[name].decode("latin-1") for name in _BYTES}
    members["headers"] = _texts(scope["headers"])
    members["server"] = list(scope["server"])
    return json.dumps(members).encode()


def decode_scope(data: bytes) -> dict[str, Any]:
    members = json.loads(data)
    scope: dict[str, Any] = {name: members[name] for name in _TEXTS}
    scope |= {name: members[name].encode("latin-1") for name in _BYTES}
    scope["headers"] = _bytes(members["headers"])
    scope["server"] = tuple(members["server"])
    scope["client"] = None
    scope["asgi"] = {"version": "3.0", "spec_version": "2.4"}
    return scope


def encode_head(status: int, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    return json.dumps({"status": status, "headers": _texts(headers)}).encode()


def decode_head(data: bytes) -> tuple[int, list[tuple[bytes, bytes]]]:
    """Raises: ValueError, KeyError, TypeError for what no child of ours wrote."""
    members = json.loads(data)
    return int(members["status"]), _bytes(members["headers"])


def _texts(headers: Sequence[Any]) -> list[list[str]]:
    return [[bytes(name).decode("latin-1"), bytes(value).decode("latin-1")] for name, value in headers]


def _bytes(headers: Sequence[Any]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
