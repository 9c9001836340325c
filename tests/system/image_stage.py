"""A machine of our own for the measured image: QEMU without a real CPU's help, OVMF, and a TPM in software that its maker
certified and its verifier enrolled."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.system.shell import ROOT, Shell, free_port, tool

from cloister.cli.sealed import config_for
from cloister.cli.vm_backend import VmBackend, guest_events, listens
from cloister.cli.vm_backend import _Running as Running
from cloister.deploy.predict import predict_pcrs
from cloister.deploy.uki import parse_image
from cloister.errors import VerificationFailed
from cloister.host.backend import Spawn
from cloister.host.qemu import GUEST_TLS_PORT, BootLine, Machine, machine_command, tpm_command
from cloister.models.store import LocalModel
from cloister.owner.appfile import AppFile
from cloister.owner.deployment import launch_bytes, owner_name
from cloister.owner.package import Package, package
from cloister.owner.provision import contents, provision
from cloister.verify.factors import Factor
from cloister.verify.policy import Policy

FIRMWARE = Path("/usr/share/ovmf/OVMF.fd")
MEMORY = 2 << 30
TLS_ORIGINS = ("https://localhost:8501",)
AUTHORITIES = "--ca ca/issuercert.pem --ca ca/swtpm-localca-rootca-cert.pem"


@dataclass(frozen=True)
class SoftwareTpm:
    """One TPM's state on disk. `pin`: the digest of its own attestation key's name, enrolled by its maker's certificate."""

    state: Path
    pin: str


def make_tpm(folder: Path) -> SoftwareTpm:
    """Enrolled: before anything boots on its machine, and once for all."""
    manufacture(folder)
    return SoftwareTpm(folder / "state", _enrol(folder))


def manufacture(folder: Path) -> None:
    """A TPM in software, certified by an authority of its own."""
    for name in ("ca", "state"):
        (folder / name).mkdir()
    authority = {"statedir": "ca", "signingkey": "ca/signkey.pem", "issuercert": "ca/issuercert.pem"}
    lines = [f"{name} = {folder / path}" for name, path in {**authority, "certserial": "ca/certserial"}.items()]
    (folder / "authority.conf").write_text("\n".join(lines) + "\n")
    (folder / "authority.options").write_text("--platform-manufacturer None\n")
    (folder / "setup.conf").write_text(
        f"create_certs_tool = {tool('swtpm_localca')}\n"
        f"create_certs_tool_config = {folder}/authority.conf\ncreate_certs_tool_options = {folder}/authority.options\n"
    )
    setup = [tool("swtpm_setup"), "--tpm2", "--tpmstate", f"{folder}/state", "--config", f"{folder}/setup.conf"]
    command = [*setup, "--create-ek-cert", "--pcr-banks", "sha256", "--logfile", f"{folder}/log"]
    made = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert made.returncode == 0, (folder / "log").read_text()


