"""What a large bundle costs on its way: packaged, brought to a host, opened; how fast, and in how much memory.

Every step runs in a process of its own, which tells what it took: `python -m cloister.bench.bundle package APP OUT STATE`,
`… open BUNDLE STATE`. The upload is the command line's affair, and is measured there with `measure`.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloister.bench import process
from cloister.bench.child import Child, run_child, tell
from cloister.enclave.runtime.opening import SealedBundle
from cloister.models.store import LocalModel
from cloister.owner import filekeys
from cloister.owner.appfile import AppFile
from cloister.owner.package import package

__all__ = ["Step", "heard", "main", "measure", "write_app"]

_APP = 'def app(environ, start_response):\n    start_response("200 OK", [])\n    return [b"here"]\n'
_BLOCK = 8 << 20
_WEIGHTS = "weights.bin"


@dataclass(frozen=True, slots=True)
class Step:
    """`size`: bytes that it went over. `cpu`: seconds of its process's own time, all threads. `before` and `peak`: bytes that its process had in memory when it began, and at most;
    what a bundle is opened into is not the process's own, and is not counted."""

    name: str
    size: int
    seconds: float
    cpu: float
    before: int
    peak: int

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.size / self.seconds

    @property
    def growth(self) -> int:
        """Bytes of memory that the work took."""
        return self.peak - self.before

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.name,
            "bytes": self.size,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu,
            "mb_per_second": self.rate / 1e6,
            "before_bytes": self.before,
            "peak_bytes": self.peak,
            "growth_bytes": self.growth,
        }


def write_app(folder: Path, size: int) -> AppFile:
    """An app of a few lines, with a model file of `size` bytes that nothing can make smaller. Raises: OSError."""
    code = folder / "app"
    code.mkdir(parents=True)
    (code / "main.py").write_text(_APP)
    left = size
    with (folder / _WEIGHTS).open("wb") as file:
        while left:
            left -= file.write(os.urandom(min(left, _BLOCK)))
    return _app(folder)


def _app(folder: Path) -> AppFile:
    code = folder / "app"
    return AppFile(folder=code, name="large", kind="wsgi", entry="main:app", model=_WEIGHTS, code=code)


def measure(name: str, work: Callable[[], int]) -> None:
    """In the child: runs `work`, which returns over how many bytes it went, and tells the step that it was."""
    before, ran, began = process.memory(os.getpid(), "VmRSS"), time.process_time(), time.perf_counter()
    size = work()
    seconds, cpu = time.perf_counter() - began, time.process_time() - ran
    tell(name=name, size=size, seconds=seconds, cpu=cpu, before=before, peak=process.memory(os.getpid(), "VmHWM"))


def heard(child: Child) -> Step:
    """In the parent: the step that a child told. Raises: what it raised; EngineDied."""
    return Step(**child.hear())


def main(arguments: Sequence[str]) -> None:
    step, *places = arguments
    paths = [Path(place) for place in places]
    if step == "package":
        folder, out, state = paths
        measure(step, lambda: _package(folder, out, state))
    else:
        bundle, state = paths
        measure(step, lambda: _open(bundle, state))


def _package(folder: Path, out: Path, state: Path) -> int:
    weights = folder / _WEIGHTS
    made = package(_app(folder), out, state=state, model=LocalModel(weights, _WEIGHTS, "random bytes"))
    return made.head.total


def _open(path: Path, state: Path) -> int:
    with SealedBundle(path) as bundle:
        bundle.open(filekeys.load(state, bundle.head))
        return sum(os.fstat(descriptor).st_size for descriptor in bundle.files.values())


if __name__ == "__main__":
    run_child(main)
