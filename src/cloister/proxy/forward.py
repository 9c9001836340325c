"""What of a request goes into the seal, and what of an answer comes out of it to the local client."""

import re
from collections.abc import Iterable
from typing import Any

from cloister.client import AUTHORITY, AsyncAnswer, InnerRequest
from cloister.proxy.chat import BINDING
from cloister.proxy.origin import Place
from cloister.proxy.reply import Send

__all__ = ["forward", "hold", "inner"]

Fields = Iterable[tuple[bytes, bytes]]

# Cookies of every service on this machine reach all of its ports; where a page stands is nobody's business.
_KEPT_HERE = (b"cookie", b"origin", b"referer", b"sec-", b"x-forwarded-", b"forwarded", b"via", BINDING)
_KEPT_OF_PAGES = tuple(name for name in _KEPT_HERE if name != b"cookie")  # at the app's own name, cookies are its own
_KEYS = (b"authorization", b"x-api-key")
# Without its length, an answer ends for the local client when its authenticated end has come, and not before. And the
# page's origin is ours: what the enclave answers sets nothing up in it.
_NOT_RETURNED = (
    b"access-control-",
    b"clear-site-data",
    b"content-security-policy",
    b"link",
    b"refresh",
    b"service-worker-allowed",
    b"set-cookie",
    b"x-content-type-options",
    b"connection",
    b"keep-alive",
    b"transfer-encoding",
    b"upgrade",
    b"content-length",
)
# Looked at in a browser, an answer is a document without scripts, of an origin of its own.
_INERT = ((b"content-security-policy", b"sandbox; default-src 'none'"), (b"x-content-type-options", b"nosniff"))
# At its own name the app's pages are pages, and say in their own policy what else they forbid themselves. Beside it stands
# ours: a page that was verified loads no code and fetches nothing past the sealed channel (where it sends the person, and
# WebRTC, no such policy holds), and what runs in the browser came from the enclave that is verified now, not from a cache or
# worker that an earlier one left.
_NOT_RETURNED_TO_PAGES = (
    *(one for one in _NOT_RETURNED if one not in (b"content-security-policy", b"set-cookie")),
    b"alt-svc",
    b"cache-control",
    b"cross-origin-resource-policy",
    b"nel",
    b"referrer-policy",
    b"report-to",
    b"reporting-endpoints",
    b"x-dns-prefetch-control",
)
_POLICY_OF_PAGES = (
    b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'; "
    b"form-action 'self'; frame-ancestors 'self'"
)
_OF_PAGES = (
    (b"content-security-policy", _POLICY_OF_PAGES),
    (b"cache-control", b"no-store"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"same-origin"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-dns-prefetch-control", b"off"),
)
_INSIDE = re.compile(rf"https?://{re.escape(AUTHORITY)}(?=[/?#]|$)".encode(), re.IGNORECASE)
_RECEIPT = b"cloister-receipt"
_MOST_HELD = 8 << 20  # bytes of an answer that waits for its receipt; a longer one goes without


def inner(
    scope: dict[str, Any], content: bytes, *, raw_path: bytes = b"", api_key: str = "", live: bool = False
) -> InnerRequest:
    """`raw_path` in the place of the request's; `api_key` in the place of the caller's. `live`: see `Place`."""
    query = b"?" + scope["query_string"] if scope["query_string"] else b""
    url = f"http://{AUTHORITY}" + ((raw_path or scope["raw_path"]) + query).decode("ascii", "replace")
    kept = _KEPT_OF_PAGES if live else _KEPT_HERE
    dropped = (*kept, *_KEYS) if api_key else kept
    headers = tuple((name, value) for name, value in scope["headers"] if not name.startswith(dropped))
    if api_key:
        headers += ((b"authorization", f"Bearer {api_key}".encode()),)
    if live and any(name == b"origin" for name, _ in scope["headers"]):
        headers += ((b"origin", f"https://{AUTHORITY}".encode()),)  # the guard let in its own alone, by our name for it
    return InnerRequest(scope["method"], url, headers, content)


async def hold(answer: AsyncAnswer, headers: Fields) -> list[bytes]:
    """What has to be here before the answer's head leaves. Nothing, but where `headers` ask for a receipt: that of an event
    stream is its last comment; any other answer comes whole first, since no SDK reads the fields that stand behind it.

    Raises: TruncatedResponse, ChannelBroken; the answer is closed then.
    """
    held: list[bytes] = []
    if all(name != _RECEIPT for name, _ in headers) or _is_stream(answer.headers):
        return held
    try:
        async for part in answer:
            held.append(part)
            if sum(map(len, held)) > _MOST_HELD:
                break
    except BaseException:
        await answer.aclose()
        raise
    return held


async def forward(answer: AsyncAnswer, held: list[bytes], send: Send, place: Place) -> None:
    """Part by part as it opens. What breaks after the head is raised, so that the server cuts the connection: a local
    client must see an incomplete read, never a clean end."""
    head = _returned(answer.headers, place)
    found = [field for field in answer.trailers if field[0].startswith(_RECEIPT)]
    try:
        await send({"type": "http.response.start", "status": answer.status, "headers": [*head, *found]})
        for part in held:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        async for part in answer:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
    finally:
        await answer.aclose()


def _returned(headers: Fields, place: Place) -> list[tuple[bytes, bytes]]:
    dropped, added = (_NOT_RETURNED_TO_PAGES, _OF_PAGES) if place.live else (_NOT_RETURNED, _INERT)
    head = [(name.lower(), value) for name, value in headers if not name.lower().startswith(dropped)]
    if place.app:
        head = [(name, _here(name, value, place)) for name, value in head]
    return [*head, *added]


def _here(name: bytes, value: bytes, place: Place) -> bytes:
    """A field's value as it holds at this address: the app knows itself as the authority inside."""
    if name == b"location":
        return _INSIDE.sub(f"http://{place.host}".encode(), value, count=1) if _INSIDE.match(value) else value
    if name == b"set-cookie":
        pair, *attributes = value.split(b";")
        return b";".join([pair, *(one for one in attributes if not one.strip().lower().startswith(b"domain"))])
    return value


def _is_stream(headers: Fields) -> bool:
    found = {name.lower(): value for name, value in headers}
    return found.get(b"content-type", b"").lower().startswith(b"text/event-stream")
