"""What lies outside of a virtual machine: a network of public addresses that is this machine's loopback and nothing else, a
name server that knows one name, and a TLS server of that name."""

import socketserver
import ssl
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.certificate import self_signed
from tests.system.shell import tool

__all__ = ["Outside", "outside"]

NAME = "api.example.com"
WORDS = b"from outside"
_LOOPBACK = "1.2.3.2"  # QEMU's user network takes what goes there to this machine's loopback
_NETWORK = f"user,id=net,net=1.2.3.0/24,host={_LOOPBACK},dns=1.2.3.3,dhcpstart=1.2.3.15,"
_NAME_SERVER = "127.0.0.77"
_WRAPPER = """#!{python}
import os, sys

words = [word.replace("user,id=net,", "{network}").replace("-10.0.2.15:", "-1.2.3.15:") for word in sys.argv[1:]]
script = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
os.execvp("unshare", ["unshare", "--mount", "sh", "-c", script, "{names}", "{qemu}", *words])
"""


@dataclass(frozen=True)
class Outside:
    """`port`: where it answers. `authority`: the file of its certificate, which is its own authority. `programs`: a folder in
    which QEMU stands with its guests' network turned to here; to be the first in PATH."""

    port: int
    authority: Path
    programs: Path


@contextmanager
def outside(folder: Path) -> Iterator[Outside]:
    """As root: name servers answer on port 53, and QEMU gets a view of its own of /etc/resolv.conf."""
    authority, key = folder / "outside.pem", folder / "outside.key"
    for path, content in zip((authority, key), self_signed(NAME), strict=True):
        path.write_bytes(content)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority, key)
    with ExitStack() as stack:
        web = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), _Web))
        web.socket = context.wrap_socket(web.socket, server_side=True)
        names = stack.enter_context(socketserver.UDPServer((_NAME_SERVER, 53), _Names))
        for server in (web, names):
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
        yield Outside(web.server_address[1], authority, _programs(folder))


def _programs(folder: Path) -> Path:
    (folder / "resolv.conf").write_text(f"nameserver {_NAME_SERVER}\n")
    wrapper = folder / "programs" / "qemu-system-x86_64"
    wrapper.parent.mkdir()
    qemu = tool(wrapper.name)
    wrapper.write_text(
        _WRAPPER.format(python=sys.executable, network=_NETWORK, names=folder / "resolv.conf", qemu=qemu)
    )
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    return wrapper.parent


class _Web(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(WORDS)))
        self.end_headers()
        self.wfile.write(WORDS)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as the base class has it
        pass


class _Names(socketserver.BaseRequestHandler):
    """RFC 1035, section 4.1: one question, and the one name's address of four bytes (type A), or that there is none."""

    def handle(self) -> None:
        asked, sock = self.request
        end = asked.index(b"\0", 12) + 5
        labels = NAME.encode().split(b".")
        known = asked[12 : end - 4] == b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
        answered = known and asked[end - 4 : end - 2] == b"\0\1"
        flags = b"\x81\x80" if known else b"\x81\x83"
        address = bytes(map(int, _LOOPBACK.split(".")))
        answer = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + address if answered else b""
        counts = bytes((0, 1, 0, answered, 0, 0, 0, 0))
        sock.sendto(asked[:2] + flags + counts + asked[12:end] + answer, self.client_address)
