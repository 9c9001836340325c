"""Whom the measured image asks for names: the servers that the network gave to networkd, written where the C library looks.

They are the host's word, and so is all that they answer: `pyapp.egress` connects to public addresses alone, and who is
there the app's own TLS checks.
"""

import ipaddress
import time
from pathlib import Path
from typing import NoReturn

__all__ = ["follow", "name_servers", "update"]

STATE = Path("/run/systemd/netif/state")
TARGET = Path("/run/resolv.conf")
"""Where the image's /etc/resolv.conf leads."""

_MOST = 3  # that the C library asks
_EVERY = 1.0  # seconds


def name_servers(state: str) -> tuple[str, ...]:
    """The addresses in networkd's state file, in order, each once, three at most. What else stands there is passed over."""
    words = [word for line in state.splitlines() if line.startswith("DNS=") for word in line[4:].split()]
    return tuple(dict.fromkeys(word for word in words if _is_address(word)))[:_MOST]


def _is_address(word: str) -> bool:
    try:
        return bool(ipaddress.ip_address(word))
    except ValueError:
        return False


def update(state: Path = STATE, target: Path = TARGET) -> None:
    """`target` names the servers of `state`. Without any it stays as it is: the C library then asks this machine, where
    nobody answers."""
    try:
        servers = name_servers(state.read_text(errors="replace"))
        content = "".join(f"nameserver {server}\n" for server in servers)
        if not servers or (target.exists() and target.read_text() == content):
            return
        draft = target.with_name(f".{target.name}")
        draft.write_text(content)
        draft.replace(target)
    except OSError:
        return  # before the network is there, or out of memory: the next look may be luckier


def follow() -> NoReturn:
    """As long as this machine runs: what the network says may change."""
    while True:
        update()
        time.sleep(_EVERY)
