"""Where the upstream listens: on loopback, and nowhere else. And what stands for its model's digest."""

import hashlib
import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from cloister.errors import WrongUse

__all__ = ["Address", "model_digest", "parse_address"]

_MODEL_LABEL = b"cloister/upstream-model/v1\0"


@dataclass(frozen=True, slots=True)
class Address:
    """`host` is an IP address of loopback, as it stands in a socket's address."""

    host: str
    port: int

    @property
    def authority(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """In its one spelling."""
        return f"http://{self.authority}"


def parse_address(url: str) -> Address:
    """`http://127.0.0.1:8000`; `localhost` stands for 127.0.0.1. No name is ever resolved.

    Raises: WrongUse for any other scheme or host, a path, a user, or no port.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
        address = ipaddress.ip_address("127.0.0.1" if parts.hostname == "localhost" else parts.hostname or "")
    except ValueError:
        port, address, parts = None, None, None
    plain = parts is not None and parts.path in ("", "/") and not (parts.query or parts.fragment or "@" in parts.netloc)
    if not (plain and parts is not None and parts.scheme == "http" and port and address and address.is_loopback):
        raise WrongUse(
            "The upstream must be an http address on loopback: beyond it, prompts would leave the enclave.",
            hint="Like http://127.0.0.1:8000, without a path.",
        )
    return Address(str(address), port)


def model_digest(name: str) -> str:
    """What stands in launch config and statement where a model's digest belongs (hex): of its name, and of no weights.

    Which weights an upstream has loaded, only a measurement of the whole image could tell.
    """
    return hashlib.sha256(_MODEL_LABEL + name.encode()).hexdigest()
