"""Which platform this is: what was looked for, in order, and what was found."""

from collections.abc import Callable
from dataclasses import dataclass, field

from cloister.enclave.attest import EvidenceSource, nsm, sev_guest, tdx_guest
from cloister.enclave.attest.azure import (
    AK_CERTIFICATE,
    AK_HANDLE,
    REPORT_INDEX,
    AzureCvm,
    Metadata,
    MetadataService,
    read_hcl,
)
from cloister.enclave.attest.device import Device, LinuxDevice, read_file
from cloister.enclave.attest.fronted import FrontedByTpm
from cloister.enclave.attest.gramine import ATTESTATION, GramineSgx
from cloister.enclave.attest.nvml import LIBRARY, NvidiaGpus
from cloister.enclave.attest.sev_snp import SevSnp
from cloister.enclave.attest.tdx import Tdx
from cloister.enclave.attest.tpm import SubprocessTools, Tpm, TpmTools, Vtpm
from cloister.enclave.attest.tsm import REPORTS, SEV_GUEST, TDX_GUEST, ConfigfsTsm
from cloister.errors import CloisterError, WrongUse
from cloister.evidence.azure import SNP, TDX

__all__ = ["Detection", "Finding", "Machine", "detect", "open_source"]

TPM_DEVICES = ("/dev/tpmrm0", "/dev/tpm0")

_PROVIDERS = {TDX_GUEST: "tdx", SEV_GUEST: "sev-snp"}
_ORDER = ("sgx", "nitro", "azure-tdx", "azure-sev-snp", "tdx", "sev-snp", "vtpm")
"""The first one found is what this is: an enclave before the machine that it runs on, a paravisor before what it hides."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Everything that the drivers reach the outside by; tests give others."""

    device: Device = field(default_factory=LinuxDevice)
    tools: TpmTools = field(default_factory=SubprocessTools)
    metadata: Metadata = field(default_factory=MetadataService)
    gpus: NvidiaGpus = field(default_factory=NvidiaGpus)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked for. `platform`: what it is a sign of, None for something that is not there or does not
    work; `detail` says what was found, or why not; `hint` what to do about it, where this should be such a platform."""

    what: str
    where: str
    platform: str | None
    detail: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Detection:
    """`platform` None: no confidential computing that is known here. `gpus`: NVIDIA GPUs that can attest themselves."""

    platform: str | None
    gpus: int
    findings: tuple[Finding, ...]


def detect(machine: Machine) -> Detection:
    """Looks for everything, and says all of it, also what is there beside the platform. Makes no evidence.

    (1) Gramine, (2) Nitro, (3) configfs-tsm, (4) /dev/tdx_guest and /dev/sev-guest, (5) a TPM, (6) Azure's paravisor
    behind it, (7) GPUs. What is broken counts as absent, with its reason. Raises nothing of its own.
    """
    device = machine.device
    findings = [
        _look(device, "SGX through Gramine", f"{ATTESTATION}/attestation_type", lambda: _gramine(device)),  # (1)
        _look(device, "AWS Nitro", nsm.DEVICE, lambda: ("nitro", "present")),  # (2)
        _look(device, "configfs-tsm", REPORTS, lambda: _tsm(device)),  # (3)
        _look(device, "Intel TDX", tdx_guest.DEVICE, lambda: ("tdx", "present")),  # (4)
        _look(device, "AMD SEV-SNP", sev_guest.DEVICE, lambda: ("sev-snp", "present")),
    ]
    path = next((path for path in TPM_DEVICES if device.exists(path)), TPM_DEVICES[0])
    findings.append(_look(device, "TPM 2.0", path, lambda: ("vtpm", "present")))  # (5)
    if findings[-1].platform:
        where = f"NV index {REPORT_INDEX:#010x}"
        findings.append(_try("Azure's paravisor", where, lambda: _azure(machine)))  # (6)
    gpus, finding = _gpus(machine.gpus)  # (7)
    found = {finding.platform for finding in findings}
    platform = next((platform for platform in _ORDER if platform in found), None)
    return Detection(platform, gpus, (*findings, finding))


def open_source(detection: Detection, machine: Machine, *, with_tpm: bool = False) -> EvidenceSource:
    """The driver of the platform that was found.

    `with_tpm`: on TDX and SEV-SNP also the TPM's quote, which needs an attestation key that clients can believe.
    Raises: WrongUse where nothing was found, or no such driver.
    """
    device = machine.device
    tsm, tpm = ConfigfsTsm(device), Vtpm(device, Tpm(machine.tools))
    cpus: dict[str, Callable[[], Tdx | SevSnp]] = {
        "tdx": lambda: Tdx(device, tsm),
        "sev-snp": lambda: SevSnp(device, tsm),
    }
    match detection.platform:
        case "sgx":
            return GramineSgx(device)
        case "nitro":
            return nsm.Nitro(nsm.Nsm(device))
        case "tdx" | "sev-snp":
            cpu = cpus[detection.platform]()
            return FrontedByTpm(cpu, tpm) if with_tpm else cpu
        case "azure-tdx" | "azure-sev-snp":
            provided = Vtpm(device, Tpm(machine.tools), ak_handle=AK_HANDLE, certificate_index=AK_CERTIFICATE)
            kind = TDX if detection.platform == "azure-tdx" else SNP
            return AzureCvm(provided, kind, machine.metadata)
        case "vtpm":
            return tpm
    raise WrongUse(
        "This machine has no confidential computing that cloister knows.",
        step="attest.detect",
        hint="`cloister doctor` says what was looked for; `cloister up` runs on simulated hardware.",
    )


def _look(device: Device, what: str, where: str, ask: Callable[[], tuple[str | None, str]]) -> Finding:
    return _try(what, where, ask) if device.exists(where) else Finding(what, where, None, "not there")


def _try(what: str, where: str, ask: Callable[[], tuple[str | None, str]]) -> Finding:
    try:
        platform, detail = ask()
    except CloisterError as error:
        return Finding(what, where, None, f"{error.message} {error.got or ''}".strip(), error.hint)
    except OSError as error:
        return Finding(what, where, None, f"cannot be read: {error.strerror or 'unknown error'}")
    return Finding(what, where, platform, detail)


def _gramine(device: Device) -> tuple[str | None, str]:
    kind = read_file(device, f"{ATTESTATION}/attestation_type", limit=64).decode("ascii", "replace").strip("\0\n")
    detail = f"attestation type {ascii(kind)[1:-1]}"
    return (
        ("sgx", detail) if kind == "dcap" else (None, f'{detail}; the manifest needs sgx.remote_attestation = "dcap"')
    )


def _tsm(device: Device) -> tuple[str | None, str]:
    provider = ConfigfsTsm(device).provider()
    return _PROVIDERS.get(provider), f"provider {ascii(provider)[1:-1][:32]}"


def _azure(machine: Machine) -> tuple[str | None, str]:
    tpm = Tpm(machine.tools)
    if REPORT_INDEX not in tpm.nv_indices():
        return None, "not there"
    platform = "azure-tdx" if read_hcl(tpm).kind == TDX else "azure-sev-snp"
    return platform, "a report of the paravisor"


def _gpus(gpus: NvidiaGpus) -> tuple[int, Finding]:
    try:
        count = gpus.confidential()
    except CloisterError as error:
        return 0, Finding("NVIDIA GPUs", LIBRARY, None, error.message, error.hint)
    return count, Finding("NVIDIA GPUs", LIBRARY, None, f"{count} in confidential computing mode")
