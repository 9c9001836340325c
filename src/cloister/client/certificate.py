"""The certificate of an enclave's TLS listener, for tools that speak TLS and nothing else: fetched, and then held against
what was verified."""

import contextlib
import ipaddress
import socket
import ssl
from urllib.parse import urlsplit

from cloister.errors import ConnectionFailed, WrongUse
from cloister.verify import Verified

__all__ = ["fetch_certificate", "find_listener"]

_SECONDS = 10.0


def find_listener(verified: Verified, url: str) -> tuple[str, int]:
    """Host and port: the host that gave the evidence, since whoever runs it chose the statement's names, and their port. An
    origin without a port is not the listener's: somebody else ends TLS there.

    Raises: WrongUse where the statement names none, or several ports.
    """
    ports = {port for origin in verified.statement.aud if (port := _port(origin))}
    host = urlsplit(url).hostname
    if len(ports) != 1 or not host:
        hint = "Say where it listens: --tls HOST:PORT"
        raise WrongUse("The enclave does not say at which port it takes TLS.", step="tls", hint=hint)
    return host, ports.pop()


def _port(origin: str) -> int | None:
    with contextlib.suppress(ValueError):
        parts = urlsplit(origin)
        return parts.port if parts.scheme == "https" else None
    return None


def fetch_certificate(host: str, port: int) -> bytes:
    """The DER certificate of whoever answers there, who has proved to have its key. Nothing is sent but a handshake, by TLS
    1.3, and nothing about the certificate is believed. Raises: ConnectionFailed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # it is held against the evidence instead
    try:
        with (
            socket.create_connection((host, port), _SECONDS) as sock,
            context.wrap_socket(sock, server_hostname=None if _is_address(host) else host) as tls,
        ):
            found = tls.getpeercert(binary_form=True)
    except (OSError, UnicodeError) as error:  # ssl.SSLError is an OSError; UnicodeError: a host that no name can be
        hint = "Is the TLS listener reached there? --tls HOST:PORT names another address."
        raise ConnectionFailed(f"No TLS 1.3 at {host} port {port}.", step="tls", hint=hint) from error
    if found is None:
        raise ConnectionFailed(f"No certificate at {host} port {port}.", step="tls")
    return found


def _is_address(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host))
    return False
