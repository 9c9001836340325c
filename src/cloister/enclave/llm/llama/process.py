"""Starting and ending engines: a locked-down child process, or the same service in a thread."""

import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cloister
from cloister.enclave.llm.llama.child import BEAT_SIZE, Service
from cloister.enclave.llm.llama.config import LoopSettings

__all__ = ["EXIT_DIED", "EXIT_HUNG", "HUGE_PAGES", "Running", "spawn"]

EXIT_DIED = 70
"""In thread mode this process ends with this code when the engine fails."""
EXIT_HUNG = 71
"""And with this one when it hangs."""
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""In an engine's environment: memory is asked for in huge pages, where the kernel gives them."""
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); sys.pycache_prefix = json.loads(sys.argv.pop(1)); "
    "import runpy; runpy.run_module('cloister.enclave.llm.llama.child', run_name='__main__')"
)
"""The child runs the code that this process runs: isolated, without `site`, and with cached bytecode only where this
process uses it too."""
_GRACE = 0.2
"""Seconds for a child to go by itself once its socket is closed."""


@dataclass(frozen=True, slots=True)
class Running:
    """A started engine. `end` kills it (a thread is asked, and waited for) and says, without content, how it ended.

    `pid`: the child's, or 0 for a thread. `beat`: see `read_beat`.
    """

    connection: socket.socket
    beat: mmap.mmap
    end: Callable[[], str]
    pid: int


def spawn(mode: Literal["process", "thread"], model_fd: int, settings: LoopSettings) -> Running:
    """Start an engine on the sealed memory `model_fd`, which stays the caller's. Blocks for the fork alone.

    The child inherits this thread's priority, and dies when this thread ends: call it from a thread that lives long.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            if mode == "thread":
                return _in_thread(ours, theirs.dup(), os.dup(model_fd), settings)
            return _in_child(ours, theirs, model_fd, settings)
        except OSError:
            ours.close()
            raise


def _in_child(ours: socket.socket, theirs: socket.socket, model_fd: int, settings: LoopSettings) -> Running:
    beat_fd = os.memfd_create("beat", os.MFD_CLOEXEC)
    try:
        os.ftruncate(beat_fd, BEAT_SIZE)
        beat = mmap.mmap(beat_fd, BEAT_SIZE)
        child = _start_child(theirs, model_fd, beat_fd, settings)
    finally:
        os.close(beat_fd)

    def end() -> str:
        try:
            code = child.wait(timeout=_GRACE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            return "it was ended"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    return Running(ours, beat, end, child.pid)


def _start_child(
    theirs: socket.socket, model_fd: int, beat_fd: int, settings: LoopSettings
) -> "subprocess.Popen[bytes]":
    words = [str(number) for number in (theirs.fileno(), model_fd, beat_fd, os.getpid())]
    words += [f"{name}={value}" for name, value in settings.encode().items()]
    start = [json.dumps(_search_path()), json.dumps(sys.pycache_prefix)]
    environment = {name: os.environ[name] for name in ("CLOISTER_ENGINE_DIR",) if name in os.environ} | HUGE_PAGES
    return subprocess.Popen(
        [sys.executable, "-I", "-S", *_bytecode_flag(), "-c", _START, *start, *words],
        env=environment,
        pass_fds=(theirs.fileno(), model_fd, beat_fd),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # llama.cpp's last words could quote a prompt
        close_fds=True,
    )


def _search_path() -> list[str]:
    """Where this interpreter looks for packages, in its order: the child looks there and nowhere else.

    Were our own folder always the first, what lies beside us could stand in for the standard library in the child.
    """
    own = str(Path(cloister.__file__).parents[1])
    folders = [folder for folder in sys.path if Path(folder).is_absolute()]
    return folders if own in folders else [*folders, own]


def _bytecode_flag() -> list[str]:
    return ["-B"] if sys.dont_write_bytecode else []


def _in_thread(ours: socket.socket, theirs: socket.socket, model_fd: int, settings: LoopSettings) -> Running:
    """In memory of this process alone: Gramine, for which this is, has no memfd and shares nothing."""
    beat = mmap.mmap(-1, BEAT_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def run() -> None:
        try:
            Service(theirs, model_fd, beat, settings).run()
        except BaseException:  # noqa: BLE001 - nobody can go on after this, and a traceback could quote a prompt
            os._exit(EXIT_DIED)
        finally:
            theirs.close()

    thread = threading.Thread(target=run, name="engine", daemon=True)
    thread.start()

    def end() -> str:
        ours.close()
        thread.join()
        return "it was ended"

    return Running(ours, beat, end, 0)
