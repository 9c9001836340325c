"""What a group of processes takes, as the kernel counts it (Linux)."""

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Usage", "usage_of"]

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Usage:
    """`memory_bytes`: resident. `cpu_seconds`: of all its threads since they began, ended children included."""

    memory_bytes: int
    cpu_seconds: float


def usage_of(groups: Iterable[int], proc: Path = Path("/proc")) -> dict[int, Usage]:
    """By group leader; one that has no process left is not in it."""
    wanted = set(groups)
    found: dict[int, Usage] = {}
    for entry in proc.iterdir() if wanted else ():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError, ValueError, IndexError):  # a process may end while it is looked at
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                group = int(fields[2])
                if group in wanted:
                    before = found.get(group, Usage(0, 0.0))
                    seconds = sum(map(int, fields[11:15])) / _TICKS
                    found[group] = Usage(before.memory_bytes + int(fields[21]) * _PAGE, before.cpu_seconds + seconds)
    return found
