"""Collateral that travels with the evidence, so that it can be verified without a network.

```
endorsements = CBOR map of any of
    "intel"    JSON text: the vendor's answers for this platform (TCB info, QE identity, CRLs, issuer chains), by field
    "amd"      [DER certificate of the chip or its cloud (VCEK, VLEK), of its CA (ASK, ASVK), of the root (ARK)]
    "amd_crl"  DER: the root's revocation list
    "tpm_crls" [DER]: those that the certificates above a TPM's attestation key name
    "rims"     {name: XML}: NVIDIA's reference manifests for the GPUs beside it, by their names in its service
```
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import cbor2

from cloister.errors import MalformedEvidence
from cloister.evidence.document import MAX_LOG, Item
from cloister.evidence.strict_cbor import load_map

__all__ = ["AMD_CHAIN", "MAX_LIST", "MAX_RIMS", "MEDIA_TYPE", "Endorsements", "parse_endorsements"]

MEDIA_TYPE = "application/vnd.cloister.endorsements+cbor"

MAX_RIMS = 16
"""Two for each kind of GPU, one for each kind of switch, and each kind but once."""

AMD_CHAIN = 3
"""Certificates of a whole `amd`: leaf, CA and root."""

_NAMES = frozenset({"intel", "amd", "amd_crl", "tpm_crls", "rims"})
MAX_LIST = 6
_RIM_NAME = re.compile(r"NV_[0-9A-Z_.]{1,93}")


@dataclass(frozen=True, slots=True)
class Endorsements:
    """As transported: nothing of it is believed before a verifier has judged it."""

    intel: bytes | None = None
    amd: tuple[bytes, ...] = ()
    amd_crl: bytes | None = None
    tpm_crls: tuple[bytes, ...] = ()
    rims: Mapping[str, bytes] = field(default_factory=dict)

    def item(self) -> Item:
        """The item of the attestation document. Raises: MalformedEvidence when it is over 1 MiB."""
        present = {
            "intel": self.intel,
            "amd": list(self.amd) or None,
            "amd_crl": self.amd_crl,
            "tpm_crls": list(self.tpm_crls) or None,
            "rims": dict(self.rims) or None,
        }
        return Item(MEDIA_TYPE, cbor2.dumps({name: value for name, value in present.items() if value is not None}))


def parse_endorsements(content: bytes) -> Endorsements:
    """Raises: MalformedEvidence."""
    fields = load_map(content, keys=frozenset(), optional=_NAMES, max_bytes=MAX_LOG, what="endorsements")
    return Endorsements(
        intel=_bytes(fields["intel"], "intel") if "intel" in fields else None,
        amd=_list(fields.get("amd", []), "amd"),
        amd_crl=_bytes(fields["amd_crl"], "amd_crl") if "amd_crl" in fields else None,
        tpm_crls=_list(fields.get("tpm_crls", []), "tpm_crls"),
        rims=_rims(fields.get("rims", {})),
    )


def _bytes(value: object, name: str) -> bytes:
    if not isinstance(value, bytes) or not value:
        raise MalformedEvidence(f"endorsements.{name} is not bytes.", step=f"endorsements.{name}")
    return value


def _list(value: object, name: str) -> tuple[bytes, ...]:
    if not isinstance(value, list) or len(value) > MAX_LIST:
        raise MalformedEvidence(f"endorsements.{name} is not a short list.", step=f"endorsements.{name}")
    return tuple(_bytes(item, name) for item in value)


def _rims(value: object) -> Mapping[str, bytes]:
    step = "endorsements.rims"
    if not isinstance(value, dict) or len(value) > MAX_RIMS:
        raise MalformedEvidence(f"{step} is not a short map.", step=step)
    if not all(isinstance(name, str) and _RIM_NAME.fullmatch(name) for name in value):
        raise MalformedEvidence(f"{step} has a name that is none of NVIDIA's.", step=step)
    return MappingProxyType({name: _bytes(content, "rims") for name, content in value.items()})
