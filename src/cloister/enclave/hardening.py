"""Leave nothing behind: no core files, no debugger, no tracebacks with content, front at lower priority."""

import ctypes
import logging
import os
import resource
import sys

__all__ = ["forbid_dumps", "lower_priority", "quiet_logs"]

_PR_SET_DUMPABLE = 4
FRONT_NICENESS = 10


def forbid_dumps() -> None:
    """RLIMIT_CORE 0 and PR_SET_DUMPABLE 0: no core file, no ptrace by others of the same user."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def lower_priority() -> None:
    """By `FRONT_NICENESS`, the calling thread's only (Linux keeps niceness per thread): threads made before keep theirs,
    so that the engine, started and restarted from a thread of its own, needs no privilege to go before it."""
    os.nice(FRONT_NICENESS)


class _PlaceOnly(logging.Formatter):
    """Level, logger, place in the code and the exception's class. The words may hold content, put in by whoever wrote
    them: asyncio's hold a task's result."""

    def format(self, record: logging.LogRecord) -> str:
        text = f"{record.levelname.lower()} {record.name} {record.filename}:{record.lineno}"
        if record.exc_info and record.exc_info[0] is not None:
            return f"{text}: {record.exc_info[0].__name__}"
        return text


def quiet_logs() -> None:
    """Warnings and worse to standard error, without content."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PlaceOnly())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
