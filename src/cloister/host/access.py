"""Who may ask the host for what: deny by default.

A request passes when it names an operator's token, or reads with a console's session, or asks for one of the few public
things. Everything else is answered 401 before its body is read, whether or not there is such an address.
"""

import hashlib
import hmac
import secrets
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any, TypeAlias

from cloister.host.problems import problem
from cloister.host.store import Store
from cloister.host.tokens import name_of

__all__ = ["PUBLIC", "Access", "ConsoleSessions"]

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]

PUBLIC = frozenset(
    {
        ("GET", "/healthz"),
        ("GET", "/console"),
        ("GET", "/console/page.js"),
        ("GET", "/console/style.css"),
        ("POST", "/console/session"),
    }
)
"""Method and path: nothing of these tells anything about an app."""

_SECONDS = 12 * 3600.0
_MOST = 64


class ConsoleSessions:
    """One-time tokens for a browser, and the read-only sessions that they are exchanged for; digests, in memory only.

    A session travels in a header that the page sets, never in a cookie: no other page and no other port can make a
    browser send it.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: seconds, monotonic."""
        self._clock = clock
        self._tokens: dict[bytes, tuple[float, str]] = {}
        self._sessions: dict[bytes, tuple[float, str]] = {}

    def token(self, opener: str = "") -> str:
        """Good for one `begin` within 12 hours; the oldest of more than 64 is forgotten. `opener`: the digest of the
        operator's token that asked for it, with which all of this ends; "" for the daemon itself."""
        return self._new(self._tokens, opener)

    def begin(self, token: str) -> str | None:
        """A session for 12 hours; None for a token that is unknown, used or too old."""
        until, opener = self._tokens.pop(_digest(token), (0.0, ""))
        return self._new(self._sessions, opener) if self._clock() < until else None

    def knows(self, session: str, openers: Collection[str]) -> bool:
        """`openers`: the digests of the tokens that there are."""
        digest, good = _digest(session), False
        for known, (until, opener) in self._sessions.items():
            lives = self._clock() < until and (not opener or opener in openers)
            good |= hmac.compare_digest(known, digest) and lives
        return good

    def _new(self, kept: dict[bytes, tuple[float, str]], opener: str) -> str:
        while len(kept) >= _MOST:
            kept.pop(next(iter(kept)))
        word = secrets.token_urlsafe(32)
        kept[_digest(word)] = self._clock() + _SECONDS, opener
        return word


class Access:
    """Around the host's app. Who asks is in `scope["state"]["by"]`: a token's name, or "" for a console."""

    def __init__(self, app: Any, store: Store, sessions: ConsoleSessions) -> None:
        self._app = app
        self._store = store
        self._sessions = sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        by = self._who(scope)
        if by is None and (scope["method"], scope["path"]) not in PUBLIC:
            refused = problem(
                401,
                "Unauthorized",
                "This needs a token that the operator gave you.",
                hint="cloister login URL",
                headers={"www-authenticate": "Bearer"},
            )
            await refused(scope, receive, send)
            return
        scope.setdefault("state", {})["by"] = by or ""
        await self._app(scope, receive, send)

    def _who(self, scope: Scope) -> str | None:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, word = given[0].decode("latin-1").partition(" ") if len(given) == 1 else ("", "", "")
        if scheme.lower() != "bearer" or not word:
            return None
        tokens = self._store.tokens()
        name = name_of(word, tokens)
        if name is None and scope["method"] == "GET" and self._sessions.knows(word, {one.sha256 for one in tokens}):
            return ""
        return name


def _digest(word: str) -> bytes:
    return hashlib.sha256(word.encode(errors="surrogatepass")).digest()
