"""Start one enclave as a child process and follow what it says about itself until it is ready.

This is the untrusted side: it chooses ports and paths, passes descriptors, and reads one line of JSON per event from
the child's standard output. When this process dies, the child sees its standard input close and ends.
"""

import contextlib
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import cloister
from cloister.errors import (
    CloisterError,
    EngineDied,
    MalformedModel,
    MalformedPolicy,
    NotTrusted,
    Unreachable,
    VerificationFailed,
    WrongUse,
)

__all__ = ["EnclaveProcess", "listen", "names_of", "origins"]

_MAX_LINE = 64 * 1024
# Isolated, and without `site`: no user site, no .pth file, no sitecustomize, none of the host's PYTHON* variables. A
# prefix for bytecode below which nothing can be: what runs is compiled from the files that were measured.
_START = (
    "import sys; sys.path += sys.argv[1:]; sys.pycache_prefix = '/dev/null'; "
    "import runpy; runpy.run_module('cloister.enclave', run_name='__main__')"
)
_FAILURES: dict[str, type[CloisterError]] = {
    kind.__name__: kind
    for kind in (EngineDied, MalformedModel, MalformedPolicy, NotTrusted, VerificationFailed, WrongUse)
}


def listen(host: str, port: int) -> socket.socket:
    """A bound, listening TCP socket (port 0: any free one), whose connections send small pieces at once. Raises WrongUse when
    the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Inherited by what is accepted, where asyncio sets it only for sockets whose protocol was named.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        sock.bind((host, port))
        sock.listen(1024)
    except OSError as error:
        sock.close()
        raise WrongUse(
            f"Cannot listen on {host} port {port}: {error.strerror}.", hint="Choose another port with --port."
        ) from error
    return sock


def names_of(host: str) -> tuple[str, ...]:
    """What clients call an address to listen on; () where anything may lead to it."""
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        return (host,)
    if address.is_loopback:
        return ("localhost", str(address))
    return () if address.is_unspecified else (host,)


def origins(names: Sequence[str], port: int) -> tuple[str, ...]:
    """A TLS listener's, by each of its names."""
    return tuple(f"https://{f'[{name}]' if ':' in name else name}:{port}" for name in names)


def _next_line(stdout: IO[bytes]) -> bytes:
    try:
        return stdout.readline(_MAX_LINE)
    except ValueError:  # another thread has stopped it, and closed this
        return b""


@dataclass(slots=True)
class EnclaveProcess:
    """`boot` is the line written to the child's standard input; `pass_fds` are the descriptors it names.

    `package_root`: run another copy of the code than the installed one; the (simulated) hardware measures that copy.
    `silent`: its standard error goes nowhere.
    """

    boot: bytes
    pass_fds: tuple[int, ...]
    package_root: Path | None = None
    silent: bool = False
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _drain: threading.Thread | None = field(default=None, init=False)

    def start(self) -> None:
        """Returns at once. Call it from a thread that lives as long as the enclave shall."""
        argv = [sys.executable, "-I", "-S", "-B", "-c", _START, *map(str, self._search_path())]
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if self.silent else None,
            pass_fds=self.pass_fds,
            env=self._environment(),
            # Ctrl+C at a chat stops an answer, not the enclave. The session stays the same: Linux shares cores out by
            # session first, and across sessions the engine's priority over proxy and clients would count for nothing.
            process_group=0,
        )
        self.process = process
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(self.boot)
                process.stdin.flush()

    def _search_path(self) -> list[Path]:
        """Where the enclave's interpreter looks for packages, and nowhere else."""
        own = self.package_root or Path(cloister.__file__).parents[1]
        return [own, *dict.fromkeys(Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib"))]

    def _environment(self) -> dict[str, str]:
        """Nothing of the host's environment reaches the enclave but what a process needs to run."""
        return {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "LC_ALL", "TZ") if name in os.environ}

    def wait_ready(self, on_progress: Callable[[float], None] = lambda _share: None) -> dict[str, Any]:
        """Blocks until the model can answer; its description. Raises what the enclave says went wrong."""
        for event in self.events():
            if event.get("event") == "loading":
                on_progress(float(event.get("progress", 0.0)))
            elif event.get("event") == "failed":
                self.stop()
                kind = _FAILURES.get(str(event.get("error")), Unreachable)
                words = {name: str(event.get(name, "")) for name in ("hint", "step")}
                raise kind(str(event.get("message", "The enclave failed.")), **words)
            elif event.get("event") == "ready":
                self._drain = threading.Thread(target=self._read_on, name="enclave-stdout", daemon=True)
                self._drain.start()
                return event
        raise Unreachable(
            f"The enclave ended before it was ready (status {self.wait()}).", hint="See its messages above."
        )

    def events(self) -> Iterator[dict[str, Any]]:
        """All that it says until it ends or is stopped: for who does not `wait_ready`."""
        stdout = self.process.stdout if self.process else None
        while stdout is not None and (line := _next_line(stdout)):
            with contextlib.suppress(ValueError, RecursionError):
                event = json.loads(line)
                if isinstance(event, dict):
                    yield event

    def _read_on(self) -> None:
        for _event in self.events():
            pass

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def wait(self) -> int:
        """Blocks until it ends; its exit status."""
        return self.process.wait() if self.process else 0

    def stop(self, *, grace: float = 5.0) -> None:
        """Asks, waits `grace` seconds, then kills. Safe to call twice, and before the start."""
        process = self.process
        if process is None:
            return
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
        if self.alive:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if self._drain is not None:
            self._drain.join()
        if process.stdout is not None:
            process.stdout.close()
