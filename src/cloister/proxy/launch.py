"""Who may have the web chat's key: a browser that was opened with a one-time address, and nobody who found it later.

A token stands in the address that the proxy prints, behind the `#`, so that it is in no request line. It is exchanged
once for a session of two halves. The cookie is out of reach of scripts; but cookies have no ports, so a browser shows it
to every service on this machine's other ports. The binding is kept by the page, in storage that other ports cannot read,
and is sent in a header. Either half alone opens nothing.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass

__all__ = ["Begun", "Launch"]

_BYTES = 32
_MOST_SESSIONS = 64


@dataclass(frozen=True, slots=True)
class Begun:
    """A session's two halves, 256 random bits each, in URL-safe Base64."""

    cookie: str
    binding: str


class Launch:
    """Tokens and sessions of one proxy's life, as digests: what is in here opens nothing."""

    def __init__(self) -> None:
        self._tokens: set[bytes] = set()
        self._sessions: dict[bytes, bytes] = {}

    def token(self) -> str:
        """A new one; good for one `begin`, until this process ends."""
        token = secrets.token_urlsafe(_BYTES)
        self._tokens.add(_digest(token))
        return token

    def begin(self, token: str) -> Begun | None:
        """A session for a token, which is worthless from then on; None for one that is unknown or used.

        The oldest of more than 64 sessions ends.
        """
        digest = _digest(token)
        if digest not in self._tokens:
            return None
        self._tokens.discard(digest)
        begun = Begun(secrets.token_urlsafe(_BYTES), secrets.token_urlsafe(_BYTES))
        while len(self._sessions) >= _MOST_SESSIONS:
            self._sessions.pop(next(iter(self._sessions)))
        self._sessions[_digest(begun.cookie)] = _digest(begun.binding)
        return begun

    def knows(self, cookie: str, binding: str) -> bool:
        """Whether these are the two halves of one session."""
        known = self._sessions.get(_digest(cookie), b"")
        return hmac.compare_digest(known, _digest(binding))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
