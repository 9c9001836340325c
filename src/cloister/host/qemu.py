"""The command lines of one virtual machine that runs the measured image: QEMU, and swtpm where no TEE is at hand.

What the guest is handed (`enclave.machine` takes it). Inside it is all the host's word: what of it changes trust is
checked there against the launch digest, which the hardware holds.

```
virtio disk  cloister-boot    one line of JSON (`BootLine`), then zeros up to a whole sector; read-only
virtio disk  cloister-data    the bundle or the model's file, then zeros up to a whole sector; read-only
virtio disk  cloister-root    the image's root file system, where it is not all in the kernel image; read-only
virtio port  cloister.events  from the guest: a line of JSON for each event; QEMU's standard output
network      10.0.2.15:8484   what one port of this machine's loopback leads to, and one more to port 8443 where the
                              enclave has a TLS listener; nowhere else without egress
TDX: MRCONFIGID is the launch digest and 16 zero bytes; SEV-SNP: HOST_DATA is it. vTPM: the image extends PCR 14 by it.
```

Disks, not systemd's credentials: a host that may set credentials may add units, and no register tells of it.

Sources: QEMU's manual, "Confidential guest support" (TDX from QEMU 10.1, SEV-SNP from 9.1), "TPM"; swtpm(8).
"""

import base64
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

from cloister.errors import WrongUse

__all__ = [
    "EVENTS",
    "GUEST_PORT",
    "GUEST_TLS_PORT",
    "SECTOR",
    "Accelerator",
    "BootLine",
    "Machine",
    "Tee",
    "find_accelerator",
    "find_tee",
    "machine_command",
    "tpm_command",
    "tpm_server_command",
    "tpm_setup_command",
]

Tee: TypeAlias = Literal["tdx", "sev-snp", "vtpm"]
Accelerator: TypeAlias = Literal["kvm", "tcg"]

EVENTS = "cloister.events"
SECTOR = 512
GUEST_PORT = 8484
GUEST_TLS_PORT = 8443

QUOTES = MappingProxyType({"type": "vsock", "cid": "2", "port": "4050"})
"""Where Intel's quote generation service listens: on the host, at its usual port."""

SNP_POLICY = 0x30000
"""SMT allowed, the reserved bit 17 that must be one; no debugging, no migration agent."""

