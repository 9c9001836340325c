"""The host's backend `vm`: an enclave is a virtual machine that boots the measured image, under QEMU.

On a TDX or SEV-SNP host its memory is closed to whoever runs the machine. Elsewhere it has a software TPM, and is for
trying out: whoever runs the machine can read everything.
"""

import collections
import contextlib
import hashlib
import ipaddress
import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from cloister.cli.backend import public_model
from cloister.cli.local import state_directory
from cloister.deploy.entries import Start, predict_entries
from cloister.deploy.sev_snp import SNP_CPU
from cloister.enclave.attest.tpm import SubprocessTools, Tpm
from cloister.enclave.boot import parse_config
from cloister.errors import ConnectionFailed, WrongUse
from cloister.evidence.launch import LaunchConfig, launch_digest, parse_launch
from cloister.evidence.statement import INSECURE_NAMES
from cloister.evidence.tpm import parse_public
from cloister.host.backend import Event, RunningEnclave, Spawn
from cloister.host.process import listen
from cloister.host.qemu import (
    GUEST_TLS_PORT,
    Accelerator,
    BootLine,
    Machine,
    Tee,
    machine_command,
    tpm_command,
    tpm_server_command,
    tpm_setup_command,
)
from cloister.models.store import LocalModel
from cloister.verify import Policy
from cloister.verify.policy import Limits

__all__ = ["VmBackend", "VmSettings", "attestation_key", "guest_events", "listens"]

_MAX_LINE = 64 * 1024
_GRACE = 5.0
_TOOL_SECONDS = 60.0
_PROGRAMS = ("qemu-system-x86_64", "setpriv")
_TPM_PROGRAMS = ("swtpm", "swtpm_setup", "tpm2_createprimary")
_USER_NETWORK = ipaddress.ip_network("10.0.2.0/24")
"""QEMU's, between guest and host: what the guest sends to an address of it (10.0.2.2) arrives at the host's own loopback."""
_INSTALL = "Debian: apt install qemu-system-x86 ovmf swtpm swtpm-tools tpm2-tools."


@dataclass(frozen=True, slots=True, kw_only=True)
class VmSettings:
    """`kernel`: the unified kernel image. `firmware`: OVMF, in one file. `root`: the image's disk, where it has one.
    `tee`: what this host can start guests in ("vtpm" where it has none). `mr_td`: the TDX module's measurement of the
    firmware (96 hexadecimal digits), which is not computed here; on TDX alone. `cpu`: of SEV-SNP, as QEMU names it.
    `state`: where software TPMs are kept, one for each app, so that its keys stay the same."""

    kernel: Path
    firmware: Path
    tee: Tee
    accelerator: Accelerator
    root: Path | None = None
    mr_td: str = ""
    cpu: str = SNP_CPU
    state: Path = field(default_factory=lambda: state_directory() / "vm")


