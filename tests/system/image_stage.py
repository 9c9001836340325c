"""A machine of our own for the measured image: QEMU without a real CPU's help, OVMF, and a TPM in software that its maker
certified and its verifier enrolled."""

import hashlib
import json
import secrets
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from tests.system.shell import free_port, tool

from cloister.enclave.attest.device import LinuxDevice
from cloister.enclave.attest.tpm import SubprocessTools, Tpm, Vtpm
from cloister.evidence.tpm import parse_public
from cloister.host.qemu import Machine, machine_command, tpm_command
from cloister.verify.enrol import check_activation, check_endorsement, make_credential
from cloister.verify.policy import Policy

FIRMWARE = Path("/usr/share/ovmf/OVMF.fd")
MEMORY = 2 << 30


@dataclass(frozen=True)
class SoftwareTpm:
    """One TPM's state on disk. `pin`: the digest of its own attestation key's name, enrolled by its maker's certificate."""

    state: Path
    pin: str


def make_tpm(folder: Path) -> SoftwareTpm:
    """Made, certified by an authority of its own, and enrolled: before anything boots on its machine, and once for all."""
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
    return SoftwareTpm(folder / "state", _enrol(folder))


def _enrol(folder: Path) -> str:
    names = ("ca/issuercert.pem", "ca/swtpm-localca-rootca-cert.pem")
    chain = tuple(
        x509.load_pem_x509_certificate((folder / name).read_bytes()).public_bytes(Encoding.DER) for name in names
    )
    roots = frozenset({hashlib.sha256(chain[-1]).hexdigest()})
    with _served(folder) as tcti:
        source = Vtpm(LinuxDevice(), Tpm(SubprocessTools(tcti)))
        ek, ak = source.enrolment()
        certificates = (ek.certificate, *chain)
        checked = check_endorsement(ek.public, certificates, policy=Policy(), now=time.time(), roots=roots)
        assert [factor for factor in checked if factor.verdict == "fail"] == []
        secret = secrets.token_bytes(32)
        credential = make_credential(ek.public, parse_public(ak.public).name, secret, secrets.token_bytes)
        assert check_activation(secret, source.activate(credential.tool_file())).verdict == "pass"
    return parse_public(ak.public).name_digest


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    """To programs of this machine, while nothing has booted on it."""
    path = folder / "s"
    command = [tool("swtpm"), "socket", "--tpm2", "--tpmstate", f"dir={folder}/state", "--flags", "startup-clear"]
    channels = ["--server", f"type=unixio,path={path}", "--ctrl", f"type=unixio,path={path}.ctrl"]
    process = subprocess.Popen([*command, *channels], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _until_there(process, Path(f"{path}.ctrl"))
        yield f"swtpm:path={path}"
    finally:
        process.terminate()
        process.wait(20)


def _until_there(process: "subprocess.Popen[bytes]", path: Path) -> None:
    until = time.monotonic() + 20
    while not path.exists():
        assert process.poll() is None, "swtpm ended"
        assert time.monotonic() < until, "swtpm was not ready in time"
        time.sleep(0.02)


@dataclass
class Guest:
    """A machine that runs. `events`: all that the enclave said so far."""

    port: int
    console: Path
    process: "subprocess.Popen[bytes]"
    events: list[dict[str, Any]] = field(default_factory=list)
    arrived: threading.Condition = field(default_factory=threading.Condition)

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

    def listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self.arrived:
                self.events.append(json.loads(line))
                self.arrived.notify_all()
        with self.arrived:
            self.arrived.notify_all()


@contextmanager
def booted(
    tpm: SoftwareTpm, *, kernel: Path, boot: bytes, launch_sha256: bytes, root: Path | None, data: Path | None = None
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
        cores=2,
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
        _until_there(chip, folder / "tpm")
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        guest = Guest(port, folder / "console", process)
        listening = threading.Thread(target=guest.listen)
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


def in_sectors(content: bytes, path: Path) -> Path:
    path.write_bytes(content + bytes(-len(content) % 512))
    return path