_MIB = 1 << 20
_SWITCHES: tuple[tuple[str, Tee], ...] = (
    ("sys/module/kvm_intel/parameters/tdx", "tdx"),
    ("sys/module/kvm_amd/parameters/sev_snp", "sev-snp"),
)
_CPU_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BootLine:
    """What the disk `cloister-boot` says. `launch`, `config`: exact bytes. `data`: what the disk `cloister-data` holds, and
    `data_bytes` how much of it; None without such a disk. `model_name` is for people. `api_keys`: each one's name and its
    SHA-256 in hex. `endorsements`: the vendor's collateral. `tls_port`, `tls_origins`: where the guest listens, and how
    clients know it, where the configuration says `tls`. `founds_group`: this start begins the configuration's group."""

    launch: bytes
    config: bytes
    data: Literal["bundle", "model"] | None = None
    data_bytes: int = 0
    model_name: str = ""
    api_keys: tuple[tuple[str, str], ...] = ()
    endorsements: bytes = b""
    tls_port: int | None = None
    tls_origins: tuple[str, ...] = ()
    founds_group: bool = False

    def encode(self) -> bytes:
        """Whole sectors."""
        further = {
            "api_keys": [{"name": name, "sha256": digest} for name, digest in self.api_keys],
            "endorsements": base64.b64encode(self.endorsements).decode(),
            "founds_group": self.founds_group,
            "tls_origins": list(self.tls_origins),
            "tls_port": self.tls_port,
        }
        said = {
            **{name: value for name, value in further.items() if value},
            "config": base64.b64encode(self.config).decode(),
            "data": self.data,
            "data_bytes": self.data_bytes,
            "launch": base64.b64encode(self.launch).decode(),
            "model_name": self.model_name,
            "port": GUEST_PORT,
            "v": 1,
        }
        line = json.dumps(said, separators=(",", ":")).encode() + b"\n"
        return line + bytes(-len(line) % SECTOR)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One virtual machine. `kernel`: the unified kernel image, started by QEMU's `-kernel`. `firmware`: an OVMF with its
    variables, in one file. `boot`, `data`, `root`: files of the disks. `port` of this machine's loopback leads to the
    guest, and `tls_port`, if there is one, to its TLS listener. `egress`: whether the guest reaches the network. `tpm`: swtpm's control socket, where `tee` is "vtpm".
    `cpu`: QEMU's word for a CPU; the launch digest of SEV-SNP depends on it, and on `cores`. `c_bit`: the host CPU's, of
    CPUID 0x8000001F.

    Raises: WrongUse for a vTPM without a socket, a TEE without KVM, a launch digest of another size.
    """

    tee: Tee
    accelerator: Accelerator
    kernel: Path
    firmware: Path
    boot: Path
    launch_sha256: bytes
    memory_bytes: int
    cores: int
    port: int
    data: Path | None = None
    root: Path | None = None
    tls_port: int | None = None
    egress: bool = False
    tpm: Path | None = None
    cpu: str = ""
    c_bit: int = 51
    binary: str = field(default="qemu-system-x86_64")

    def __post_init__(self) -> None:
        if self.tee not in get_args(Tee) or self.accelerator not in get_args(Accelerator):
            raise WrongUse("There is no such machine.", expected=" or ".join(get_args(Tee)), got=ascii(self.tee)[:40])
        if (self.tpm is not None) != (self.tee == "vtpm"):
            raise WrongUse("A software TPM stands where no TEE does, and only there.", got=self.tee)
        if self.tee != "vtpm" and self.accelerator != "kvm":
            raise WrongUse(f"{self.tee} needs KVM.", expected="kvm", got=self.accelerator)
        if len(self.launch_sha256) != 32:
            raise WrongUse("A launch digest has 32 bytes.", got=str(len(self.launch_sha256)))
        if self.cpu and not _CPU_NAME.fullmatch(self.cpu):
            raise WrongUse("That is no CPU of QEMU's.", hint="`qemu-system-x86_64 -cpu help` names them.")
        if self.memory_bytes < 256 * _MIB or self.cores < 1:
            raise WrongUse("A virtual machine takes 256 MiB and a core at least.", step="resources")


def find_tee(root: Path = Path("/")) -> Tee | None:
    """What this host can start guests in, by what KVM's modules say; None: no TEE."""
    for name, tee in _SWITCHES:
        try:
            if (root / name).read_text().strip() in ("Y", "1"):
                return tee
        except OSError:
            continue
    return None


def find_accelerator(root: Path = Path("/")) -> Accelerator:
    """KVM where this process may open it and the CPU can run guests; otherwise every instruction is emulated, twenty times
    slower."""
    try:
        flags = set((root / "proc/cpuinfo").read_text().split())
    except OSError:
        flags = set()
    usable = os.access(root / "dev/kvm", os.R_OK | os.W_OK) and not flags.isdisjoint(("vmx", "svm"))
    return "kvm" if usable else "tcg"


def machine_command(machine: Machine) -> tuple[str, ...]:
    """QEMU, which ends when the calling thread does. Nothing of the host's configuration counts, no shell is involved."""
    return (
        *("setpriv", "--pdeathsig", "KILL", "--", machine.binary),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny"),
        *_board(machine),
        *("-cpu", machine.cpu or _default_cpu(machine)),
        *("-smp", str(machine.cores), "-m", f"{machine.memory_bytes // _MIB}M"),
        *("-bios", str(machine.firmware), "-kernel", str(machine.kernel)),
        *_disk("boot", machine.boot),
        *(_disk("data", machine.data) if machine.data else ()),
        *(_disk("root", machine.root) if machine.root else ()),
        *("-netdev", _network(machine), "-device", "virtio-net-pci,netdev=net,romfile="),
        *("-chardev", "file,id=events,path=/dev/stdout", "-device", "virtio-serial-pci"),
        *("-device", f"virtserialport,chardev=events,name={EVENTS}", "-serial", "null"),
        *("-device", "virtio-rng-pci"),
        *(_tpm(machine.tpm) if machine.tpm else ()),
    )