class VmBackend:
    name = "vm"
    bounds_memory = True
    offers_tls = True

    def __init__(self, settings: VmSettings, enrol: Callable[[Path], str] | None = None) -> None:
        """`enrol`: the digest of the key with which the software TPM in a folder will attest.

        Raises: WrongUse for files that cannot be read, programs that are not installed, TDX without `mr_td`;
        MalformedImage."""
        if settings.tee == "tdx" and not settings.mr_td:
            hint = "It stands in the evidence of any start with this firmware; compare it with what the firmware's maker says."
            raise WrongUse(
                "Which firmware is believed has to be said.", expected="--mr-td HEX", step="mr_td", hint=hint
            )
        for program in (*_PROGRAMS, *(_TPM_PROGRAMS if settings.tee == "vtpm" else ())):
            if shutil.which(program) is None:
                raise WrongUse(f"{program} is not installed.", hint=_INSTALL)
        self.platform: str = settings.tee
        self._settings = settings
        self._kernel, self._firmware = _read(settings.kernel), _read(settings.firmware)
        self._core_counts: set[int] = set()
        self._enrol = enrol or attestation_key
        self._keys: dict[str, str] = {}
        predict_entries(self._kernel, self._start())

    def start(self, spawn: Spawn) -> RunningEnclave:
        """Raises: WrongUse for an upstream, for egress to this machine's loopback, and for another model than a public one;
        ConnectionFailed when the software TPM does not start; what `resolve` raises."""
        _refuse_own_loopback(parse_launch(spawn.launch).egress)
        if parse_config(spawn.config).upstream is not None:
            hint = "A model belongs into the bundle."
            raise WrongUse("The host's own servers are not for apps.", hint=hint, step="config")
        model = None if spawn.bundle is not None or spawn.model is None else public_model(spawn.model)
        self._core_counts.add(len(spawn.cores))
        tpm = self._software_tpm(spawn.name) if self.platform == "vtpm" else None
        folder = Path(tempfile.mkdtemp(prefix="cloister-vm-"))
        try:
            return _Running(self._settings, spawn, model, folder, tpm)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def forget(self, name: str) -> None:
        """Its software TPM: an app that comes under the same name gets another."""
        self._keys.pop(name, None)
        shutil.rmtree(self._tpm_folder(name), ignore_errors=True)

    def policy(self, launch: LaunchConfig) -> Policy:
        """The image's predicted measurements. Nobody certified a software TPM: the keys of those started here are pinned, as
        a client's policy has to pin them too."""
        return Policy(
            deployment=launch.deployment,
            owner_key=launch.owner_key,
            app=launch.app.sha256,
            models=frozenset(launch.models) or None,
            config=launch.config_sha256,
            platforms=(self.platform,),
            measurements={self.platform: predict_entries(self._kernel, self._start())},
            limits=Limits(platform_ids=frozenset(self._keys.values()) or None),
            tolerate_insecure=frozenset(INSECURE_NAMES),
        )

    def _software_tpm(self, name: str) -> Path:
        """The folder of this app's, made on the first use, its attestation key noted. Raises: ConnectionFailed."""
        state = self._tpm_folder(name)
        if not state.exists():
            _make_tpm(state)
        if name not in self._keys:
            self._keys[name] = self._enrol(state)
        return state

    def _tpm_folder(self, name: str) -> Path:
        return self._settings.state / hashlib.sha256(name.encode()).hexdigest()[:32]

    def _start(self) -> Start:
        settings = self._settings
        return Start(
            platform=self.platform,
            started_by="qemu",
            firmware=self._firmware,
            vcpus=tuple(sorted(self._core_counts)) or (1,),
            cpu=settings.cpu,
            pins={"mr_td": settings.mr_td} if settings.mr_td else {},
        )


