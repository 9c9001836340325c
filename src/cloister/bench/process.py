"""Processes that a measurement needs beside itself, and what they cost: started here, ended here, asked line by line."""

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from cloister.errors import ConnectionFailed

__all__ = ["Process", "answer_lines", "cpu_seconds", "free_port", "module", "server", "started"]


@dataclass(frozen=True, slots=True)
class Process:
    """One process that answers each line with one line of JSON."""

    process: subprocess.Popen[str]

    @property
    def pid(self) -> int:
        return self.process.pid

    def ask(self, line: str) -> Any:
        """Raises: ConnectionFailed when it is gone."""
        if self.process.stdin is None or self.process.stdout is None:
            raise ConnectionFailed("A process of the benchmark has no pipes.")
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError) as error:
            raise ConnectionFailed("A process of the benchmark ended early.", hint="See its words above.") from error


def module(name: str, *arguments: object) -> list[str]:
    """The command that runs a module of ours in an interpreter like this one."""
    return [sys.executable, "-m", name, *map(str, arguments)]


@contextmanager
def started(
    argv: Sequence[str], *, what: str, hint: str = "Is the engine built? Run `make setup`."
) -> Iterator[Process]:
    """Started, and told to end by closing its standard input. It says `ready` on a line of its own once it can answer.

    Raises: ConnectionFailed when it does not.
    """
    with subprocess.Popen(list(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        if process.stdin is None or process.stdout is None or process.stdout.readline() != "ready\n":
            raise ConnectionFailed(f"{what} did not start.", hint=hint)
        yield Process(process)


async def answer_lines(answer: Callable[[], Any]) -> None:
    """The child's side: `ready`, then one answer for each line, until nobody asks any more."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while await asyncio.to_thread(sys.stdin.readline):
        sys.stdout.write(json.dumps(answer()) + "\n")
        sys.stdout.flush()


def server(app: Any) -> uvicorn.Server:
    """As the enclave's front serves its gateway."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http="httptools",
            loop="uvloop",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            ws="none",
            timeout_graceful_shutdown=2,
        )
    )


def free_port() -> int:
    """One that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process so far, its children's left out: clock_getcpuclockid(3) by its number (Linux).

    Raises: OSError when it is gone.
    """
    return time.clock_gettime((~pid << 3) | 2)
