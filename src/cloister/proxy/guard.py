"""Who may ask the local proxy. It serves plain HTTP on loopback, where any web page and any local user can knock."""

import hmac
import os
import socket
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cloister.errors import WrongUse
from cloister.proxy.key import needs_key

__all__ = ["Guard", "Refusal", "peer_uid", "same"]

_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_ESTABLISHED = b"01"
_HTTP = 80
_REMEMBERED = 256  # connections
# Of two, we might judge one and somebody else heed the other.
_SINGLE = (b"host", b"origin", b"sec-fetch-site", b"sec-fetch-mode", b"content-type", b"content-length")


@dataclass(frozen=True, slots=True)
class Refusal:
    status: int
    code: str
    message: str
    hint: str
    headers: tuple[tuple[bytes, bytes], ...] = ()


class Guard:
    """`port` is the one that the proxy listens on: a Host that names another is somebody else's address for us
    (DNS rebinding). On Linux it asks the kernel who owns the other end of a connection. With `key`, whoever asks shows it
    as an API key; other systems than Linux need one.

    Raises: WrongUse where one is needed and none is given.
    """

    def __init__(self, port: int, *, key: str = "", platform: str = sys.platform) -> None:
        self._port = port
        self._hosts = (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}")
        self._origins = frozenset(f"http://{host}" for host in self._hosts)
        self._own_user_only = not needs_key(platform)
        self._key = key.encode()
        if not key and not self._own_user_only:
            hint = "cloister.proxy.key.own_key() keeps one: ProxyConfig(port, key=own_key().text)."
            raise WrongUse("On this system, a proxy without a key would answer every local user.", hint=hint)
        self._own: dict[tuple[str, int], tuple[str, int]] = {}

    def refusal(self, scope: dict[str, Any], app_host: str = "", *, known: bool = False) -> Refusal | None:
        """`app_host` ("NAME.localhost:PORT"): of somebody's own app behind the proxy, whose clients send what they like,
        where it is one more name; each name's pages may ask under that name alone. Who knows that name needs no key: it
        is this user's secret too. `known`: nor does this request, for what else it shows."""
        names = [name for name, _ in scope["headers"]]
        if any(names.count(name) > 1 for name in _SINGLE):
            return _TWICE
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = self.host(scope)
        live = bool(app_host) and same(host, app_host)
        if host not in self._hosts and not live:
            return _HOST
        site = headers.get(b"sec-fetch-site", "none")
        if site not in ("none", "same-origin"):
            return _FOREIGN
        origins = {f"http://{app_host}"} if live else self._origins
        if live and site == "same-origin":
            origins = {*origins, "null"}  # a form of a page without referrers; of a foreign page, `site` says so
        if b"origin" in headers and self._with_port(headers[b"origin"]) not in origins:
            return _FOREIGN
        if (
            not app_host
            and scope["method"] == "POST"
            and _media_type(headers.get(b"content-type", "")) != "application/json"
        ):
            return _MEDIA_TYPE
        if self._own_user_only and not self._is_own(scope["client"], scope["server"]):
            return _OTHER_USER
        if self._key and not (live or known or any(self._is_key(name, value) for name, value in scope["headers"])):
            return _NO_KEY
        return None

    def host(self, scope: dict[str, Any]) -> str:
        """Whom the request is for, as `_with_port` writes it; "" where it names nobody."""
        return self._with_port(dict(scope["headers"]).get(b"host", b"").decode("latin-1"))

    def _with_port(self, name: str) -> str:
        """In lower case; with the port of plain HTTP, which clients leave out, where that is ours."""
        has_one = name.rpartition(":")[2].isdecimal() or name in ("", "null")
        return name.lower() if has_one or self._port != _HTTP else f"{name.lower()}:{_HTTP}"

    def without_key(self, scope: dict[str, Any]) -> dict[str, Any]:
        """The request as it may be forwarded: the proxy's own key is no enclave's business."""
        kept = [(name, value) for name, value in scope["headers"] if not self._is_key(name, value)]
        return {**scope, "headers": kept}

    def _is_key(self, name: bytes, value: bytes) -> bool:
        if name == b"authorization":
            scheme, _, value = value.partition(b" ")
            if scheme.lower() != b"bearer":
                return False
        elif name != b"x-api-key":
            return False
        return bool(self._key) and hmac.compare_digest(value.strip(), self._key)

    def _is_own(self, client: tuple[str, int] | None, server: tuple[str, int] | None) -> bool:
        """Reading the kernel's table can take milliseconds, so it is done once for each connection. uvicorn hands out
        one tuple object for all of a connection's requests: the same object is the same connection, while an equal one
        may be another user's, who got the port next. A server that makes new tuples is asked about every time."""
        if client is not None and self._own.get(client) is client:
            return True
        if client is None or peer_uid(client, server) not in (os.getuid(), 0):
            return False
        if len(self._own) >= _REMEMBERED:
            self._own.clear()
        self._own[client] = client
        return True


_TWICE = Refusal(400, "header_twice", "A header that may stand once stands twice.", "Send it once.")
_HOST = Refusal(421, "wrong_host", "This is not a name of this proxy.", "Use http://127.0.0.1:PORT as it was printed.")
_FOREIGN = Refusal(403, "foreign_page", "Web pages of other origins may not ask here.", "Ask from a program instead.")
_MEDIA_TYPE = Refusal(415, "media_type", "POST bodies are application/json.", "Send Content-Type: application/json.")
_OTHER_USER = Refusal(403, "other_user", "Another user of this machine started this proxy.", "Start one of your own.")
_NO_KEY = Refusal(
    401,
    "proxy_key",
    "This proxy answers only who shows its key.",
    "Send it as the API key; it is in the file that the command named. A browser opens the address that it printed last.",
    ((b"www-authenticate", b"Bearer"),),
)


def same(one: str, other: str) -> bool:
    """Compared in constant time."""
    return hmac.compare_digest(one.encode(), other.encode())


def peer_uid(client: tuple[str, int] | None, server: tuple[str, int] | None) -> int | None:
    """The user who owns the client's end of a loopback connection; None when the kernel does not list it (Linux)."""
    if client is None or server is None:
        return None
    for family, table in zip((socket.AF_INET, socket.AF_INET6), _TABLES, strict=True):
        pair = _address(family, client), _address(family, server)
        if None not in pair and (uid := _owner(table.read_bytes().splitlines()[1:], pair)) is not None:
            return uid
    return None


def _owner(rows: Iterable[bytes], pair: tuple[bytes | None, bytes | None]) -> int | None:
    for row in rows:
        fields = row.split()
        # A connection being closed has lost its owner and shows user 0.
        if (fields[1], fields[2]) == pair and fields[3] == _ESTABLISHED:
            return int(fields[7])
    return None


def _address(family: socket.AddressFamily, address: tuple[str, int]) -> bytes | None:
    """As proc(5) writes it: 32-bit words in the machine's byte order, in hexadecimal, then the port."""
    ip = ip_address(address[0])
    if family == socket.AF_INET6:
        packed = ip.packed if ip.version == 6 else b"\0" * 10 + b"\xff\xff" + ip.packed
    elif ip.version == 4:
        packed = ip.packed
    else:
        return None
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return b"%s:%04X" % (b"".join(b"%08X" % word for word in words), address[1])


def _media_type(value: str) -> str:
    return value.partition(";")[0].strip().lower()
