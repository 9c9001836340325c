"""The proxy itself: verifies before the first byte, forwards inside the seal, and streams both ways without holding."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from cloister.client import AsyncSession
from cloister.errors import CloisterError
from cloister.proxy.chat import Chat
from cloister.proxy.dialect import code_of, dialect_of, failure, refusal
from cloister.proxy.forward import forward, hold, inner
from cloister.proxy.guard import Guard, Refusal, same
from cloister.proxy.metrics import MEDIA_TYPE, Metrics, Observed
from cloister.proxy.origin import Place, app_name
from cloister.proxy.reply import Message, Reply, Send, answer, json_reply, text_reply
from cloister.proxy.upstreams import MODELS, Upstream, Upstreams
from cloister.proxy.verification import status, verification

__all__ = ["ProxyConfig", "create_proxy"]

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]

_FORWARDED = ("/tokenize", "/detokenize", "/health", "/generate")
_METHODS = ("GET", "HEAD", "POST", "DELETE")
_METHODS_OF_APPS = (*_METHODS, "OPTIONS", "PATCH", "PUT")  # beside any that the app makes up
_OWN = ("/", "/verification", "/metrics")
_NO_METHODS = ("CONNECT", "TRACE")  # of the hop, not of an app


@dataclass(frozen=True, slots=True)
class ProxyConfig:
    """`port`: the loopback port listened on, as clients name it. `request_bytes`: the largest body forwarded.
    `request_seconds`: how long a body may take to come. `app_key`: 32 bytes that the address of an app's pages is made
    with (`origin.origin_key()` keeps one across processes). `key`: what a program shows as its API key, and nothing else
    is answered (`key.own_key()` keeps one); "" asks for none, on Linux alone, where the kernel tells users apart."""

    port: int
    request_bytes: int = 32 << 20
    request_seconds: float = 30.0
    app_key: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    key: str = field(default="", repr=False)


def create_proxy(
    upstreams: AsyncSession | Sequence[Upstream], config: ProxyConfig, chat: Chat | None = None
) -> "Proxy":
    """An ASGI app for a loopback socket; serve it on 127.0.0.1 or ::1 only (it does not check where it listens),
    and without proxy headers (`uvicorn.Config(proxy_headers=False)`): nobody else says who a client is.

    Make each session with `pin_measurement=True`: a person is there who can look at a change. With `chat`, it serves the
    web chat too, which shows the proof of one enclave: give it to a proxy with one.

    Of the built-in app the API's paths are forwarded. Of one enclave whose app is somebody's own (`asgi`, `wsgi`), every
    path that is not the proxy's own is; and at the app's own name (`Proxy.app_address`) all of them, as pages.

    Raises: WrongUse without a key, on other systems than Linux.
    """
    several = [Upstream("enclave", upstreams)] if isinstance(upstreams, AsyncSession) else upstreams
    return Proxy(Upstreams(several), config, chat)


class Proxy:
    def __init__(self, upstreams: Upstreams, config: ProxyConfig, chat: Chat | None) -> None:
        self._upstreams = upstreams
        self._config = config
        self._chat = chat
        self._guard = Guard(config.port, key=config.key)
        self._metrics = Metrics()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._observed(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._upstreams.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    async def _observed(self, scope: Scope, receive: Receive, send: Send) -> None:
        observed = Observed(self._metrics, scope["path"], send)
        failed = False
        try:
            await self._guarded(scope, receive, observed.send)
        except Exception:
            failed = True
            if not observed.answered:  # or the server would say 500 in its own words, upon which SDKs ask again
                await answer(observed.send, self._refused(scope, _FAILED))
            raise
        finally:
            observed.close(failed=failed)

    @property
    def app_address(self) -> str:
        """Of an app's pages, for a browser; "" where none is verified yet, or it has none."""
        return f"http://{host}/" if (host := self._app_host()) else ""

    def _app_host(self) -> str:
        only = self._upstreams.only
        if only is None:
            return ""
        only.look()
        return f"{app_name(only.app, self._config.app_key)}:{self._config.port}" if only.app is not None else ""

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        app_host = self._app_host()
        host = self._guard.host(scope)
        place = Place(host, app=bool(app_host), live=bool(app_host) and same(host, app_host))
        known = bool(self._config.key) and self._chat is not None and self._chat.lets_in(scope)
        refused = self._guard.refusal(scope, app_host, known=known) or self._not_served(scope, place)
        scope = self._guard.without_key(scope)
        content = refused or await self._content(receive)
        if isinstance(content, Refusal):
            await answer(send, self._refused(scope, content, (b"connection", b"close")))
        elif content is not None:
            await self._answer(receive, self._route(scope, content, place, send), len(content))

    def _refused(self, scope: Scope, refused: Refusal, *more: tuple[bytes, bytes]) -> Reply:
        self._metrics.refuse(refused.code)
        return refusal(refused, dialect_of(scope), *more)

    async def _answer(self, receive: Receive, route: Coroutine[Any, Any, None], length: int) -> None:
        self._metrics.request_bytes += length
        serving = asyncio.create_task(route)
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

    async def _route(self, scope: Scope, content: bytes, place: Place, send: Send) -> None:
        reply = None if place.live else await self._own(scope, content)
        if reply is None:
            await self._forward(scope, content, place, send)
        else:
            await answer(send, reply)

    async def _forward(self, scope: Scope, content: bytes, place: Place, send: Send) -> None:
        target = await self._upstreams.target(scope, content)
        if isinstance(target, Refusal):
            await answer(send, self._refused(scope, target))
            return
        upstream = target.upstream
        try:
            key, live = upstream.api_key, place.live
            request = inner(scope, target.content, raw_path=target.raw_path, api_key=key, live=live)
            answered = await upstream.session.send(request)
            held = await hold(answered, scope["headers"])
        except CloisterError as error:
            self._metrics.refuse(code_of(error)[1], upstream.name)
            await answer(send, failure(error, dialect_of(scope)))
            return
        await forward(answered, held, send, place)

    async def _own(self, scope: Scope, content: bytes) -> Reply | None:
        """What is answered here; None for what is forwarded."""
        path = scope["path"]
        if path == "/":
            app = {"app": self.app_address} if self.app_address else {}
            return json_reply(200, {**status(self._upstreams), **app})
        if path == "/verification":
            return await self._verification(scope)
        if path == "/metrics":
            return text_reply(self._metrics.text(self._upstreams), MEDIA_TYPE)
        if path == MODELS and scope["method"] == "GET" and self._upstreams.only is None:
            return await self._models(scope)
        if self._chat is not None and self._own_method(path):
            return self._chat_reply(self._chat, scope, content)
        return None

    async def _verification(self, scope: Scope) -> Reply:
        wanted = scope["query_string"].split(b"&")
        named = next((part.removeprefix(b"upstream=") for part in wanted if part.startswith(b"upstream=")), None)
        one = self._upstreams.only if named is None else self._upstreams.get(unquote(named.decode("latin-1")))
        if named is not None and one is None:
            return self._refused(scope, _NO_UPSTREAM)
        return await verification(self._upstreams, one, fresh=b"fresh" in wanted, explain=b"explain" in wanted)

    async def _models(self, scope: Scope) -> Reply:
        found = await self._upstreams.models(scope)
        return failure(found, dialect_of(scope)) if isinstance(found, CloisterError) else json_reply(*found)

    def _chat_reply(self, chat: Chat, scope: Scope, content: bytes) -> Reply:
        try:
            return chat.answer(scope, content)
        except CloisterError as error:
            return failure(error, "openai")

    def _own_method(self, path: str) -> str | None:
        """What a path that is answered here is asked with; None for the others."""
        if path in _OWN:
            return "GET"
        return None if self._chat is None else self._chat.method(path)

    def _not_served(self, scope: Scope, place: Place) -> Refusal | None:
        if scope["http_version"] == "1.0":
            return _OLD_HTTP
        headers = dict(scope["headers"])
        destination = headers.get(b"sec-fetch-dest", b"empty")
        if place.live:
            if destination == b"serviceworker" or b"service-worker" in headers:
                return _NO_WORKER
            return _allowed(_METHODS_OF_APPS) if scope["method"] in _NO_METHODS else None
        path = scope["path"]
        if wanted := self._own_method(path):
            methods = ("GET", "HEAD") if wanted == "GET" else (wanted,)
            return None if scope["method"] in methods else _allowed(methods)
        if not place.app and not path.startswith("/v1/") and path not in _FORWARDED:
            return _NOT_FOUND
        if destination not in (b"empty", b"document"):
            return _NO_PART
        if place.app:
            return _allowed(_METHODS_OF_APPS) if scope["method"] in _NO_METHODS else None
        return None if scope["method"] in _METHODS else _allowed(_METHODS)


