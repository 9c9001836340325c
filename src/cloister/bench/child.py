"""A measurement in a process of its own, which tells what it finds in lines of JSON on standard output.

A model file may make llama.cpp abort, and what one measurement leaves in memory must not be in the next one's way.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cloister.enclave.llm.llama.process import HUGE_PAGES
from cloister.enclave.llm.llama.wire import decode_error, encode_error
from cloister.errors import CloisterError, EngineDied

__all__ = ["Child", "module", "run_child", "start_child", "tell"]

_GRACE = 5.0  # seconds in which a child that is asked nothing any more ends by itself
_HINT = "The model file may be damaged, or too large for this machine's memory."


class Child:
    """The parent's end: `hear` one message after the other, `ask` in between. `hint`: what to do when it dies."""

    def __init__(self, process: "subprocess.Popen[str]", hint: str = _HINT) -> None:
        self._process = process
        self._hint = hint

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, line: str) -> None:
        """Raises: EngineDied."""
        if self._process.stdin is None:
            raise EngineDied("The measuring process has no input.")
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended() from error

    def hear(self) -> dict[str, Any]:
        """The next message. Raises: what the child raised, or EngineDied when it ended without a word."""
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise self._ended()
        try:
            message: dict[str, Any] = json.loads(line)
        except ValueError as error:
            raise EngineDied("The measuring process said what is no JSON.", hint=self._hint) from error
        if "error" in message:
            raise decode_error(message["error"])
        return message

    def answer(self, line: str) -> dict[str, Any]:
        """What it says to `line`. Raises: as `ask` and `hear`."""
        self.ask(line)
        return self.hear()

    def _ended(self) -> EngineDied:
        return EngineDied(f"The measuring process ended by itself (status {self._process.wait()}).", hint=self._hint)


def module(name: str, *arguments: object) -> list[str]:
    """The command that runs a module of ours in an interpreter like this one."""
    return [sys.executable, "-m", name, *map(str, arguments)]


@contextmanager
def start_child(argv: Sequence[str], *, hint: str = _HINT, quiet: bool = True, engine: bool = False) -> Iterator[Child]:
    """A command whose process tells as `tell` does. `quiet`: its standard error is nobody's business. `engine`: memory
    is given to it as to the engine's own process.

    When the block is left, its standard input is closed, which ends whoever reads it; whoever does not is killed, and at
    once when the block was left by an exception.
    """
    pipe, errors = subprocess.PIPE, subprocess.DEVNULL if quiet else None
    environment = {**os.environ, **HUGE_PAGES} if engine else None
    with subprocess.Popen(list(argv), stdin=pipe, stdout=pipe, stderr=errors, text=True, env=environment) as process:
        try:
            yield Child(process, hint)
            _close(process)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
        finally:
            process.kill()
            _close(process)


def _close(process: "subprocess.Popen[str]") -> None:
    """Its standard input, whether or not there is still somebody to read what was written last."""
    with contextlib.suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()


def tell(**message: Any) -> None:
    """From the child to its parent, at once."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def run_child(main: Callable[[Sequence[str]], None]) -> None:
    """Run `main` with the command line's arguments; what it raises of ours is raised again in the parent."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl+C reaches both of us, and one message is enough
    try:
        main(sys.argv[1:])
    except CloisterError as error:
        tell(error=encode_error(error))
