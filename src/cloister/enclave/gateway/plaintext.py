"""The API without its seal (`--plaintext`), for comparison and benchmarks on one machine: who may ask for it."""

import ipaddress
import socket
from typing import Any
from urllib.parse import urlsplit

from cloister.errors import WrongUse

__all__ = ["demand_loopback", "is_local"]


def demand_loopback(listening: socket.socket) -> None:
    """Raises: WrongUse, where the socket can be reached from another machine."""
    address = listening.getsockname()[0]
    if not _is_loopback(address):
        hint = "Leave --plaintext away, or listen on 127.0.0.1."
        raise WrongUse("Prompts are taken in plaintext on a loopback address only.", hint=hint, got=str(address))


def is_local(scope: dict[str, Any]) -> bool:
    """Whether a request comes from this machine and knows it: a `Host` that is another name is a web page's (DNS
    rebinding), and so is a foreign `Origin`. It does not tell one local user from another."""
    client = scope.get("client")
    if client is None or not _is_loopback(client[0]):
        return False
    named = [value for name, value in scope["headers"] if name == b"host"]
    origins = [value for name, value in scope["headers"] if name == b"origin"]
    return len(named) == 1 and _names_loopback(b"//" + named[0]) and all(map(_names_loopback, origins))


def _names_loopback(url: bytes) -> bool:
    try:
        name = urlsplit(url.decode("ascii")).hostname
    except ValueError:  # covers UnicodeError
        return False
    return name == "localhost" or _is_loopback(name or "")


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
