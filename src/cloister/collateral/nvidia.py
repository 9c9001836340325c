"""NVIDIA's collateral for GPUs: reference manifests (RIM) of a device's very driver and VBIOS.

NVIDIA, "RIM Service": `GET /v1/rim/{id}` answers `{"id": …, "rim": base64, …}`. Judging a manifest takes the extra `rim`.
"""

import base64
import binascii
import re
from collections.abc import Mapping
from types import MappingProxyType

from cloister.collateral.pieces import MAX_PIECE, Answer, Key, Piece, check_form, refuse
from cloister.errors import MalformedEvidence
from cloister.evidence.nvidia import GpuEvidence, parse_report
from cloister.evidence.nvidia_rim import rim_names
from cloister.evidence.strict_json import load_object
from cloister.verify import rim
from cloister.verify.nvidia import product_of

__all__ = ["VENDOR", "answer_of", "check", "keys_of", "name_of"]

VENDOR = "nvidia"

_PREFIXES: Mapping[str, str] = MappingProxyType(
    {
        "gpu-driver": "NV_GPU_DRIVER_",
        "gpu-cc-driver": "NV_GPU_CC_DRIVER_",
        "gpu-vbios": "NV_GPU_VBIOS_",
        "switch-bios": "NV_SWITCH_BIOS_",
    }
)
"""Kind -> how its names in the service begin."""

_FORM = re.compile(
    r"gpu-driver gh100(-[0-9]{1,8}){2,4}|gpu-cc-driver [0-9a-z]{1,16}(-[0-9]{1,8}){2,4}"
    r"|gpu-vbios [0-9a-z]{1,16}(-[0-9a-z]{1,16}){3}|switch-bios 5612-0002-890-[0-9a-z]{1,16}"
)


def keys_of(evidence: GpuEvidence) -> tuple[Key, ...]:
    """The manifests that speak about this device; () where it is one that NVIDIA's names do not fit.

    Raises: MalformedEvidence for a report or a chain that is none.
    """
    names = rim_names(parse_report(evidence.report), product=product_of(evidence.chain))
    return tuple(_key(name) for name in names)


def _key(name: str) -> Key:
    kind, prefix = next((kind, prefix) for kind, prefix in _PREFIXES.items() if name.startswith(prefix))
    return Key(VENDOR, kind, re.sub("[._]", "-", name.removeprefix(prefix).lower()))


def name_of(key: Key) -> str:
    """Its name in the service. Raises: MalformedEvidence for a key that is no manifest's."""
    check_form(key, _FORM)
    first, *others = key.platform.upper().split("-")
    rest = ".".join(others) if _is_driver(key) else "_".join(others)
    return f"{_PREFIXES[key.kind]}{first}_{rest}"


def _is_driver(key: Key) -> bool:
    return key.kind.endswith("-driver")


def answer_of(key: Key, body: bytes) -> Answer:
    """The manifest inside the service's answer. Raises: MalformedEvidence."""
    step = f"collateral.{key.kind}"
    text = load_object(body, max_bytes=MAX_PIECE, what=step).get("rim")
    try:
        return Answer(base64.b64decode(text if isinstance(text, str) else "-", validate=True))
    except (binascii.Error, ValueError) as error:
        raise MalformedEvidence(f"The answer to {key} holds no manifest in base64.", step=step) from error


def check(key: Key, answer: Answer, *, root_sha256: str, now: float) -> Piece:
    """One manifest, checked.

    (1) its chain leads to the pinned root and is valid now, and its first certificate's key signed all of it
    (2) it is about the driver or VBIOS that was asked for

    Does not check any device against it.

    Raises: MalformedEvidence, NotTrusted.
    """
    check_form(key, _FORM)
    judged = rim.judge(answer.body, now=now, root_sha256=root_sha256)  # (1)
    for factor in judged.factors:
        if factor.verdict == "fail":
            raise refuse(key, f"{key} is not good: {factor.got}.", expected=factor.expected, hint=factor.hint)
    if judged.manifest is None or not _is_about(key, judged.manifest):  # (2)
        got = "nothing" if judged.manifest is None else f"{judged.manifest.product} {judged.manifest.version}"
        raise refuse(key, "The manifest is about another driver or VBIOS.", expected=name_of(key), got=got)
    starts = [certificate.not_valid_before_utc.timestamp() for certificate in judged.certificates]
    return Piece(key, answer, max(starts), min(one.at for one in judged.expiries))


def _is_about(key: Key, manifest: rim.Manifest) -> bool:
    """As far as a manifest says: a VBIOS's does not name its board."""
    first, *rest = key.platform.split("-")
    if _is_driver(key):
        return (manifest.product.lower(), manifest.version) == (first, ".".join(rest))
    return manifest.version.replace(".", "").lower() == rest[-1]
