"""The vendors' roots that evidence must lead to: pinned in each platform's verifier, gathered here."""

from collections.abc import Mapping
from dataclasses import dataclass

from cloister.verify import nitro, nvidia, rim, sev_snp
from cloister.verify.tpm_certificates import PROVIDER_ROOTS

__all__ = ["PINNED", "Roots"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Roots:
    """Digests are SHA-256 of the DER certificate, 64 lower-case hexadecimal digits.

    `rim` is the root of NVIDIA's reference manifests. `intel` is the root certificate itself (DER), None for the one built into the library that judges quotes; `amd` maps
    a product to its ARK; `ak` holds the roots of cloud providers' TPM certificates.
    """

    intel: bytes | None = None
    amd: Mapping[str, str]
    nitro: str
    nvidia: str
    rim: str = rim.ROOT_SHA256
    ak: frozenset[str]


PINNED = Roots(amd=sev_snp.ARK_SHA256, nitro=nitro.ROOT_SHA256, nvidia=nvidia.ROOT_SHA256, ak=PROVIDER_ROOTS)
