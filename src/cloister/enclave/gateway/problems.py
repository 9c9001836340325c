"""What the gateway says in plaintext, when there is no sealed channel to say it in (RFC 9457 problem documents).

Anybody on the way can read and forge these: they say nothing about a request but its class.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "BUSY",
    "CHANNEL",
    "DATE_TYPE",
    "KEY_UNKNOWN",
    "LATE",
    "MEDIA_TYPE",
    "METHOD",
    "NONCE",
    "PLAINTEXT",
    "TOO_LARGE",
    "UNAVAILABLE",
    "Message",
    "Problem",
    "Receive",
    "Send",
]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_OURS = "https://cloister.invalid/problems/"
_IANA = "https://iana.org/assignments/http-problem-types#"
DATE_TYPE = _IANA + "date"  # RFC 9458, section 6.5.2; only ever sent sealed


@dataclass(frozen=True, slots=True)
class Problem:
    """`close`: the request's body was not read to its end, so that the connection cannot be used again."""

    status: int
    type: str
    title: str
    close: bool = False
    headers: tuple[tuple[bytes, bytes], ...] = ()

    async def answer(self, send: Send) -> None:
        body = json.dumps({"type": self.type, "title": self.title, "status": self.status}).encode()
        headers = [
            (b"content-type", b"application/problem+json"),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
            *self.headers,
        ]
        if self.close:
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


_RETRY = ((b"retry-after", b"1"),)

PLAINTEXT = Problem(403, _OURS + "plaintext-refused", "This address answers sealed requests only.", close=True)
METHOD = Problem(405, "about:blank", "Method Not Allowed", close=True)
NONCE = Problem(400, _OURS + "nonce", "The nonce must be 32 bytes in unpadded base64url, or be left out.", close=True)
MEDIA_TYPE = Problem(415, _OURS + "media-type", "Sealed requests are message/ohttp-chunked-req.", close=True)
# One type for every way in which a message can fail to open: which one it was is nobody's business.
CHANNEL = Problem(400, _OURS + "not-opened", "The sealed request could not be opened.")
KEY_UNKNOWN = Problem(422, _IANA + "ohttp-key", "The key configuration is not in use here.")
TOO_LARGE = Problem(413, _OURS + "too-large", "The sealed request is too large.", close=True)
LATE = Problem(408, _OURS + "late", "The sealed request did not arrive in time.", close=True)
BUSY = Problem(503, _OURS + "busy", "Too many requests are arriving at once.", close=True, headers=_RETRY)
UNAVAILABLE = Problem(503, _OURS + "no-evidence", "No fresh evidence can be made right now.", headers=_RETRY)
