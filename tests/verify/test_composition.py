"""Whole documents of every hardware platform, under synthetic vendors: what is accepted, what each lie is refused by."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from tests.vendors import amd, aws, intel, nvidia, tpm
from tests.vendors.azure import runtime
from tests.vendors.p384 import Issued
from tests.verify.world import CONFIG, LAUNCH, MODEL, NONCE, NOW, OWNER, STATEMENT, failures

from cloister.errors import MalformedEvidence, VerificationFailed
from cloister.evidence.binding import gpu_nonce, report_data
from cloister.evidence.document import Document, Item
from cloister.evidence.endorsements import Endorsements
from cloister.evidence.launch import LaunchConfig, launch_digest
from cloister.evidence.nitro import MEDIA_TYPE as COSE
from cloister.evidence.nitro import launch_pcr
from cloister.evidence.nvidia import GpuEvidence
from cloister.evidence.statement import Statement
from cloister.evidence.tpm import tpm_item
from cloister.verify import Limits, Policy, Verified, verify
from cloister.verify.roots import Roots

RAW = "application/octet-stream"
MAKER, OTHER_MAKER = tpm.Maker(), tpm.Maker()
TPM = tpm.Tpm().certified(MAKER)
PARAVISOR_TPM = tpm.Tpm(key=rsa.generate_private_key(65537, 2048), attributes=0x00050472)
LOADER, OTHER_LOADER = tpm.extended(b"loader"), tpm.extended(b"another loader")
PCR_LOG = tpm.event_log(tpm.event(4, b"loader"))
OTHER_PCR_LOG = tpm.event_log(tpm.event(4, b"another loader"))
BOOT = (b"firmware", b"kernel", b"command line")
RTMRS = {f"rtmr{at}": tpm.extended(data, name="sha384") for at, data in enumerate(BOOT)}
SNP_CODE, OTHER_CODE = b"\xc0" * 48, b"\xcf" * 48


def ccel(*data: bytes) -> bytes:
    events = [tpm.event(at, one, algorithms=(0x000C,)) for at, one in enumerate(data, 1)]
    return tpm.event_log(*events, algorithms=(0x000C,))


@cache
def gpus() -> tuple[Issued, Issued]:
    """Two devices under one root."""
    first = nvidia.device()
    leaf, key = first.certificates[-1], ec.generate_private_key(ec.SECP384R1())
    name, critical = nvidia.device_name("GH100", "48B02D0000000002")
    builder = (
        x509.CertificateBuilder()
        .subject_name(leaf.subject)
        .issuer_name(leaf.issuer)
        .serial_number(2)
        .public_key(key.public_key())
        .not_valid_before(leaf.not_valid_before_utc)
        .not_valid_after(leaf.not_valid_after_utc)
        .add_extension(name, critical=critical)
    )
    for extension in leaf.extensions:
        if not isinstance(extension.value, x509.SubjectAlternativeName):
            builder = builder.add_extension(extension.value, critical=extension.critical)
    second = builder.sign(first.keys[-2], hashes.SHA384())
    return first, Issued((*first.certificates[:-1], second), (*first.keys[:-1], key))


ROOTS = Roots(
    intel=intel.intel().certificate("root", intel.Settings()).public_bytes(Encoding.DER),
    amd=amd.make().roots,
    nitro=aws.nitro().root_sha256,
    nvidia=nvidia.device().root_sha256,
    ak=tpm.pinned(MAKER.root),
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a document is made by. `booted`: the launch config that the hardware was started with. `fields`: what else
    is otherwise, by the platform's builder."""

    platform: str
    launch: LaunchConfig = LAUNCH
    booted: LaunchConfig | None = None
    statement: Statement = STATEMENT
    nonce: bytes = NONCE
    other_code: bool = False
    gpus: tuple[Issued, ...] = ()
    gpu_challenge: bytes | None = None
    with_tpm: tpm.Tpm | None = None
    by_rtmr3: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def booted_bytes(self) -> bytes:
        return (self.booted or self.launch).encode()

    def started_with(self, **changes: Any) -> "Machine":
        """Genuinely started with another launch config, which everything agrees with."""
        launch = replace(self.launch, **changes)
        digest = launch_digest(launch.encode()).hex()
        return replace(self, launch=launch, statement=replace(self.statement, launch_sha256=digest))

    def pcrs(self) -> dict[int, bytes]:
        loader = OTHER_LOADER if self.other_code else LOADER
        return {**tpm.ZERO_PCRS, 4: loader, 14: tpm.extended(self.booted_bytes)}

    def document(self) -> Document:
        challenge = gpu_nonce(self.nonce, self.statement.encode())
        evidence = {f"gpu-{at}": self._gpu(one, challenge) for at, one in enumerate(self.gpus)}
        bound = report_data(self.nonce, self.statement.encode(), [item.content for item in evidence.values()])
        return Document(
            {
                "statement": Item("application/json", self.statement.encode()),
                "launch": Item("application/json", self.launch.encode()),
                **BUILDERS[self.platform](self, bound),
                **evidence,
            }
        )

    def _gpu(self, device: Issued, challenge: bytes) -> Item:
        nonce = self.gpu_challenge or challenge
        return GpuEvidence(nvidia.report(device, nonce=nonce), nvidia.chain(device), nonce).item()


