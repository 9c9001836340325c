"""A measurement in a process of its own, which tells what it finds in lines of JSON on standard output.

A model file may make llama.cpp abort, and what one measurement leaves in memory must not be in the next one's way.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cloister.enclave.llm.llama.wire import decode_error, encode_error
from cloister.errors import CloisterError, EngineDied

__all__ = ["Child", "run_child", "start_child", "tell"]


class Child:
    """The parent's end: `hear` one message after the other, `ask` in between."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

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
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise decode_error(message["error"])
        return message

    def _ended(self) -> EngineDied:
        return EngineDied(
            f"The measuring process ended by itself (status {self._process.wait()}).",
            hint="The model file may be damaged, or too large for this machine's memory.",
        )


@contextmanager
def start_child(module: str, *arguments: str) -> Iterator[Child]:
    """`python -m module arguments`, which calls `run_child`; ended when the block is left, whatever it is doing."""
    argv = [sys.executable, "-m", module, *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield Child(process)
        finally:
            process.kill()


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
