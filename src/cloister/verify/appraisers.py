"""Which verifier judges what: the CPU's evidence, a TPM beside it, GPUs; their results joined into one appraisal."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from cloister.errors import MalformedEvidence
from cloister.evidence import simulated as simulated_evidence
from cloister.evidence.binding import gpu_nonce, report_data
from cloister.evidence.document import Document, gpu_labels
from cloister.evidence.endorsements import MEDIA_TYPE as ENDORSEMENTS_MEDIA_TYPE
from cloister.evidence.endorsements import Endorsements, parse_endorsements
from cloister.evidence.nvidia import GpuEvidence, parse_gpu, parse_report
from cloister.evidence.nvidia_rim import rim_names
from cloister.evidence.tpm import parse_tpm
from cloister.verify import azure, intel, nitro, nvidia, sev_snp, simulated, vtpm
from cloister.verify.boot_log import check_rtmr_log
from cloister.verify.factors import Factor, compare, failed, not_checked, passed
from cloister.verify.measurement import check_measurement
from cloister.verify.platform import Appraisal, Expiry
from cloister.verify.policy import Measurements, Policy
from cloister.verify.roots import Roots

__all__ = ["TPM_BINDING", "Subject", "appraise", "check_labels", "platform_of"]

TPM_BINDING = 32
"""Bytes of the report data in a lone TPM's quote: it has room for no more."""

_RAW = "application/octet-stream"
_CBOR = "application/cbor"
_COSE = "application/cose"
_SNP_SIZE = 1184
_COLLATERAL = "`cloister collateral export` puts the vendor's answers into a document."
_GPU_SHOWN = frozenset({"arch", "driver", "vbios", "measurements"})
_SWITCH = "ls10"
_TDX = b"\x81\0\0\0"

_CPU = {"cpu", "endorsements", "eventlog"}
_LABELS: Mapping[str, set[str]] = MappingProxyType(
    {
        "sim": {"cpu", "endorsements"},
        "sgx": {"cpu", "endorsements"},
        "tdx": {*_CPU, "tpm"},
        "sev-snp": {*_CPU, "tpm"},
        "nitro": {"cpu"},
        "azure-tdx": {*_CPU, "runtime", "tpm"},
        "azure-sev-snp": {*_CPU, "runtime", "tpm"},
        "vtpm": {"tpm", "eventlog", "endorsements"},
    }
)
"""Platform -> what its verifier reads. Anything else in a document would be evidence that nobody judged."""

