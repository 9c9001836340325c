"""Commands as a person types them, in a home of their own, with this environment's `cloister` on the path."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


def tool(name: str) -> str:
    """A system package's program. Its absence is a failure, never a skip."""
    path = shutil.which(name)
    assert path, f"{name} is missing: install the packages of tools/ci-packages.txt"
    return path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def _group(leader: int) -> list[int]:
    """The processes still alive that were started with, or by, `leader`, a little later."""
    until = time.monotonic() + 10
    while left := [pid for pid in _pids() if _session(pid) == leader]:
        if time.monotonic() > until:
            return left
        time.sleep(0.1)
    return []


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def _session(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[3])


@dataclass(frozen=True, slots=True)
class Shell:
    home: Path

    @property
    def environment(self) -> dict[str, str]:
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "CLOISTER_", "PYTEST"))
        }
        return {**kept, "HOME": str(self.home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def run(self, command: str, *, timeout: float = 120) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command,
            shell=True,
            cwd=self.home,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    @contextmanager
    def background(self, command: str, *, cwd: Path | None = None, patience: float = 60) -> Iterator[list[str]]:
        """Runs until it has printed its `ready` line, yields its lines so far, and ends it with SIGTERM."""
        process = subprocess.Popen(
            f"exec {command}",
            shell=True,
            cwd=cwd or self.home,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        lines: list[str] = []
        until = time.monotonic() + patience
        try:
            while not (lines and lines[-1].startswith("ready ")):
                line = process.stdout.readline()
                assert line, f"{command} ended before it was ready: {lines}"
                assert time.monotonic() < until, f"{command} was not ready in time: {lines}"
                lines.append(line.rstrip("\n"))
            yield lines
        finally:
            process.send_signal(signal.SIGTERM)  # to that one process, as a supervisor would
            process.wait(20)
            assert not _group(process.pid), f"{command} left processes behind"
            process.stdout.close()