def tpm_setup_command(state: Path) -> tuple[str, ...]:
    """Makes a new software TPM in the empty folder `state`, with seeds, and so keys, of its own."""
    return ("swtpm_setup", "--tpm2", "--tpmstate", str(state), "--pcr-banks", "sha256")


def tpm_command(state: Path, control: Path) -> tuple[str, ...]:
    """The software TPM. It ends with the connection, and with the calling thread."""
    return (
        *("setpriv", "--pdeathsig", "KILL", "--", "swtpm", "socket", "--tpm2", "--terminate"),
        *("--tpmstate", f"dir={state}", "--ctrl", f"type=unixio,path={control}"),
    )


def tpm_server_command(state: Path, path: Path) -> tuple[str, ...]:
    """The same TPM for programs of this machine, on a Unix socket, while nothing has booted on it."""
    return (
        *("setpriv", "--pdeathsig", "KILL", "--", "swtpm", "socket", "--tpm2", "--flags", "startup-clear"),
        *("--tpmstate", f"dir={state}", "--server", f"type=unixio,path={path}"),
        *("--ctrl", f"type=unixio,path={path}.ctrl"),
    )


def _board(machine: Machine) -> tuple[str, ...]:
    if machine.tee == "tdx":
        launch = base64.b64encode(machine.launch_sha256 + bytes(16)).decode()
        tee = {"qom-type": "tdx-guest", "id": "tee", "mrconfigid": launch, "quote-generation-socket": dict(QUOTES)}
        board = "q35,accel=kvm,kernel-irqchip=split,smm=off,hpet=off,confidential-guest-support=tee"
        return "-object", json.dumps(tee, separators=(",", ":")), "-machine", board
    if machine.tee == "sev-snp":
        host_data = base64.b64encode(machine.launch_sha256).decode()
        tee_options = f"sev-snp-guest,id=tee,cbitpos={machine.c_bit},reduced-phys-bits=1,policy={SNP_POLICY:#x}"
        memory = f"memory-backend-memfd,id=ram,size={machine.memory_bytes // _MIB}M,share=true,prealloc=false"
        return (
            *("-object", f"{tee_options},kernel-hashes=on,host-data={host_data}", "-object", memory),
            *("-machine", "q35,accel=kvm,smm=off,confidential-guest-support=tee,memory-backend=ram"),
        )
    return "-machine", "q35,smm=off", "-accel", machine.accelerator + (",thread=multi" * (machine.accelerator == "tcg"))


def _default_cpu(machine: Machine) -> str:
    if machine.tee == "sev-snp":
        return "EPYC-v4"
    return "host" if machine.accelerator == "kvm" else "max"


def _disk(name: str, path: Path) -> tuple[str, ...]:
    drive = f"if=none,id={name},format=raw,readonly=on,file={_escaped(path)}"
    return "-drive", drive, "-device", f"virtio-blk-pci,drive={name},serial=cloister-{name}"


def _network(machine: Machine) -> str:
    restrict = "off" if machine.egress else "on"
    ways = {machine.port: GUEST_PORT, **({machine.tls_port: GUEST_TLS_PORT} if machine.tls_port else {})}
    forwards = "".join(f",hostfwd=tcp:127.0.0.1:{port}-10.0.2.15:{inside}" for port, inside in ways.items())
    return f"user,id=net,restrict={restrict},ipv6=off{forwards}"


def _tpm(control: Path) -> tuple[str, ...]:
    return (
        *("-chardev", f"socket,id=tpm,path={_escaped(control)}"),
        *("-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm0"),
    )


def _escaped(path: Path) -> str:
    """In a list of options, a comma is written twice."""
    return str(path).replace(",", ",,")
