"""Which outer address does what: the four that exist, EHBP's and the unsealed API's where they are on, and a refusal
for all others."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from urllib.parse import parse_qsl

from cloister.channel import bhttp
from cloister.channel import ehbp as ehbp_channel
from cloister.channel.keys import KeyRing
from cloister.channel.limits import Limits
from cloister.channel.ohttp import RequestOpener
from cloister.enclave.gateway import ehbp, problems
from cloister.enclave.gateway.answer import Answer, Grid
from cloister.enclave.gateway.inside import App, Inside, Scope
from cloister.enclave.gateway.intake import Intake
from cloister.enclave.gateway.plaintext import is_local
from cloister.enclave.gateway.problems import Problem, Receive, Send
from cloister.enclave.gateway.receipts import PendingReceipt
from cloister.errors import CloisterError, MalformedEvidence, MalformedMessage
from cloister.evidence.strict_json import from_b64url

__all__ = ["Gateway"]

_NONCE_BYTES = 32
_QUOTES_AT_ONCE = 20
_CACHED_DOCUMENT_SECONDS = 300.0


class Gateway:
    """An ASGI app in front of another, `app`, which only sealed requests reach.

    `attest` makes the attestation document for a nonce of 0 or 32 bytes, over `ring.ohttp_keys` as they are when it is
    called. `ready` says whether `app` can answer. `padding=False` weakens what the channel hides (lengths and rhythm of
    an answer): it belongs into the statement's `insecure`. `quotes_per_second`: evidence over a client's nonce takes
    0.14 to 1 s of some hardware; above this rate, after a burst of 20, the answer is 503 and never stale evidence. `clock` gives Unix seconds; it belongs to the host, so it
    is never let run backwards and nothing rests on it alone.

    Where `ring` has a key for EHBP, POST to exactly one of `ehbp_paths` is taken sealed by EHBP too, which hides bodies and
    nothing else: that belongs into `insecure` as well. `receipt` begins one where a request inside the sealed channel asks
    for it, None where not. `plaintext=True` answers this machine's own programs unsealed too, on every other address: for
    comparison and benchmarks, without padding or receipts, and another name for `insecure`.

    Does not check who asks: an API key travels inside and is the inner app's affair.
    """

    def __init__(
        self,
        app: App,
        ring: KeyRing,
        attest: Callable[[bytes], Awaitable[bytes]],
        *,
        ready: Callable[[], bool] = lambda: True,
        padding: bool = True,
        ehbp_paths: frozenset[str] = frozenset(),
        plaintext: bool = False,
        receipt: Callable[[bhttp.Request], PendingReceipt | None] = lambda _request: None,
        quotes_per_second: float = 5.0,
        limits: Limits = Limits(),  # noqa: B008 (frozen)
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._app = app
        self._ring = ring
        self._attest = attest
        self._ready = ready
        self._grid = Grid() if padding else None
        self._clock = clock
        self._ehbp_paths = ehbp_paths
        self._plaintext = plaintext
        self._receipt = receipt
        self._limits = limits
        self._latest = 0.0
        self._intake = Intake(limits, self._now)
        self._inside = Inside(app, self._now)
        self._quotes = _Allowance(quotes_per_second, _QUOTES_AT_ONCE)
        self._document: tuple[bytes, float, bytes] | None = None  # keys, made at, document without a nonce

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._route(scope, receive, send)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        reads = scope["method"] in ("GET", "HEAD")
        match scope["path"]:
            case "/.well-known/ohttp-gateway" if reads:
                self._ring.rotate(self._now())
                await _reply(send, b"application/ohttp-keys", self._ring.ohttp_keys)
            case "/.well-known/ohttp-gateway" if scope["method"] == "POST":
                await self._exchange(scope, receive, send)
            case "/.well-known/cloister-attestation" if reads:
                await self._evidence(scope["query_string"], send)
            case "/healthz" if reads:
                await _reply(send, b"application/json", b'{"status":"alive"}')
            case "/readyz" if reads:
                ready = self._ready()
                body = b'{"status":"ready"}' if ready else b'{"status":"not ready"}'
                await _reply(send, b"application/json", body, status=200 if ready else 503)
            case "/.well-known/ohttp-gateway" | "/.well-known/cloister-attestation" | "/healthz" | "/readyz":
                await problems.METHOD.answer(send)
            case ehbp.KEYS_PATH if self._ring.ehbp_key is not None:
                await self._ehbp_keys(reads=reads, send=send)
            case path if self._ring.ehbp_key is not None and path in self._ehbp_paths and ehbp.is_sealed(scope):
                await self._ehbp_exchange(scope, receive, send)
            case _ if self._plaintext and is_local(scope):
                await self._app(scope, receive, send)
            case _:
                await problems.PLAINTEXT.answer(send)

    def _now(self) -> float:
        self._latest = max(self._latest, self._clock())
        return self._latest

    async def _evidence(self, query: bytes, send: Send) -> None:
        nonce = _nonce(query)
        if nonce is None:
            await problems.NONCE.answer(send)
            return
        self._ring.rotate(self._now())
        document = await self._fresh(nonce) if nonce else await self._cached()
        if isinstance(document, Problem):
            await document.answer(send)
        else:
            await _reply(send, b"application/cmw+json", document)

    async def _fresh(self, nonce: bytes) -> bytes | Problem:
        if not self._quotes.take(time.monotonic()):
            return problems.UNAVAILABLE
        try:
            return await self._attest(nonce)
        except CloisterError:
            return problems.UNAVAILABLE

    async def _cached(self) -> bytes | Problem:
        """The document for mirrors and display, which no client seals to: made anew for new keys, and now and then."""
        keys, now = self._ring.ohttp_keys, self._now()
        if self._document and self._document[0] == keys and now - self._document[1] < _CACHED_DOCUMENT_SECONDS:
            return self._document[2]
        document = await self._fresh(b"")
        if isinstance(document, bytes):
            self._document = keys, now, document
        return document

    async def _exchange(self, scope: Scope, receive: Receive, send: Send) -> None:
        if dict(scope["headers"]).get(b"content-type", b"").strip().lower() != b"message/ohttp-chunked-req":
            await problems.MEDIA_TYPE.answer(send)
            return
        self._ring.rotate(self._now())
        opened = await self._intake.open(receive, RequestOpener(self._ring, limits=self._limits))
        if isinstance(opened, Problem):
            await opened.answer(send)
        elif opened is not None:
            receipt = self._receipt(opened.request)
            answer = Answer(opened.response, grid=self._grid, opening=opened.response.begin(), receipt=receipt)
            await self._inside.answer(opened.request, answer, scope, receive, send)

    async def _ehbp_keys(self, *, reads: bool, send: Send) -> None:
        self._ring.rotate(self._now())
        config = self._ring.ehbp_config
        if not reads or config is None:
            await problems.METHOD.answer(send)
        else:
            await _reply(send, ehbp.KEYS_TYPE, config)

    async def _ehbp_exchange(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._ring.rotate(self._now())
        try:
            enc = ehbp_channel.parse_enc(ehbp.encapsulated_keys(scope))
        except MalformedMessage:
            await replace(problems.CHANNEL, close=True).answer(send)  # its body was not read
            return
        opener = ehbp_channel.RequestOpener(self._ring, enc, limits=self._limits)
        opened = await self._intake.open(receive, opener, key_unknown=ehbp.KEY_UNKNOWN)
        if isinstance(opened, Problem):
            await opened.answer(send)
        elif opened is not None:
            head = partial(ehbp.outer_head, opened.response.nonce)
            answer = Answer(opened.response, grid=self._grid, outer=head)
            await self._inside.answer(ehbp.request_of(scope, opened.content), answer, scope, receive, send)


class _Allowance:
    """A token bucket."""

    def __init__(self, rate: float, size: int) -> None:
        self._rate = rate
        self._size = float(size)
        self._left = float(size)
        self._at = 0.0

    def take(self, now: float) -> bool:
        self._left = min(self._size, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


async def _reply(send: Send, media_type: bytes, body: bytes, *, status: int = 200) -> None:
    headers = [
        (b"content-type", media_type),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _nonce(query: bytes) -> bytes | None:
    """b"" when none was asked for; None when what was asked for is not a nonce."""
    if not query:
        return b""
    fields = parse_qsl(query.decode("ascii", "replace"), keep_blank_values=True)
    if len(fields) != 1 or fields[0][0] != "nonce":
        return None
    try:
        nonce = from_b64url(fields[0][1], what="nonce")
    except MalformedEvidence:
        return None
    return nonce if len(nonce) == _NONCE_BYTES else None
