"""The proxy itself: verifies before the first byte, forwards inside the seal, and streams both ways without holding."""

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from cloister.client import AUTHORITY, AsyncAnswer, AsyncSession, InnerRequest
from cloister.client.account import explained, explained_refusal
from cloister.errors import (
    ChannelBroken,
    CloisterError,
    Malformed,
    NotTrusted,
    PlaintextRefused,
    TruncatedResponse,
    Unreachable,
    VerificationFailed,
    WrongUse,
)
from cloister.proxy.chat import BINDING, Chat
from cloister.proxy.guard import Guard, Refusal
from cloister.proxy.reply import Reply, json_reply
from cloister.verify import Factor, Verified

__all__ = ["ProxyConfig", "create_proxy"]

Scope = dict[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_FORWARDED = ("/tokenize", "/detokenize", "/health", "/generate")
_METHODS = ("GET", "HEAD", "POST", "DELETE")
# Cookies of every service on this machine reach all of its ports; where a page stands is nobody's business.
_KEPT_HERE = (b"cookie", b"origin", b"referer", b"sec-", b"x-forwarded-", b"forwarded", b"via", BINDING)
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
# The most special first. None is retried by an SDK: the enclave may have run the request.
_CODES: tuple[tuple[type[CloisterError], int, str], ...] = (
    (VerificationFailed, 502, "enclave_not_trusted"),
    (TruncatedResponse, 502, "answer_truncated"),
    (PlaintextRefused, 502, "plaintext_refused"),
    (ChannelBroken, 502, "channel_broken"),
    (NotTrusted, 502, "enclave_not_trusted"),
    (Malformed, 502, "malformed"),
    (Unreachable, 502, "enclave_unreachable"),
    (WrongUse, 400, "wrong_use"),
)


@dataclass(frozen=True, slots=True)
class ProxyConfig:
    """`port`: the loopback port listened on, as clients name it. `request_bytes`: the largest body forwarded.
    `request_seconds`: how long a body may take to come."""

    port: int
    request_bytes: int = 32 << 20
    request_seconds: float = 30.0


def create_proxy(session: AsyncSession, config: ProxyConfig, chat: Chat | None = None) -> "Proxy":
    """An ASGI app for a loopback socket; serve it on 127.0.0.1 or ::1 only (it does not check where it listens),
    and without proxy headers (`uvicorn.Config(proxy_headers=False)`): nobody else says who a client is.

    Make the session with `pin_measurement=True`: a person is there who can look at a change. With `chat`, it serves the
    web chat too.
    """
    return Proxy(session, config, chat)


class Proxy:
    def __init__(self, session: AsyncSession, config: ProxyConfig, chat: Chat | None) -> None:
        self._session = session
        self._config = config
        self._chat = chat
        self._guard = Guard(config.port)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif refusal := self._guard.refusal(scope) or self._not_served(scope):
            await _refuse(send, refusal)
        else:
            await self._serve(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._session.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        content = await self._content(receive)
        if isinstance(content, Refusal):
            await _refuse(send, content)
        elif content is not None:
            await self._answer(scope, content, receive, send)

    async def _answer(self, scope: Scope, content: bytes, receive: Receive, send: Send) -> None:
        serving = asyncio.create_task(self._route(scope, content, send))
        watching = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({serving, watching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            if not serving.done():
                serving.cancel()  # a local client that went away: this closes the hop, and the enclave stops
            await asyncio.wait({serving, watching})
        if not serving.cancelled():
            serving.result()

    async def _content(self, receive: Receive) -> bytes | Refusal | None:
        """The whole body; None when the client went away before its end: half a body is nobody's question."""
        content = bytearray()
        more = True
        try:
            async with asyncio.timeout(self._config.request_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    content += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(content) > self._config.request_bytes:
                        return _TOO_LARGE
        except TimeoutError:
            return _TOO_SLOW
        return bytes(content)

    async def _route(self, scope: Scope, content: bytes, send: Send) -> None:
        try:
            answer = await self._own(scope, content) or await self._session.send(_inner(scope, content))
        except CloisterError as error:
            answer = _error(error)
        if isinstance(answer, Reply):
            await _reply(send, answer)
        else:
            await _forward(answer, send)

    async def _own(self, scope: Scope, content: bytes) -> Reply | None:
        """What is answered here; None for what is forwarded."""
        path, wanted = scope["path"], scope["query_string"].split(b"&")
        if path == "/":
            return json_reply(200, self._status())
        if path == "/verification":
            fresh = b"fresh" in wanted
            return await (self._explained(fresh=fresh) if b"explain" in wanted else self._verification(fresh=fresh))
        if self._chat is not None and self._own_method(path):
            return self._chat.answer(scope, content)
        return None

    def _own_method(self, path: str) -> str | None:
        """What a path that is answered here is asked with; None for the others."""
        if path in _OURS:
            return "GET"
        return None if self._chat is None else self._chat.method(path)

    def _status(self) -> dict[str, Any]:
        verified = self._session.verified
        verdict = "not verified yet" if verified is None else verified.to_json()["verdict"]
        return {
            "proxy": "cloister",
            "enclave": self._session.url,
            "verdict": verdict,
            "first_use": verified is not None and verified.first_use,
            "details": "/verification",
        }

    async def _verification(self, *, fresh: bool) -> Reply:
        return json_reply(200, self._proof(await self._session.verify(force=fresh)))

    def _proof(self, verified: Verified) -> dict[str, Any]:
        """What is believed, what is not proved, and the bytes to check it by (for somebody else's verifier too)."""
        return {
            **verified.to_json(),
            "enclave": self._session.url,
            "not_proved": [factor.to_json() for factor in verified.factors if factor.verdict == "not-checked"],
            "document": base64.b64encode(self._session.document).decode(),
            "nonce": base64.b64encode(self._session.nonce).decode(),
        }

    async def _explained(self, *, fresh: bool) -> Reply:
        """The proof or the refusal, `explained` in the words of `cloister verify --explain`; and `saved`, which that
        command reads from a file (null where the enclave showed no document)."""
        before = self._session.nonce
        try:
            verified = await self._session.verify(force=fresh)
        except CloisterError as error:
            saved = None if self._session.nonce == before else self._saved(time.time())
            return _error(error, {"explained": explained_refusal(error), "saved": saved})
        told = {"explained": explained(verified), "saved": self._saved(verified.verified_at)}
        return json_reply(200, {**self._proof(verified), **told})

    def _saved(self, at: float) -> dict[str, Any]:
        document = base64.b64encode(self._session.document).decode()
        return {"cloister": 1, "nonce": self._session.nonce.hex(), "at": at, "document": document}

    def _not_served(self, scope: Scope) -> Refusal | None:
        if scope["http_version"] == "1.0":
            return _OLD_HTTP
        path = scope["path"]
        if wanted := self._own_method(path):
            methods = ("GET", "HEAD") if wanted == "GET" else (wanted,)
            return None if scope["method"] in methods else _METHOD
        if not path.startswith("/v1/") and path not in _FORWARDED:
            return _NOT_FOUND
        if dict(scope["headers"]).get(b"sec-fetch-dest", b"empty") not in (b"empty", b"document"):
            return _NO_PART
        return None if scope["method"] in _METHODS else _METHOD


_OURS = ("/", "/verification")
_TOO_LARGE = Refusal(413, "too_large", "The request is too large.", "At most 32 MiB.")
_TOO_SLOW = Refusal(408, "too_slow", "The request's body did not come in time.", "Send it at once.")
_NOT_FOUND = Refusal(404, "not_found", "Nothing is forwarded from this path.", "The API is under /v1.")
_METHOD = Refusal(405, "method", "This method is not forwarded.", "Use GET or POST.")
_NO_PART = Refusal(403, "foreign_page", "What an enclave answers is no part of a page.", "Fetch it as data.")
_OLD_HTTP = Refusal(505, "http_version", "HTTP/1.0 cannot tell a cut answer from a whole one.", "Use HTTP/1.1.")


def _inner(scope: Scope, content: bytes) -> InnerRequest:
    query = b"?" + scope["query_string"] if scope["query_string"] else b""
    url = f"http://{AUTHORITY}" + (scope["raw_path"] + query).decode("ascii", "replace")
    headers = tuple((name, value) for name, value in scope["headers"] if not name.startswith(_KEPT_HERE))
    return InnerRequest(scope["method"], url, headers, content)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _forward(answer: AsyncAnswer, send: Send) -> None:
    """Part by part as it opens. What breaks after the head is raised, so that the server cuts the connection: a local
    client must see an incomplete read, never a clean end."""
    headers = [(name, value) for name, value in answer.headers if not name.lower().startswith(_NOT_RETURNED)]
    headers += _INERT
    try:
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        async for part in answer:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
    finally:
        await answer.aclose()


async def _refuse(send: Send, refusal: Refusal) -> None:
    error = {"message": refusal.message, "type": "proxy_error", "param": None, "code": refusal.code}
    told = {"error": {**error, "hint": refusal.hint}}
    await _reply(send, json_reply(refusal.status, told, (b"connection", b"close")))


def _error(error: CloisterError, more: dict[str, Any] | None = None) -> Reply:
    """OpenAI's envelope, plus what a person needs: a hint, and the failed factors with expected and got side by side."""
    status, code = next(((s, c) for kind, s, c in _CODES if isinstance(error, kind)), (500, "internal_error"))
    body: dict[str, Any] = {"message": error.message, "type": "proxy_error", "param": None, "code": code}
    body |= {"hint": error.hint, "step": error.step, "expected": error.expected, "got": error.got}
    if isinstance(error, VerificationFailed):
        factors = [factor for factor in error.factors if isinstance(factor, Factor) and factor.verdict == "fail"]
        body["factors"] = [factor.to_json() for factor in factors]
    return json_reply(status, {"error": body, **(more or {})})


async def _reply(send: Send, reply: Reply) -> None:
    await send({"type": "http.response.start", "status": reply.status, "headers": list(reply.headers)})
    await send({"type": "http.response.body", "body": reply.body})
