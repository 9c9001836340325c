"""`cloister bench bundle`: a large app packaged, uploaded, cut off and gone on with, and opened, on this machine.

Run as a module it is the uploading process: `python -m cloister.cli.bench_bundle URL BUNDLE SHA256 [half]`, with the token on
standard input; with `half` it ends by force when it has sent that much.
"""

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.table import Table

from cloister.bench import bundle as measurements
from cloister.bench import process
from cloister.bench.bundle import Step
from cloister.bench.child import module, run_child, start_child
from cloister.cli import output
from cloister.cli.measuring import machine, measuring_bar, show
from cloister.cli.operator import HostClient, Login
from cloister.cli.output import AsJson
from cloister.cli.quantities import parse_size, show_size
from cloister.errors import Conflict, EngineDied
from cloister.host.store import Store
from cloister.host.tokens import make_token

__all__ = ["bundle", "main", "steps"]

_STEPS = 5
_SETTLED = 0.1
_HALF = "half"
_CHILD = "cloister.bench.bundle"
_UPLOADER = "cloister.cli.bench_bundle"
_HINT = "Its messages are above. Is there room on the disk, and memory for the app?"


def bundle(
    size: Annotated[str, typer.Option(metavar="SIZE", help="Of the app's model file.")] = "2GiB",
    folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where four times as much has room; absent: among temporary files."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """How fast a large app is packaged, uploaded to a host here, and opened, and how much memory that takes."""
    with TemporaryDirectory(prefix="cloister-bundle-", dir=folder) as place, measuring_bar(_STEPS) as step:
        found = steps(Path(place), parse_size(size), step)
    if as_json:
        output.json_value({"machine": machine(), "steps": [one.to_json() for one in found]})
    else:
        _show(found)


def steps(folder: Path, size: int, on_step: Callable[[], None] = lambda: None) -> list[Step]:
    """Packaged; uploaded; uploaded to another host, cut in the middle by the end of the uploading process, and gone on with by
    another one; opened. After an upload what the host took for it. Raises: EngineDied, and what a step raises."""
    measurements.write_app(folder, size)
    sealed, state = folder / "large.cloister", folder / "owner"
    found: list[Step] = []

    def add(step: Step) -> None:
        found.append(step)
        on_step()

    with start_child(module(_CHILD, "package", folder, sealed, state), hint=_HINT, quiet=False) as child:
        add(measurements.heard(child))
    with sealed.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    with _host(folder / "first") as host:
        add(_uploaded(host, sealed, sha256))
        add(host.took("upload, the host"))
    with _host(folder / "second") as host:
        _cut(host, sealed, sha256)
        add(replace(_uploaded(host, sealed, sha256), name="upload gone on with"))
    with start_child(module(_CHILD, "open", sealed, state), hint=_HINT, quiet=False) as child:
        add(measurements.heard(child))
    return found


class _Host:
    """A `cloister host` of its own, of which only the API is used."""

    def __init__(self, url: str, token: str, pid: int) -> None:
        self.url = url
        self.token = token
        self._pid = pid
        self._before = process.memory(pid, "VmRSS")
        self._ran = process.cpu_seconds(pid)
        self.last: Step | None = None

    def offset(self, sha256: str) -> int:
        with HostClient(self.url, Login(self.token)) as client:
            return int(client.get(f"/v1/uploads/{sha256}")["offset"])

    def took(self, name: str) -> Step:
        """For the last upload."""
        if self.last is None:
            raise EngineDied("Nothing was uploaded.")
        cpu, peak = process.cpu_seconds(self._pid) - self._ran, process.memory(self._pid, "VmHWM")
        return replace(self.last, name=name, cpu=cpu, before=self._before, peak=peak)


@contextmanager
def _host(folder: Path) -> Iterator[_Host]:
    state = folder / "host"
    state.mkdir(parents=True)
    token, record = make_token("bench", time.time())
    with closing(Store(state / "host.db")) as store:
        store.add_token(record)
    code = "from cloister.cli.main import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "host", "--state", str(state), "--port", "0"],
        env={**os.environ, "XDG_STATE_HOME": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as running:
        try:
            yield _Host(_address(running), token, running.pid)
        finally:
            running.send_signal(signal.SIGTERM)


def _address(running: "subprocess.Popen[str]") -> str:
    for line in running.stdout or ():
        if line.startswith("ready "):
            return line.split()[1]
    raise EngineDied("The host ended before it was ready.", hint="Try `cloister host`.")


def _uploaded(host: _Host, path: Path, sha256: str) -> Step:
    with start_child(module(_UPLOADER, host.url, path, sha256), hint=_HINT, quiet=False) as child:
        child.ask(host.token)
        host.last = measurements.heard(child)
        return host.last


def _cut(host: _Host, path: Path, sha256: str) -> None:
    """Half of it, by a process that ends by force then; returns when the host has all that was on its way."""
    with start_child(module(_UPLOADER, host.url, path, sha256, _HALF), quiet=False) as child:
        child.ask(host.token)
        with contextlib.suppress(EngineDied):
            child.hear()
    before = -1
    while before != (before := host.offset(sha256)):
        time.sleep(_SETTLED)


def _show(found: Sequence[Step]) -> None:
    table = Table("step", "bytes", "seconds", "MB/s", "CPU seconds", "memory before", "at most", "growth")
    for step in found:
        memory = (show_size(step.before), show_size(step.peak), show_size(step.growth))
        times = (f"{step.seconds:.2f}", f"{step.rate / 1e6:,.0f}", f"{step.cpu:.2f}")
        table.add_row(step.name, f"{step.size:,}", *times, *memory)
    show(table)


# The uploading process


def main(arguments: Sequence[str]) -> None:
    url, path, sha256, *half = arguments
    token = sys.stdin.readline().strip()
    with HostClient(url, Login(token)) as client:
        measurements.measure("upload", lambda: _upload(client, Path(path), sha256, _end_at_half if half else _go_on))


def _go_on(_done: int, _total: int) -> None:
    """Nothing to do."""


def _end_at_half(done: int, total: int) -> None:
    if 2 * done >= total:
        os.kill(os.getpid(), signal.SIGKILL)


def _upload(client: HostClient, path: Path, sha256: str, progress: Callable[[int, int], None]) -> int:
    """How many bytes went up now. Waits while the host has not seen yet that another upload of it ended."""
    while True:
        size = path.stat().st_size
        begun = client.post("/v1/uploads", {"sha256": sha256, "size": size})
        try:
            client.upload(path, sha256, progress)
        except Conflict:
            time.sleep(_SETTLED)
        else:
            return size - int(begun["offset"])


if __name__ == "__main__":
    run_child(main)