def _allowed(methods: Sequence[str]) -> Refusal:
    """405, and what would be taken instead (RFC 9110, section 15.5.6)."""
    allow = ", ".join(methods)
    return Refusal(405, "method", "This method is not forwarded.", f"Use {allow}.", ((b"allow", allow.encode()),))


_FAILED = Refusal(500, "internal_error", "The proxy failed.", "The enclave may have run the request all the same.")
_TOO_LARGE = Refusal(413, "too_large", "The request is too large.", "At most 32 MiB.")
_TOO_SLOW = Refusal(408, "too_slow", "The request's body did not come in time.", "Send it at once.")
_NOT_FOUND = Refusal(404, "not_found", "Nothing is forwarded from this path.", "The API is under /v1.")
_NO_UPSTREAM = Refusal(404, "not_found", "No enclave of this proxy has that name.", "GET / names them.")
_NO_PART = Refusal(403, "foreign_page", "What an enclave answers is no part of a page.", "Fetch it as data.")
_NO_WORKER = Refusal(
    403, "foreign_page", "No service worker is installed from an enclave.", "It would outlive what was verified."
)
_OLD_HTTP = Refusal(505, "http_version", "HTTP/1.0 cannot tell a cut answer from a whole one.", "Use HTTP/1.1.")


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
