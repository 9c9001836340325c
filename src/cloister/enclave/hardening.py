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
    """The calling thread's only (Linux keeps niceness per thread): threads made before keep theirs, so that the
    engine, started and restarted from a thread of its own, runs at normal priority without any privilege."""
    os.setpriority(os.PRIO_PROCESS, 0, FRONT_NICENESS)


class _ClassOnly(logging.Formatter):
    """Level, logger and the exception's class. A message's arguments and an exception's text may hold content."""

    def format(self, record: logging.LogRecord) -> str:
        text = f"{record.levelname.lower()} {record.name}"
        if record.exc_info and record.exc_info[0] is not None:
            return f"{text}: {record.exc_info[0].__name__}"
        return f"{text}: {record.msg if not record.args else record.msg.split('%')[0]}"


def quiet_logs() -> None:
    """Warnings and worse to standard error, without content."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_ClassOnly())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
