"""The seam between the host and what it starts enclaves with: a process, Gramine, a virtual machine."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from cloister.evidence.launch import LaunchConfig
from cloister.verify import Policy

__all__ = ["Event", "HostBackend", "RunningEnclave", "Spawn"]

Event: TypeAlias = dict[str, Any]
"""What an enclave says about itself: `event` and a few short fields, never content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spawn:
    """What one start of an enclave needs. `launch`, `config`: exact bytes. `bundle`: its file, or None for a built-in app
    with a public `model` (a reference). `memory_bytes`: what it may take. `cores`: the CPUs it may run on. `tls_origins`: how
    clients know its TLS listener ("https://name:port"), where the config says `tls`."""

    name: str
    launch: bytes
    config: bytes
    bundle: Path | None
    model: str | None
    memory_bytes: int
    cores: Sequence[int]
    tls_origins: tuple[str, ...] = ()


class RunningEnclave(Protocol):
    """One start of one enclave."""

    port: int
    """Where it listens, on this machine's loopback."""

    tls_port: int
    """Where its TLS listener is; 0 without one."""

    pid: int | None
    """The leader of its processes' group, for what it takes of memory and time; None where that cannot be seen."""

    def events(self) -> Iterator[Event]:
        """Until it has ended."""

    def stop(self) -> None:
        """Asks, waits a little, then kills. Idempotent, from any thread."""


class HostBackend(Protocol):
    """`platform`: the word that a config's `platform` must say. `bounds_memory`: whether an enclave cannot have more than
    its `Spawn.memory_bytes`, however it tries, so that nobody has to watch what its processes take. `offers_tls`: whether an
    enclave may have a TLS listener."""

    name: str
    platform: str
    bounds_memory: bool
    offers_tls: bool

    def start(self, spawn: Spawn) -> RunningEnclave:
        """Returns when it runs. It lives no longer than the calling thread, and never longer than this process.

        Raises: CloisterError when it cannot be started.
        """

    def forget(self, name: str) -> None:
        """The app of that name is removed, and nothing of it runs: what is kept for it alone goes."""

    def policy(self, launch: LaunchConfig) -> Policy:
        """What the operator, who knows what it started, can hold that enclave's evidence against."""
