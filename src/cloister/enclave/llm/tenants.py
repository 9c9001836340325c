"""Who asks: API keys, hashed at rest and compared in constant time, and the scope inside which a prefix is reused."""

import hashlib
import hmac
import re
import secrets
from base64 import urlsafe_b64decode
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers

from cloister.enclave.llm.envelope import Refused
from cloister.errors import Unauthorized, WrongUse

__all__ = ["ApiKey", "Principal", "Tenants", "cache_scope", "new_key"]

PREFIX = "ck-"
CACHE_SECRET = "cloister-cache-secret"  # noqa: S105 - a header's name
SCOPE_LABEL = b"cloister/cache-scope/v1\0"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """`sha256` (64 lower-case hex digits) of the key; the key itself is kept by its owner alone.

    A plain hash is enough only because a key has 256 random bits (`new_key`): it cannot be guessed from the hash.
    """

    name: str
    sha256: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise WrongUse("an API key is configured by the SHA-256 of the key, 64 hexadecimal digits")


@dataclass(frozen=True, slots=True)
class Principal:
    """Somebody known by a key; everybody, with an empty name and hash, where no keys are required."""

    name: str = ""
    key_sha256: bytes = b""


def new_key() -> tuple[str, str]:
    """A fresh key (`ck-`, then 32 random bytes) to hand to its owner, and the hash to configure."""
    plain = PREFIX + secrets.token_urlsafe(32)
    return plain, hashlib.sha256(plain.encode()).hexdigest()


class Tenants:
    """Knows the keys. Deny is the default: without keys, and without being told to stay open, nobody is let in."""

    def __init__(self, keys: Sequence[ApiKey], *, require_keys: bool) -> None:
        self._keys = tuple((key.name, bytes.fromhex(key.sha256)) for key in keys)
        self.open = not keys and not require_keys

    def identify(self, headers: Headers) -> Principal:
        """From `Authorization: Bearer` or `X-Api-Key`.

        Raises:
            Unauthorized: no key, or not a known one.
        """
        if self.open:
            return Principal()
        presented = _presented(headers)
        if presented is None:
            raise Unauthorized("An API key is required: 'Authorization: Bearer' or 'X-Api-Key'.")
        digest = hashlib.sha256(presented.encode("latin-1")).digest()
        # Every key is compared, the matching one too: time tells neither whether nor where.
        matches = [Principal(name, known) for name, known in self._keys if hmac.compare_digest(known, digest)]
        if not matches:
            raise Unauthorized("The API key is not known.")
        return matches[0]


def _presented(headers: Headers) -> str | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token:
        return token.strip()
    return headers.get("x-api-key")


def cache_scope(headers: Headers, principal: Principal) -> bytes | None:
    """SHA-256 over (key hash, client's secret), each behind its length; None without `Cloister-Cache-Secret`.

    The key alone would not do: the operator issues keys, and could pose as a user to time that user's prompts.

    Raises:
        Refused: 400, the header is not 32 bytes in base64url, or is sent twice.
    """
    values = headers.getlist(CACHE_SECRET)
    if not values:
        return None
    if len(values) > 1 or not re.fullmatch(r"[A-Za-z0-9_-]{43}=?", values[0]):
        raise Refused(
            400,
            "invalid_cache_secret",
            "'Cloister-Cache-Secret' must be sent once and hold 32 bytes in base64url.",
            param="Cloister-Cache-Secret",
        )
    secret = urlsafe_b64decode(values[0][:43] + "=")
    parts = (principal.key_sha256, secret)
    return hashlib.sha256(SCOPE_LABEL + b"".join(len(part).to_bytes(4, "big") + part for part in parts)).digest()
