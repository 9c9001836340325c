"""One bounded HTTPS request: no redirect, no cookie, no compression, a limit of bytes and of time."""

import contextlib
import ipaddress
import socket
import ssl
import threading
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, NoReturn, Self
from urllib.parse import urlsplit

import httpx2

from cloister.collateral.pieces import MAX_PIECE
from cloister.errors import ConnectionFailed, MalformedEvidence, WrongUse

__all__ = ["Fetched", "Https", "check_address"]

_TIMEOUT = httpx2.Timeout(10.0, read=20.0)
_DEADLINE = 60.0  # seconds for a whole answer, its head and the handshake before it, however slowly they drip
_MAX_HEADER = 64 * 1024
_OFFLINE = "Later, or from a network that reaches it. A document that carries its collateral needs none."
_BUSY = (429, 502, 503, 504)


@dataclass(frozen=True, slots=True)
class Fetched:
    body: bytes
    headers: httpx2.Headers


def check_address(url: str) -> str:
    """The address without a trailing slash. Raises: WrongUse unless it is https, or http on this machine."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        raise WrongUse("This is no address of a collateral service.", got=url) from error
    plain = parts.scheme == "http" and _is_loopback(host)
    if (
        not host
        or parts.query
        or parts.fragment
        or parts.username is not None
        or not (plain or parts.scheme == "https")
    ):
        hint = "Plain http is for this machine only, for a PCCS that runs here."
        raise WrongUse("A collateral service's address looks like https://host.", got=url, hint=hint)
    return url.rstrip("/")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _open(*, tls: bool, here: bool) -> httpx2.Client:
    return httpx2.Client(
        # Plain http loads no authorities, which takes longer than all else: a TLS handshake would find none to believe.
        verify=True if tls else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
        timeout=_TIMEOUT,
        limits=httpx2.Limits(max_keepalive_connections=0),  # few requests, far apart: none on a dying connection
        follow_redirects=False,
        cookies=CookieJar(policy=DefaultCookiePolicy(allowed_domains=[])),
        headers={"user-agent": "cloister", "accept-encoding": "identity"},
        trust_env=not here,  # a proxy named by the environment never leads back to this machine
    )


class _Deadline:
    """Shuts one request's connection when its time is over, whatever it waits for: a timeout of reading begins anew with
    each byte."""

    def __init__(self, seconds: float) -> None:
        self.over = False
        self._held: list[socket.socket] = []
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            for held in self._held:
                held.close()
            self._held = []

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """httpcore's events. The descriptor is this one's own: a handshake takes the connection's socket over."""
        if event.endswith(".connect_tcp.complete"):
            try:
                held = info["return_value"].get_extra_info("socket").dup()
            except OSError as error:
                raise httpx2.ConnectError("There is no descriptor left.") from error
            with self._lock:
                self._held.append(held)
            if self.over:
                self._end()

    def _end(self) -> None:
        with self._lock:
            self.over = True
            for held in self._held:
                with contextlib.suppress(OSError):  # it broke off by itself
                    held.shutdown(socket.SHUT_RDWR)


class Https:
    """May be shared between threads. Close it. `deadline`: seconds for a whole answer."""

    def __init__(self, *, deadline: float = _DEADLINE) -> None:
        self._deadline = deadline
        self._clients: dict[tuple[bool, bool], httpx2.Client] = {}
        self._opening = threading.Lock()

    def _client(self, *, tls: bool, here: bool) -> httpx2.Client:
        with self._opening:
            if (tls, here) not in self._clients:
                self._clients[tls, here] = _open(tls=tls, here=here)
            return self._clients[tls, here]

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    def get(self, url: str) -> Fetched | None:
        """None when the service answers 404: it does not know what was asked for.

        Raises: ConnectionFailed; MalformedEvidence for an answer over 512 KiB.
        """
        parts = urlsplit(url)
        host = parts.hostname or ""
        client = self._client(tls=parts.scheme == "https", here=_is_loopback(host))
        with _Deadline(self._deadline) as deadline:
            found = None
            try:
                found = _ask(client, url, host, deadline)
            except (ConnectionFailed, MalformedEvidence):
                if not deadline.over:
                    raise
            if deadline.over:  # though it seems whole: of no stated length, an answer ends as one that was cut
                raise ConnectionFailed(f"{host} takes too long to answer.", step="collateral", hint=_OFFLINE)
            return found


def _ask(client: httpx2.Client, url: str, host: str, deadline: _Deadline) -> Fetched | None:
    try:
        with client.stream("GET", url, extensions={"trace": deadline.trace}) as response:
            if response.status_code == 404:
                return None
            if response.status_code != 200:
                _refuse_status(host, response)
            return Fetched(_read(response, host), response.headers)
    except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL) as error:
        raise ConnectionFailed(
            f"{host} could not be reached, or its answer broke off.",
            step="collateral",
            got=type(error).__name__,
            hint=_OFFLINE,
        ) from error


def _read(response: httpx2.Response, host: str) -> bytes:
    if sum(len(name) + len(value) for name, value in response.headers.raw) > _MAX_HEADER:
        raise MalformedEvidence(f"{host} sends too much in headers.", step="collateral")
    if response.headers.get("content-encoding", "identity") != "identity":
        raise MalformedEvidence(f"{host} compresses what nobody asked it to.", step="collateral")
    body = bytearray()
    for block in response.iter_raw():
        body += block
        if len(body) > MAX_PIECE:
            expected = f"{MAX_PIECE} bytes"
            raise MalformedEvidence(f"{host} sends too much.", step="collateral", expected=expected, got="more")
    return bytes(body)


def _refuse_status(host: str, response: httpx2.Response) -> NoReturn:
    status = response.status_code
    hint = _OFFLINE
    if status in _BUSY:
        wait = response.headers.get("retry-after", "")
        hint = f"Try again in {wait} s." if wait.isdecimal() and len(wait) < 6 else "Try again in a minute."
    elif 300 <= status < 400:
        hint = "It points elsewhere, and is not followed: name the right address yourself."
    raise ConnectionFailed(f"{host} does not give it (status {status}).", step="collateral", got=str(status), hint=hint)
