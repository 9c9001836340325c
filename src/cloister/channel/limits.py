"""What a receiver accepts, in one place. The defaults are the protocol's; tests and small machines lower them."""

from dataclasses import dataclass

__all__ = ["DEFAULT_LIMITS", "MAX_CHUNK", "Limits"]

MAX_CHUNK = 16_384
"""Bytes of plaintext in one chunk at most, sent and accepted (draft-ietf-ohai-chunked-ohttp-08, section 3)."""


@dataclass(frozen=True, slots=True)
class Limits:
    """All in bytes but where said. A message over a limit is refused before the excess is stored.

    request_bytes: one request's plaintext, padding included.
    header_section_bytes: a request's control data, each field section, and all of a message's informational responses.
    unauthenticated_bytes: held for all connections together before they opened; the gateway counts it
        (`RequestOpener.unauthenticated` is one connection's share).
    open_seconds: how long one request may take to arrive; the gateway holds the clock.
    """

    request_bytes: int = 32 << 20
    header_section_bytes: int = 64 << 10
    unauthenticated_bytes: int = 64 << 20
    open_seconds: float = 30.0


DEFAULT_LIMITS = Limits()