def sgx(machine: Machine, bound: bytes) -> dict[str, Item]:
    code = b"\xee" * 32 if machine.other_code else intel.MR_ENCLAVE
    made = intel.sgx(report={"report_data": bound, "mr_enclave": code}, **machine.fields)
    return {"cpu": Item(RAW, made.quote), "endorsements": Endorsements(intel=made.collateral).item()}


def tdx(machine: Machine, bound: bytes) -> dict[str, Item]:
    """In MRCONFIGID, or in RTMR3."""
    digest = launch_digest(machine.booted_bytes)
    launch = {"mr_config_id": digest + bytes(16), "rtmr3": bytes(48)}
    if machine.by_rtmr3:
        launch = {"mr_config_id": bytes(48), "rtmr3": tpm.extended(machine.booted_bytes, name="sha384")}
    kernel = b"another kernel" if machine.other_code else b"kernel"
    code = {**RTMRS, "rtmr1": tpm.extended(kernel, name="sha384")}
    made = intel.tdx(report={"report_data": bound, **launch, **code}, **machine.fields)
    items = {"cpu": Item(RAW, made.quote), "endorsements": Endorsements(intel=made.collateral).item()}
    if machine.with_tpm is None:
        return {**items, "eventlog": Item(RAW, ccel(b"firmware", kernel, b"command line"))}
    evidence = machine.with_tpm.evidence(hashlib.sha256(made.quote).digest(), machine.pcrs())
    both = Endorsements(intel=made.collateral, tpm_crls=(MAKER.crl(),)).item()
    return {**items, "endorsements": both, "tpm": tpm_item(evidence)}


def snp(machine: Machine, bound: bytes) -> dict[str, Item]:
    code = OTHER_CODE if machine.other_code else SNP_CODE
    given = {"report_data": bound, "host_data": launch_digest(machine.booted_bytes), "measurement": code}
    made = amd.make(**{**given, **machine.fields})
    return {"cpu": Item(RAW, made.report), "endorsements": Endorsements(amd=made.chain, amd_crl=made.crl).item()}


def nitro(machine: Machine, bound: bytes) -> dict[str, Item]:
    pcrs = aws.pcrs(pcr16=launch_pcr(machine.booted_bytes))
    if machine.other_code:
        pcrs |= {0: b"\xee" * 48}
    given = {"user_data": bound, "nonce": machine.nonce, "pcrs": pcrs}
    return {"cpu": Item(COSE, aws.document(**{**given, **machine.fields}))}


def azure(hardware: Callable[[Machine, bytes], dict[str, Item]]) -> Callable[[Machine, bytes], dict[str, Item]]:
    """The hardware measures the paravisor, which is the same whatever boots."""

    def build(machine: Machine, bound: bytes) -> dict[str, Item]:
        tee = machine.with_tpm or PARAVISOR_TPM
        key = tee.key.public_key()
        assert isinstance(key, rsa.RSAPublicKey)
        data = runtime(key, **{"user-data": bound.hex().upper()})
        paravisor = replace(machine, other_code=machine.fields.get("other_paravisor", False), fields={}, with_tpm=None)
        items = hardware(paravisor, hashlib.sha256(data).digest() + bytes(32))
        evidence = tee.evidence(hashlib.sha256(items["cpu"].content).digest(), machine.pcrs())
        log = OTHER_PCR_LOG if machine.other_code else PCR_LOG
        return {**items, "runtime": Item(RAW, data), "tpm": tpm_item(evidence), "eventlog": Item(RAW, log)}

    return build


