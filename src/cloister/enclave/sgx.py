"""`python -I -m cloister.enclave.sgx`: the same enclave under gramine-sgx, which takes no socket from the host.

Of the host's descriptors Gramine lets in standard input, output and error alone. So the first line on standard input says
where to listen, `{"host": "127.0.0.1", "port": 8500}`, the socket is made in here, and the boot line that follows names
no descriptor. Both lines are the host's business, as a boot line always is; what changes trust lies in measured files.
"""

import json
import socket
import sys
from dataclasses import replace
from typing import BinaryIO

from cloister.enclave import main as front
from cloister.enclave.boot import Boot, parse_boot
from cloister.errors import ConnectionFailed, WrongUse

__all__ = ["main", "read_boot"]

_MAX_LINE = 1024
_HINT = "Start it with the host's backend `gramine`."


def main() -> None:
    """As `cloister.enclave.main.main`."""
    front.main(lambda: read_boot(sys.stdin.buffer))


def read_boot(lines: BinaryIO) -> Boot:
    """The boot line, with a socket that listens where the line before it says.

    Raises: WrongUse for lines that are none; ConnectionFailed where nothing can listen there: another port may do.
    """
    host, port = _parse_place(lines.readline(_MAX_LINE))
    boot = parse_boot(lines.readline(front.MAX_BOOT))
    return replace(boot, listen_fd=_listen(host, port).detach())


def _parse_place(line: bytes) -> tuple[str, int]:
    try:
        place = json.loads(line)
        host, port = place["host"], place["port"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WrongUse("The line that says where to listen is none.", hint=_HINT, step="listen") from error
    if not isinstance(host, str) or type(port) is not int or not 0 < port < 65536:
        raise WrongUse("The enclave listens on an address and a port.", hint=_HINT, step="listen")
    return host, port


def _listen(host: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(1024)
    except OSError as error:
        sock.close()
        hint = "Is the port taken? A start with another one may do."
        raise ConnectionFailed("The enclave cannot listen there.", hint=hint, step="listen", got=str(port)) from error
    return sock


if __name__ == "__main__":
    main()