_MEDIA_TYPES = MappingProxyType(
    {"eventlog": _RAW, "runtime": _RAW, "tpm": _CBOR, "endorsements": ENDORSEMENTS_MEDIA_TYPE}
)
_EVERYWHERE = frozenset({"statement", "launch", "provenance"})
_WITH_GPUS = frozenset({"tdx", "sev-snp", "azure-tdx", "azure-sev-snp"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is judged, and by what: the document, the caller's nonce and policy, the time, the roots believed in."""

    document: Document
    policy: Policy
    nonce: bytes
    now: float
    roots: Roots

    def content(self, label: str) -> bytes:
        """b"" when the document has no such item."""
        item = self.document.items.get(label)
        return item.content if item is not None else b""

    @property
    def log(self) -> bytes | None:
        """None without the item: an empty one is no log."""
        return self.content("eventlog") if "eventlog" in self.document.items else None

    @property
    def endorsements(self) -> Endorsements:
        content = self.content("endorsements")
        return parse_endorsements(content) if content else Endorsements()


def platform_of(document: Document) -> str | None:
    """The platform that the document's items claim, by media types and the report's own first bytes; None: unknown."""
    cpu = document.items.get("cpu")
    if cpu is None:
        return "vtpm" if "tpm" in document.items else None
    if cpu.media_type == simulated_evidence.REPORT_MEDIA_TYPE:
        return "sim"
    if cpu.media_type == _COSE:
        return "nitro"
    if cpu.media_type != _RAW:
        return None
    azure_prefix = "azure-" if "runtime" in document.items else ""
    if len(cpu.content) == _SNP_SIZE:
        return azure_prefix + "sev-snp"
    if cpu.content[4:8] == _TDX:
        return azure_prefix + "tdx"
    return "sgx"


def check_labels(document: Document) -> Iterator[Factor]:
    """Everything that is needed is there, and nothing that nobody would judge."""
    platform = platform_of(document)
    if "cpu" not in document.items and platform is None:
        yield failed("document.cpu", expected="evidence", got="nothing", hint="Absent evidence is no evidence.")
        return
    if platform is None:
        got = document.items["cpu"].media_type
        expected = f"{_RAW}, {_COSE} or {simulated_evidence.REPORT_MEDIA_TYPE}"
        yield failed("document.cpu", expected=expected, got=got, hint="No verifier for this platform.")
        return
    known = _LABELS[platform] - ({"eventlog"} if platform == "sev-snp" and "tpm" not in document.items else set())
    for label, item in document.items.items():
        gpu = label.startswith("gpu-") and platform in _WITH_GPUS
        if not (gpu or label in _EVERYWHERE or label in known):
            hint = f"Nothing judges this beside {platform} evidence."
            yield failed(f"document.{label}", expected="nothing", got=label, hint=hint)
        expected = _CBOR if gpu else _MEDIA_TYPES.get(label, item.media_type)
        if item.media_type != expected and platform != "sim":
            yield failed(f"document.{label}", expected=expected, got=item.media_type)


def appraise(subject: Subject, allowed: Measurements) -> Appraisal:
    """Judge all hardware evidence of a document whose labels were checked. `allowed`: the policy's measurements and those that
    its signer signed; here they count for GPUs.

    (2a) the CPU's evidence, by its platform's verifier (or a vTPM's, where it stands alone)
    (2b) a TPM in front of a confidential VM: its quote names this CPU's evidence
    (2c) each GPU: its report names this nonce and statement, and no two are the same device
    (2d) as many GPUs as the policy asks for, if it does; the switches between them are none

    Raises: MalformedEvidence; MalformedPolicy.
    """
    platform = platform_of(subject.document) or ""
    appraisal = _APPRAISERS[platform](subject)  # (2a)
    if "tpm" in subject.document.items and platform in ("tdx", "sev-snp"):
        appraisal = _with_tpm(appraisal, subject)  # (2b)
    seen: dict[str, str] = {}
    for label in gpu_labels(subject.document):
        appraisal = _with_gpu(appraisal, label, subject, allowed, seen)  # (2c)
    count = sum(appraisal.measurement.get(f"{label}.arch") != _SWITCH for label in seen.values())
    return _with_count(appraisal, count, subject.policy.limits.gpus)  # (2d)


def _simulated(subject: Subject) -> Appraisal:
    return simulated.appraise(subject.document, subject.policy, subject.now)


def _sgx(subject: Subject) -> Appraisal:
    launch = hashlib.sha256(subject.content("launch")).hexdigest()
    appraisal = intel.judge_sgx(
        subject.content("cpu"),
        _intel_collateral(subject),
        policy=subject.policy,
        now=subject.now,
        root=subject.roots.intel,
    )
    return replace(appraisal, measurement=MappingProxyType({**appraisal.measurement, "launch_sha256": launch}))


def _tdx(subject: Subject) -> Appraisal:
    appraisal = intel.judge_tdx(
        subject.content("cpu"),
        _intel_collateral(subject),
        policy=subject.policy,
        now=subject.now,
        launch=subject.content("launch"),
        root=subject.roots.intel,
    )
    if "runtime" in subject.document.items or "tpm" in subject.document.items or subject.log is None:
        return appraisal  # there the log is the TPM's
    rtmrs = {at: bytes.fromhex(appraisal.measurement[f"rtmr{at}"]) for at in range(4)}
    log = check_rtmr_log(subject.log, rtmrs)
    return replace(appraisal, factors=(*appraisal.factors, log))


def _sev_snp(subject: Subject) -> Appraisal:
    if not (chain := subject.endorsements.amd):
        raise MalformedEvidence("The chip's certificates are missing.", step="endorsements.amd", hint=_COLLATERAL)
    return sev_snp.judge(
        subject.content("cpu"),
        chain,
        subject.endorsements.amd_crl,
        policy=subject.policy,
        now=subject.now,
        roots=subject.roots.amd,
    )


def _nitro(subject: Subject) -> Appraisal:
    return nitro.judge(
        subject.content("cpu"),
        policy=subject.policy,
        now=subject.now,
        launch=subject.content("launch"),
        nonce=subject.nonce or None,
        root_sha256=subject.roots.nitro,
    )


def _vtpm(subject: Subject) -> Appraisal:
    """Alone: its quote is over the first half of the report data. Believed only where the policy names the platform."""
    binding = report_data(subject.nonce, subject.content("statement"))[:TPM_BINDING]
    appraisal = _judge_tpm(subject, binding)
    named = subject.policy.platforms is not None and vtpm.PLATFORM in subject.policy.platforms
    alone = (
        passed("evidence.provider", "named by the policy", "A virtual TPM alone proves its provider's word, no more.")
        if named
        else failed(
            "evidence.provider",
            expected="a confidential VM or enclave",
            got="a virtual TPM alone",
            hint='Whoever runs the machine can read all of it. To accept that: platforms = ["vtpm"] in the policy.',
        )
    )
    return replace(appraisal, factors=(*appraisal.factors, alone))


def _azure(hardware: Callable[[Subject], Appraisal]) -> Callable[[Subject], Appraisal]:
    def judge(subject: Subject) -> Appraisal:
        return azure.judge(
            hardware(subject),
            subject.content("runtime"),
            parse_tpm(subject.content("tpm")),
            qualifying_data=_cpu_binding(subject),
            policy=subject.policy,
            now=subject.now,
            launch=subject.content("launch"),
            eventlog=subject.log,
            roots=subject.roots.ak,
            crls=subject.endorsements.tpm_crls,
        )

    return judge


_APPRAISERS: Mapping[str, Callable[[Subject], Appraisal]] = MappingProxyType(
    {
        "sim": _simulated,
        "sgx": _sgx,
        "tdx": _tdx,
        "sev-snp": _sev_snp,
        "nitro": _nitro,
        "vtpm": _vtpm,
        "azure-tdx": _azure(_tdx),
        "azure-sev-snp": _azure(_sev_snp),
    }
)


def _intel_collateral(subject: Subject) -> bytes:
    if subject.endorsements.intel is None:
        raise MalformedEvidence("Intel's collateral is missing.", step="endorsements.intel", hint=_COLLATERAL)
    return subject.endorsements.intel


def _cpu_binding(subject: Subject) -> bytes:
    """What a TPM in front of a confidential VM quotes: SHA-256 of the CPU's evidence, 32 bytes."""
    return hashlib.sha256(subject.content("cpu")).digest()


def _judge_tpm(subject: Subject, qualifying_data: bytes) -> Appraisal:
    return vtpm.judge(
        parse_tpm(subject.content("tpm")),
        qualifying_data=qualifying_data,
        policy=subject.policy,
        now=subject.now,
        launch=subject.content("launch"),
        ak_pins=subject.policy.limits.platform_ids or frozenset(),
        roots=subject.roots.ak,
        crls=subject.endorsements.tpm_crls,
        eventlog=subject.log,
    )


def _with_tpm(appraisal: Appraisal, subject: Subject) -> Appraisal:
    tpm = _judge_tpm(subject, _cpu_binding(subject))
    hint = "Nothing but its provider's word says that this TPM is this VM's own: its registers may be another's."
    said = replace(tpm, factors=(*tpm.factors, not_checked("relay", hint)))
    return _joined(appraisal, said, "tpm", tpm.measurement)


def _with_gpu(
    appraisal: Appraisal, label: str, subject: Subject, allowed: Measurements, seen: dict[str, str]
) -> Appraisal:
    """`seen`: device -> the label it came under; grows."""
    evidence = parse_gpu(subject.content(label))
    gpu = nvidia.judge(
        evidence.report,
        evidence.chain,
        nonce=gpu_nonce(subject.nonce, subject.content("statement")),
        policy=subject.policy,
        now=subject.now,
        root_sha256=subject.roots.nvidia,
        rims=_rims(evidence, subject.endorsements),
        rim_root_sha256=subject.roots.rim,
    )
    pins = check_measurement({gpu.platform: allowed.get(gpu.platform, ())}, gpu)
    first = seen.setdefault(gpu.platform_id, label)
    hint = "One GPU was presented twice."
    once = (
        compare("device", expected=label, got=first, hint=hint) if first != label else passed("device", gpu.platform_id)
    )
    measured = {f"{label}.{name}": value for name, value in gpu.measurement.items() if name in _GPU_SHOWN}
    return _joined(appraisal, replace(gpu, factors=(*gpu.factors, *pins, once)), label, measured)


def _rims(evidence: GpuEvidence, endorsements: Endorsements) -> tuple[bytes, ...]:
    """The manifests in the document that speak about this device, by their names: whether they do is judged."""
    names = rim_names(parse_report(evidence.report), product=nvidia.product_of(evidence.chain))
    return tuple(endorsements.rims[name] for name in names if name in endorsements.rims)


def _with_count(appraisal: Appraisal, count: int, wanted: int | None) -> Appraisal:
    if wanted is None:
        return appraisal
    hint = "The policy asks for another number of GPUs."
    factor = compare("gpus", expected=str(wanted), got=str(count), hint=hint)
    return replace(appraisal, factors=(*appraisal.factors, factor))


def _joined(appraisal: Appraisal, other: Appraisal, label: str, measurement: Mapping[str, str]) -> Appraisal:
    """`other`'s factors, expiries and counters under its label, beside the CPU's."""
    return replace(
        appraisal,
        measurement=MappingProxyType({**appraisal.measurement, **measurement}),
        factors=(*appraisal.factors, *(replace(one, step=f"{label}.{one.step}") for one in other.factors)),
        expiries=(*appraisal.expiries, *(Expiry(f"{label}: {one.what}", one.at) for one in other.expiries)),
        counters=MappingProxyType(
            {**appraisal.counters, **{f"{label}.{name}": value for name, value in other.counters.items()}}
        ),
    )
