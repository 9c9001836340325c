"""A policy's entries for an image: what each platform's evidence will say when it was started in a given way."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from cloister.deploy.predict import SERVING, StartedBy, predict_pcrs, predict_rtmrs
from cloister.deploy.sev_snp import SNP_CPU, launch_digest, parse_firmware
from cloister.deploy.uki import parse_image
from cloister.errors import WrongUse

__all__ = ["PLATFORMS", "Start", "predict_entries"]

PLATFORMS = ("vtpm", "tdx", "sev-snp", "azure-tdx", "azure-sev-snp")

_OWN = MappingProxyType(
    {
        "tdx": (frozenset({"mr_td"}), "the firmware's measurement, as the TDX module makes it"),
        "azure-tdx": (frozenset({"mr_td"}), "the paravisor's measurement"),
        "azure-sev-snp": (frozenset({"measurement", "id_key_digest"}), "the paravisor's measurement, or its signer"),
    }
)
"""Platform -> components that depend on the cloud's own firmware, one of which has to be given."""

Entry = Mapping[str, str | int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How an image is started. `phases`: how far systemd may have come when evidence is asked for. `table`: of the disk
    (`deploy.gpt`), for TDX. `firmware`, `vcpus` (how many, each one a possibility) and `cpu`: for SEV-SNP.

    `pins`: further components of every entry, which cannot be predicted: they belong to the cloud, or to its firmware.
    """

    platform: str
    started_by: StartedBy = "disk"
    phases: tuple[tuple[str, ...], ...] = SERVING
    table: bytes | None = None
    firmware: bytes = b""
    vcpus: tuple[int, ...] = ()
    cpu: str = SNP_CPU
    pins: Mapping[str, str] = field(default_factory=dict)


def predict_entries(kernel: bytes, start: Start) -> tuple[Entry, ...]:
    """One for each possibility. `kernel`: the unified kernel image.

    Raises: WrongUse for another platform, and where something that has to be given is not; MalformedImage.
    """
    if start.platform not in PLATFORMS:
        raise WrongUse(
            "Nothing is predicted for that platform.", expected=", ".join(PLATFORMS), got=start.platform[:40]
        )
    names, what = _OWN.get(start.platform, (frozenset(), ""))
    if names and not names & start.pins.keys():
        wanted = " or ".join(f"--pin {name}=HEX" for name in sorted(names))
        hint = "It is not in the image: take it from the cloud, or from your firmware's build."
        raise WrongUse(f"What is missing is {what}.", expected=wanted, hint=hint)
    entries = _PREDICTED[start.platform](kernel, start)
    return tuple(MappingProxyType({**start.pins, **entry}) for entry in entries)


def _by_pcrs(kernel: bytes, start: Start) -> Iterator[Entry]:
    image = parse_image(kernel)
    for phases in start.phases:
        pcrs = predict_pcrs(image, started_by=start.started_by, phases=phases)
        yield {f"pcr{at}": value.hex() for at, value in pcrs.items()}


def _by_rtmrs(kernel: bytes, start: Start) -> Iterator[Entry]:
    rtmrs = predict_rtmrs(parse_image(kernel), started_by=start.started_by, table=start.table)
    yield {f"rtmr{at}": value.hex() for at, value in rtmrs.items()}


def _by_launch_digest(kernel: bytes, start: Start) -> Iterator[Entry]:
    if start.started_by != "qemu" or not start.firmware or not start.vcpus:
        hint = (
            "--started-by qemu --firmware OVMF.fd --vcpus N: a launch digest covers no disk, and depends on the CPUs."
        )
        raise WrongUse("SEV-SNP measures the firmware, and what QEMU hands to it.", hint=hint)
    parse_image(kernel)
    firmware = parse_firmware(start.firmware)
    for vcpus in start.vcpus:
        yield {"measurement": launch_digest(firmware, kernel, vcpus=vcpus, cpu=start.cpu).hex(), "vcpus": vcpus}


_PREDICTED = MappingProxyType(
    {
        "vtpm": _by_pcrs,
        "tdx": _by_rtmrs,
        "sev-snp": _by_launch_digest,
        "azure-tdx": _by_pcrs,
        "azure-sev-snp": _by_pcrs,
    }
)
