"""Who may use the host: 256 random bits each, kept as their SHA-256, compared in constant time."""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable

from cloister.errors import WrongUse
from cloister.host.store import TokenRecord

__all__ = ["make_token", "name_of"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_PREFIX = "cloister-host-"  # so that a scanner for leaked secrets knows one


def make_token(name: str, now: float) -> tuple[str, TokenRecord]:
    """A new token, to be shown once, and what is kept of it. Raises: WrongUse for a name with other letters."""
    if not _NAME.fullmatch(name):
        raise WrongUse("A token's name has letters, digits, dots, dashes.", step="token", expected="1 to 64 of them")
    token = _PREFIX + secrets.token_urlsafe(32)
    return token, TokenRecord(name, _digest(token), now)


def name_of(token: str, known: Iterable[TokenRecord]) -> str | None:
    """The name of a known token, or None. Every record is compared, whichever it is."""
    digest, found = _digest(token), None
    for record in known:
        if hmac.compare_digest(record.sha256, digest):
            found = record.name
    return found


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()