def vtpm(machine: Machine, bound: bytes) -> dict[str, Item]:
    evidence = (machine.with_tpm or TPM).evidence(bound[:32], machine.pcrs())
    log = OTHER_PCR_LOG if machine.other_code else PCR_LOG
    lists = Endorsements(tpm_crls=(MAKER.crl(),))
    return {"tpm": tpm_item(evidence), "eventlog": Item(RAW, log), "endorsements": lists.item()}


BUILDERS: dict[str, Callable[[Machine, bytes], dict[str, Item]]] = {
    "sgx": sgx,
    "tdx": tdx,
    "sev-snp": snp,
    "nitro": nitro,
    "azure-sev-snp": azure(snp),
    "azure-tdx": azure(tdx),
    "vtpm": vtpm,
}

MACHINES = {
    "sgx": Machine(platform="sgx"),
    "tdx": Machine(platform="tdx"),
    "tdx, RTMR3": Machine(platform="tdx", by_rtmr3=True),
    "tdx, quote 5": Machine(platform="tdx", fields={"version": 5, "td15": True}),
    "tdx+tpm": Machine(platform="tdx", with_tpm=TPM),
    "sev-snp": Machine(platform="sev-snp"),
    "sev-snp+gpus": Machine(platform="sev-snp", gpus=gpus()),
    "nitro": Machine(platform="nitro"),
    "azure-sev-snp": Machine(platform="azure-sev-snp"),
    "azure-tdx": Machine(platform="azure-tdx"),
    "vtpm": Machine(platform="vtpm"),
}
every = pytest.mark.parametrize("name", MACHINES)

TDX_CODE = {"mr_td": "d2" * 48, **{name: value.hex() for name, value in RTMRS.items() if name != "rtmr0"}}
GPU_CODE = {
    "driver": nvidia.DRIVER,
    "vbios": nvidia.VBIOS,
    "measurements": hashlib.sha256(nvidia.record(nvidia.measurements())).hexdigest(),
}
CODE: dict[str, dict[str, str | int]] = {
    "sgx": {"mr_enclave": intel.MR_ENCLAVE.hex(), "launch_sha256": STATEMENT.launch_sha256},
    "tdx": TDX_CODE,
    "sev-snp": {"measurement": SNP_CODE.hex()},
    "nitro": {"pcr0": "01" * 48},
    "azure-sev-snp": {"measurement": SNP_CODE.hex(), "pcr4": LOADER.hex()},
    "azure-tdx": {"mr_td": "d2" * 48, "rtmr1": RTMRS["rtmr1"].hex(), "rtmr2": RTMRS["rtmr2"].hex(), "pcr4": LOADER.hex()},
    "vtpm": {"pcr4": LOADER.hex()},
}


def policy(name: str, **pins: Any) -> Policy:
    """Everything pinned to what the machine of this name is, but for `pins`."""
    platform = MACHINES[name].platform
    entry = {**CODE[platform], "pcr4": LOADER.hex()} if name == "tdx+tpm" else CODE[platform]
    defaults: dict[str, Any] = {
        "deployment": LAUNCH.deployment,
        "owner_key": OWNER,
        "models": frozenset({MODEL}),
        "config": CONFIG,
        "platforms": (platform,),
        "measurements": {platform: (entry,), "nvidia": (GPU_CODE,)},
        "limits": Limits(max_crl_age_days=30, gpus=len(MACHINES[name].gpus)),
    }
    return Policy(**{**defaults, **pins})


def judged(document: Document, believed: Policy, *, nonce: bytes = NONCE, now: float = NOW) -> Verified:
    return verify(document, policy=believed, nonce=nonce, now=now, roots=ROOTS)


def refused(document: Document, believed: Policy, **how: Any) -> set[str]:
    """The steps that failed; or that of the parser which refused."""
    try:
        judged(document, believed, **how)
    except VerificationFailed as error:
        assert all(factor.expected and factor.got for factor in failures(error).values())
        return set(failures(error))
    except MalformedEvidence as error:
        return {f"malformed {error.step}"}
    return set()


@cache
def genuine(name: str) -> Document:
    return MACHINES[name].document()


def without(document: Document, *labels: str) -> Document:
    return Document({label: item for label, item in document.items.items() if label not in labels})


def plus(document: Document, **items: Item) -> Document:
    return Document({**document.items, **{label.replace("_", "-"): item for label, item in items.items()}})
