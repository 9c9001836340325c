"""EHBP at the gateway: what of its heads, which travel in clear, gets in to the app and out of it.

Whoever stands on the way reads and changes every head. So only headers that the app cannot do without pass: none of
cloister's own, such as the secret of a prompt cache, and none of an address or a browser.
"""

from collections.abc import Iterator
from typing import Any

from cloister.channel import bhttp
from cloister.channel.ohttp import AUTHORITY
from cloister.enclave.gateway import inner
from cloister.enclave.gateway.problems import Problem

__all__ = ["KEYS_PATH", "KEYS_TYPE", "KEY_UNKNOWN", "encapsulated_keys", "is_sealed", "outer_head", "request_of"]

KEYS_PATH = "/.well-known/hpke-keys"
KEYS_TYPE = b"application/ohttp-keys"
KEY_UNKNOWN = Problem(
    422, "urn:ietf:params:ehbp:error:key-config", "The key is not in use here, or the request was changed."
)

_ENCAPSULATED_KEY = b"ehbp-encapsulated-key"
_RESPONSE_NONCE = b"ehbp-response-nonce"
_INWARD = frozenset(
    {b"accept", b"anthropic-beta", b"anthropic-version", b"authorization", b"content-type", b"x-api-key"}
)
_OUTWARD = frozenset({b"allow", b"content-type", b"retry-after", b"www-authenticate"})
_OURS = ((b"incremental", b"?1"), (b"cache-control", b"no-store, no-transform"), (b"x-accel-buffering", b"no"))


def encapsulated_keys(scope: dict[str, Any]) -> Iterator[bytes]:
    """Every value of `Ehbp-Encapsulated-Key`."""
    return (value for name, value in scope["headers"] if name == _ENCAPSULATED_KEY)


def is_sealed(scope: dict[str, Any]) -> bool:
    """Whether this says of itself to be an EHBP request, without a query that would stand there for all to read."""
    return scope["method"] == "POST" and not scope["query_string"] and any(True for _ in encapsulated_keys(scope))


def request_of(scope: dict[str, Any], content: bytes) -> bhttp.Request:
    """The request as the app inside shall see it: path and a few headers by the word of whoever sent them on."""
    headers = tuple((name, value) for name, value in scope["headers"] if name in _INWARD)
    return bhttp.Request("POST", "https", AUTHORITY, scope["path"], headers, content)


def outer_head(nonce: bytes, status: int, headers: inner.Fields) -> tuple[int, list[tuple[bytes, bytes]]]:
    """An answer's head in clear: its status, the few headers that clients act on, and the nonce (32 bytes)."""
    kept = [(name.lower(), value) for name, value in headers if name.lower() in _OUTWARD]
    return status, [*kept, *_OURS, (_RESPONSE_NONCE, nonce.hex().encode())]