class _Running:
    """`folder` ends with the machine. `tpm`: its software TPM's state, which stays."""

    def __init__(
        self, settings: VmSettings, spawn: Spawn, model: LocalModel | None, folder: Path, tpm: Path | None
    ) -> None:
        wants_tls = parse_config(spawn.config).tls
        # QEMU takes no socket, so it takes the ports when these are closed.
        with listen("127.0.0.1", 0) as sock, listen("127.0.0.1", 0) as tls:
            self.port: int = sock.getsockname()[1]
            self.tls_port: int = tls.getsockname()[1] if wants_tls else 0
        self._folder = folder
        self._lock = threading.Lock()
        self._stopping = False
        machine = _machine(settings, spawn, model, folder, self.port, self.tls_port or None)
        before = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, spawn.cores)  # of this thread: its children inherit it
            self._tpm = _start_tpm(tpm_command(tpm, machine.tpm), machine.tpm.exists) if tpm and machine.tpm else None
            try:
                self._process = _start(machine_command(machine), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            except OSError:
                if self._tpm is not None:
                    _end(self._tpm)
                raise
        finally:
            os.sched_setaffinity(0, before)
        self.pid: int | None = self._process.pid
        self._words = _LastWords(self._process.stderr)

    def events(self) -> Iterator[Event]:
        """Ends with one `failed` where QEMU itself ended in an error."""
        yield from guest_events(self._process.stdout)
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._process.wait(_GRACE) != 0 and not self._stopping:
                message = f"The virtual machine ended: {self._words.text or 'QEMU gave no reason'}."
                yield {"event": "failed", "error": ConnectionFailed.__name__, "message": message}

    def stop(self) -> None:
        self._stopping = True
        with self._lock:
            for process in filter(None, (self._process, self._tpm)):
                _end(process)
            self._words.close()
            shutil.rmtree(self._folder, ignore_errors=True)


def guest_events(stream: IO[bytes] | None) -> Iterator[Event]:
    """A line of JSON each; whatever else the guest says is skipped. A line has at most 64 KiB."""
    while stream is not None:
        try:
            line = stream.readline(_MAX_LINE)
        except ValueError:  # another thread has stopped it, and closed this
            return
        if not line:
            return
        with contextlib.suppress(ValueError, RecursionError):
            event = json.loads(line)
            if isinstance(event, dict):
                yield event


class _LastWords:
    """The last line that QEMU writes as an error, read on so that it never waits for a reader."""

    def __init__(self, stream: IO[bytes] | None) -> None:
        self._lines: collections.deque[bytes] = collections.deque(maxlen=1)
        self._stream = stream
        self._thread = threading.Thread(target=self._read, name="qemu-stderr", daemon=True)
        self._thread.start()

    @property
    def text(self) -> str:
        self._thread.join(_GRACE)
        line = b"".join(self._lines).decode("utf-8", "replace").strip()
        return "".join(letter if letter.isprintable() else " " for letter in line).rstrip(".")[:300]

    def close(self) -> None:
        self._thread.join(_GRACE)
        if self._stream is not None:
            self._stream.close()

    def _read(self) -> None:
        while self._stream is not None and (line := self._stream.readline(_MAX_LINE)):
            self._lines.append(line)


def _machine(
    settings: VmSettings, spawn: Spawn, model: LocalModel | None, folder: Path, port: int, tls_port: int | None
) -> Machine:
    launch = parse_launch(spawn.launch)
    data = spawn.bundle or (model.path if model else None)
    line = BootLine(
        launch=spawn.launch,
        config=spawn.config,
        data="bundle" if spawn.bundle else "model" if model else None,
        data_bytes=data.stat().st_size if data else 0,
        model_name=model.name if model else "",
        tls_port=GUEST_TLS_PORT if tls_port else None,
        tls_origins=spawn.tls_origins if tls_port else (),
    )
    boot = folder / "boot"
    boot.write_bytes(line.encode())
    return Machine(
        tee=settings.tee,
        accelerator=settings.accelerator,
        kernel=settings.kernel,
        firmware=settings.firmware,
        boot=boot,
        data=data,
        root=settings.root,
        launch_sha256=launch_digest(spawn.launch),
        memory_bytes=spawn.memory_bytes,
        cores=len(spawn.cores),
        port=port,
        tls_port=tls_port,
        egress=bool(launch.egress),
        tpm=folder / "tpm.sock" if settings.tee == "vtpm" else None,
        cpu=settings.cpu if settings.tee == "sev-snp" else "",
    )


def _refuse_own_loopback(egress: Sequence[str]) -> None:
    """Names need no look: they lead to public addresses alone (`pyapp.egress`). Raises: WrongUse."""
    for entry in egress:
        with contextlib.suppress(ipaddress.AddressValueError):
            if (address := ipaddress.IPv4Address(entry.partition(":")[0])) in _USER_NETWORK:
                raise WrongUse(
                    f"The app's egress names an address of the host's own: {address}.",
                    hint="The network 10.0.2.0/24 lies between the machine and its host. Name another address.",
                    step="egress",
                )


def attestation_key(state: Path) -> str:
    """What a policy's `limits.platform_ids` names the software TPM in `state` by: the digest of its attestation key's name.

    Raises: ConnectionFailed when the TPM, or the tpm2-tools, do not work.
    """
    with tempfile.TemporaryDirectory(prefix="cloister-vm-") as folder:
        path = Path(folder) / "s"
        process = _start_tpm(tpm_server_command(state, path), lambda: listens(path))
        try:
            return parse_public(Tpm(SubprocessTools(f"swtpm:path={path}")).own_ak().public).name_digest
        finally:
            _end(process)


def _make_tpm(state: Path) -> None:
    """Under another name until it is whole: one that was cut short is never taken for a TPM. Raises: ConnectionFailed."""
    state.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{state.name}.", dir=state.parent))
    command = tpm_setup_command(folder)
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=_TOOL_SECONDS, stdin=subprocess.DEVNULL)
        folder.rename(state)
    except (OSError, subprocess.SubprocessError) as error:
        if not state.exists():  # another start of this app's may have been faster
            raise ConnectionFailed("swtpm_setup failed.", hint=_INSTALL, step="tpm") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def listens(path: Path) -> bool:
    """Whether somebody takes connections at this Unix socket. That it exists does not say so: swtpm makes the one for its
    commands after the other, and listens a moment later."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0


def _start_tpm(command: Sequence[str], ready: Callable[[], bool]) -> subprocess.Popen[bytes]:
    """Returns when it is. Raises: ConnectionFailed."""
    process = _start(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + _TOOL_SECONDS
    while not ready():
        if process.poll() is not None or time.monotonic() > until:
            _end(process)
            raise ConnectionFailed("The software TPM did not start.", hint=_INSTALL, step="tpm")
        time.sleep(0.01)
    return process


def _start(command: Sequence[str], *, stdout: int, stderr: int) -> subprocess.Popen[bytes]:
    """With nothing of the host's environment but where programs are."""
    environment = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=environment, process_group=0
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks, waits a little, then kills. Idempotent."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise WrongUse(f"{path} cannot be read: {error.strerror}.") from error