def _enrol(folder: Path) -> str:
    """As docs/image.md says; both sides are this one. The key's digest."""
    shell = Shell(folder)
    with served(folder) as tcti:
        for command in (
            f"cloister tpm show --tcti {tcti} > tpm.json",
            f"cloister tpm challenge tpm.json {AUTHORITIES} --keep kept > challenge.json",
            f"cloister tpm answer challenge.json --tcti {tcti} > answer.json",
            "cloister tpm pin answer.json --kept kept",
        ):
            ran = shell.run(command)
            assert ran.returncode == 0, ran.stderr
    (pin,) = re.findall(r'^platform_ids = \["([0-9a-f]{64})"\]$', ran.stdout, re.MULTILINE)
    return str(pin)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """To programs of this machine, while nothing has booted on it."""
    path = folder / "s"
    command = [tool("swtpm"), "socket", "--tpm2", "--tpmstate", f"dir={folder}/state", "--flags", "startup-clear"]
    channels = ["--server", f"type=unixio,path={path}", "--ctrl", f"type=unixio,path={path}.ctrl"]
    process = subprocess.Popen([*command, *channels], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _until(process, lambda: listens(path))
        yield f"swtpm:path={path}"
    finally:
        process.terminate()
        process.wait(20)


def _until(process: "subprocess.Popen[bytes]", ready: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not ready():
        assert process.poll() is None, "swtpm ended"
        assert time.monotonic() < until, "swtpm was not ready in time"
        time.sleep(0.02)


@dataclass
class Guest:
    """A machine that runs. `events`: all that the enclave said so far. `tls_port`: its TLS listener's, 0 without one."""

    port: int
    console: Path
    process: "subprocess.Popen[bytes]"
    events: list[dict[str, Any]] = field(default_factory=list)
    arrived: threading.Condition = field(default_factory=threading.Condition)
    tls_port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def until(self, *names: str, patience: float = 900) -> dict[str, Any]:
        """Waits for an event of one of these names; whatever else there is, `failed` ends it too."""
        with self.arrived:
            self.arrived.wait_for(lambda: self._found(names) is not None or self.process.poll() is not None, patience)
            found = self._found(names)
        assert found is not None, f"{self.events}\n{self.console.read_text(errors='replace')[-3000:]}"
        return found

    def _found(self, names: tuple[str, ...]) -> dict[str, Any] | None:
        return next((event for event in self.events if event["event"] in (*names, "failed")), None)

    def listen(self, events: Iterator[dict[str, Any]]) -> None:
        for event in events:
            with self.arrived:
                self.events.append(event)
                self.arrived.notify_all()
        with self.arrived:
            self.arrived.notify_all()


@contextmanager
def booted(
    tpm: SoftwareTpm,
    *,
    kernel: Path,
    boot: bytes,
    launch_sha256: bytes,
    root: Path | None,
    data: Path | None = None,
    cores: int = 2,
) -> Iterator[Guest]:
    """Started by QEMU's own loader, with these disks. Ends with the block."""
    folder = Path(tempfile.mkdtemp(prefix="guest-"))  # a socket's path has to be short
    (folder / "boot").write_bytes(boot)
    machine = Machine(
        tee="vtpm",
        accelerator="tcg",
        kernel=kernel,
        firmware=FIRMWARE,
        boot=folder / "boot",
        launch_sha256=launch_sha256,
        memory_bytes=MEMORY,
        cores=cores,
        port=free_port(),
        data=data,
        root=root,
        tpm=folder / "tpm",
    )
    command = list(machine_command(machine))
    command[command.index("-serial") + 1] = f"file:{folder / 'console'}"
    with running(folder, command, tpm, machine.port) as guest:
        yield guest


@contextmanager
def running(folder: Path, command: list[str], tpm: SoftwareTpm, port: int) -> Iterator[Guest]:
    chip = subprocess.Popen(
        tpm_command(tpm.state, folder / "tpm"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _until(chip, (folder / "tpm").exists)
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        guest = Guest(port, folder / "console", process)
        listening = threading.Thread(target=guest.listen, args=(guest_events(process.stdout),))
        listening.start()
        try:
            yield guest
        finally:
            process.terminate()
            process.wait(20)
            listening.join(20)
            assert process.stdout is not None
            process.stdout.close()
    finally:
        chip.terminate()
        chip.wait(20)
        shutil.rmtree(folder)


@contextmanager
def hosted(backend: VmBackend, spawn: Spawn) -> Iterator[Guest]:
    """Started as `cloister host --backend vm` does."""
    enclave = backend.start(spawn)
    assert isinstance(enclave, Running)
    guest = Guest(enclave.port, Path(os.devnull), enclave._process, tls_port=enclave.tls_port)
    listening = threading.Thread(target=guest.listen, args=(enclave.events(),))
    listening.start()
    try:
        yield guest
    finally:
        enclave.stop()
        listening.join(20)


def in_sectors(content: bytes, path: Path) -> Path:
    path.write_bytes(content + bytes(-len(content) % 512))
    return path


@dataclass(frozen=True)
class Built:
    kernel: Path
    disk: Path


def build(*options: str, name: str = "image") -> Built:
    """From the cache, where nothing changed."""
    folder = ROOT / "build" / name
    recipe = ROOT / "packaging" / "image" / "build.py"
    subprocess.run([sys.executable, recipe, "--output", folder, *options], check=True)
    return Built(folder / "cloister.efi", folder / "cloister.raw")


@dataclass(frozen=True)
class Sealed:
    """An app's bundle, as the data disk holds it, and what its owner has. `boot`: the boot disk."""

    app: AppFile
    made: Package
    owner: Ed25519PrivateKey
    launch: bytes
    config: bytes
    boot: bytes

    def release(self, url: str, policy: Policy, **secrets: str) -> None:
        given = contents(self.app, self.made.keys, secrets=secrets, now=time.time())
        provision(url, policy=policy, owner=self.owner, release=given)


def seal(folder: Path, app: AppFile, *, model: LocalModel | None = None, tls: bool = False) -> Sealed:
    owner = Ed25519PrivateKey.generate()
    made = package(app, folder / "app.cloister", state=folder / "state", model=model)
    config = config_for(made.head, "vtpm", slots=2, tls=tls).encode()
    launch = launch_bytes(made.head, owner_key=owner_name(owner), deployment="acme", release=1, config=config)
    line = BootLine(
        launch=launch,
        config=config,
        data="bundle",
        data_bytes=made.path.stat().st_size,
        tls_port=GUEST_TLS_PORT if tls else None,
        tls_origins=TLS_ORIGINS if tls else (),
    )
    in_sectors(made.path.read_bytes(), made.path)
    return Sealed(app, made, owner, launch, config, line.encode())


def policy_text(kernel: Path, tpm: SoftwareTpm, owner: Ed25519PrivateKey, *lines: str, tolerated: str = "") -> str:
    """What an auditor writes who has the image, and enrolled the TPM: nothing of it came from the machine."""
    pcrs = predict_pcrs(parse_image(kernel.read_bytes()), started_by="qemu")
    entry = ", ".join(f'pcr{index} = "{value.hex()}"' for index, value in sorted(pcrs.items()))
    return "\n".join(
        (
            f'version = 1\ndeployment = "acme"\nowner_key = "{owner_name(owner)}"',
            f'platforms = ["vtpm"]\ndangerously_tolerate_insecure = ["api-keys-off"{tolerated}]',
            *lines,
            f"[measurements]\nvtpm = [{{ {entry} }}]",
            f'[limits]\nplatform_ids = ["{tpm.pin}"]\n',
        )
    )


def with_changed_command_line(kernel: Path, changed: Path) -> Path:
    """One byte of it: the machine boots as well as with the other one, and would do the same."""
    content = kernel.read_bytes()
    assert content.count(b" quiet ") == 1
    changed.write_bytes(content.replace(b" quiet ", b" quieT "))
    return changed


def failing(error: VerificationFailed) -> set[str]:
    judged = [factor for factor in error.factors if isinstance(factor, Factor)]
    return {factor.step for factor in judged if factor.verdict == "fail"}
