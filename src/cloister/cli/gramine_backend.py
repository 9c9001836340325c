"""The host's backend `gramine`: an enclave of SGX, laid out, signed and started under gramine-sgx.

The host computes the enclave's measurement when it signs, so its own look at the evidence is held against what it
started. Clients take theirs from whoever built the same enclave for themselves: `cloister image gramine`.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cloister.cli.backend import public_model, start_on
from cloister.cli.image_gramine import PLATFORM, Image, boot_lines, build, signing_key
from cloister.deploy.gramine import NAME
from cloister.deploy.gramine_sign import find_gramine, sign
from cloister.errors import WrongUse
from cloister.evidence.launch import LaunchConfig, parse_launch
from cloister.evidence.statement import INSECURE_NAMES
from cloister.host.backend import Event, RunningEnclave, Spawn
from cloister.host.process import EnclaveProcess, listen
from cloister.verify import Policy

__all__ = ["GramineBackend", "epc_bytes"]

_DEVICE = "dev/sgx_enclave"
_PROGRAM = "gramine-sgx"


class GramineBackend:
    name = "gramine"
    platform = PLATFORM
    bounds_memory = True
    offers_tls = False

    def __init__(self, folder: Path, *, root: Path = Path("/")) -> None:
        """`folder`: for the enclaves' files, a part of the host's state. `root`: where /dev and /sys are, for tests. Raises:
        WrongUse where no enclave can run."""
        if not (root / _DEVICE).exists():
            raise WrongUse(
                f"This machine offers no SGX: {root / _DEVICE} is not there.",
                hint="It takes a processor with SGX, switched on in the firmware, and Linux 5.11 or newer. To try it out "
                "without: --backend process",
                step="gramine",
            )
        program = shutil.which(_PROGRAM)
        if program is None:
            raise WrongUse(
                f"`{_PROGRAM}` is not installed.",
                hint="Install Gramine 1.9 (https://gramine.readthedocs.io, package `gramine`).",
                step="gramine",
            )
        self._program = program
        self._gramine = find_gramine()
        self._folder = folder
        self._epc = epc_bytes(root)
        self._measured: dict[LaunchConfig, dict[str, str | int]] = {}
        self._in_use: set[Path] = set()
        self._change = threading.Lock()

    def start(self, spawn: Spawn) -> RunningEnclave:
        """Raises: WrongUse for a sealed app, a model that is a file of this machine, a config that is not for SGX, and memory
        that does not do; what `resolve` and `sign` raise."""
        if spawn.bundle is not None or spawn.model is None:
            hint = "What a bundle holds is opened into memory that only Linux has. Deploy a public model, or to TDX or SEV-SNP."
            raise WrongUse("Sealed apps do not run under Gramine.", hint=hint, step="bundle")
        model = public_model(spawn.model)
        image = Image(
            launch=spawn.launch,
            config=spawn.config,
            model=model.path,
            most=min(spawn.memory_bytes, self._epc) if self._epc else spawn.memory_bytes,
        )
        folder = self._taken(spawn.name)
        try:
            build(folder, image, self._gramine)
            self._measured[parse_launch(spawn.launch)] = sign(folder, signing_key()).entry(spawn.launch)
            with listen("127.0.0.1", 0) as sock:
                port: int = sock.getsockname()[1]
            lines = boot_lines(image, model.name, (), host="127.0.0.1", port=port)
            process = _GramineProcess(lines, (), silent=True, program=self._program, folder=folder)
            return _Running(process, port, spawn.cores, lambda: self._left(folder))
        except BaseException:
            self._left(folder)
            raise

    def forget(self, name: str) -> None:
        """Nothing is kept for one app."""

    def policy(self, launch: LaunchConfig) -> Policy:
        """Of a launch config that was not started here it pins no measurement, and so accepts nothing."""
        measured = self._measured.get(launch)
        return Policy(
            deployment=launch.deployment,
            owner_key=launch.owner_key,
            app=launch.app.sha256,
            models=frozenset(launch.models) or None,
            config=launch.config_sha256,
            platforms=(self.platform,),
            measurements={} if measured is None else {self.platform: (measured,)},
            tolerate_insecure=frozenset(INSECURE_NAMES),
        )

    def _taken(self, name: str) -> Path:
        """A folder for one start alone: another of the same app's may be under way still, though nobody waits for it. What a
        host that was killed left of this app's is removed."""
        of_app = self._folder / name
        with self._change:
            of_app.mkdir(parents=True, exist_ok=True)
            for left in {*of_app.iterdir()} - self._in_use:
                shutil.rmtree(left, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(dir=of_app))
            self._in_use.add(folder)
        return folder

    def _left(self, folder: Path) -> None:
        with self._change:
            shutil.rmtree(folder, ignore_errors=True)
            self._in_use.discard(folder)
            with contextlib.suppress(OSError):  # another start is in there
                folder.parent.rmdir()


def epc_bytes(root: Path = Path("/")) -> int:
    """How much memory this machine has for enclaves: beyond it they are paged, and far slower. 0 where the
    kernel does not say (before Linux 5.17)."""
    found = 0
    for node in root.glob("sys/devices/system/node/node*/x86/sgx_total_bytes"):
        with contextlib.suppress(OSError, ValueError):
            found += int(node.read_text())
    return found


@dataclass(slots=True)
class _GramineProcess(EnclaveProcess):
    """`program`: gramine-sgx. `folder`: where the signed manifest lies."""

    program: str = _PROGRAM
    folder: Path = Path()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [self.program, NAME],
            cwd=self.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if self.silent else None,
            env={name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            process_group=0,
        )
        self._write_boot()

    def _write_boot(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it ended at once, which is told by the end of its events
                self.process.stdin.write(self.boot)
                self.process.stdin.flush()


class _Running:
    def __init__(self, process: EnclaveProcess, port: int, cores: Sequence[int], after: Callable[[], None]) -> None:
        self.port, self.tls_port = port, 0
        self._after = after
        self._process = process
        self._lock = threading.Lock()
        self.pid = start_on(cores, process)

    def events(self) -> Iterator[Event]:
        yield from self._process.events()

    def stop(self) -> None:
        with self._lock:
            self._process.stop()
            self._after()
