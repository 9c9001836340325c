"""The vendors' own services, asked over HTTPS: Intel's PCS (or an operator's PCCS), AMD's KDS and NVIDIA's RIM service;
and whoever issued a TPM's certificates."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from urllib.parse import unquote

from cloister.collateral import amd, intel, nvidia, tpm
from cloister.collateral.https import Fetched, Https, check_address
from cloister.collateral.pieces import Answer, Key
from cloister.errors import ConnectionFailed, MalformedEvidence
from cloister.evidence.sev_snp import VLEK, pem_or_der_certificates, pem_or_der_crl

__all__ = ["AMD_KDS", "INTEL_PCS", "NVIDIA_RIM", "Addresses", "Vendor"]

INTEL_PCS = "https://api.trustedservices.intel.com"
INTEL_ROOT_CRL = "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der"
AMD_KDS = "https://kdsintf.amd.com"
NVIDIA_RIM = "https://rim.attestation.nvidia.com"


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where to ask. `intel` may be a PCCS, which serves the same paths and the root's revocation list too; `amd` and
    `nvidia` a mirror of their paths. None is believed more than the network between: what they say is checked.

    Raises: WrongUse unless https, or http on this machine.
    """

    intel: str = INTEL_PCS
    amd: str = AMD_KDS
    nvidia: str = NVIDIA_RIM

    def __post_init__(self) -> None:
        for name in ("intel", "amd", "nvidia"):
            object.__setattr__(self, name, check_address(getattr(self, name)))

    def of(self, key: Key) -> str:
        if key.vendor == tpm.VENDOR:
            return tpm.address_of(key)  # its issuer's own
        if key.vendor == nvidia.VENDOR:
            return f"{self.nvidia}/v1/rim/{nvidia.name_of(key)}"
        return _intel_address(self.intel, key) if key.vendor == intel.VENDOR else _amd_address(self.amd, key)


def _intel_address(base: str, key: Key) -> str:
    """Intel's "Provisioning Certification Service API", version 4; `rootcacrl` is the PCCS's own (its design guide)."""
    kind, early = key.kind.removesuffix(intel.EARLY), key.kind.endswith(intel.EARLY)
    update = "update=early" if early else ""  # "standard" is what is given to those who do not ask
    tee, _, fmspc = key.platform.partition("-")
    if kind == intel.ROOT_CRL:
        return INTEL_ROOT_CRL if base == INTEL_PCS else f"{base}/sgx/certification/v4/rootcacrl"
    if kind == intel.PCK_CRL:
        return f"{base}/sgx/certification/v4/pckcrl?ca={key.platform}&encoding=der"
    if kind == intel.TCB_INFO:
        query = "&".join(filter(None, (f"fmspc={fmspc.upper()}", update)))
        return f"{base}/{tee}/certification/v4/tcb?{query}"
    return f"{base}/{tee}/certification/v4/qe/identity" + (f"?{update}" if update else "")


def _amd_address(base: str, key: Key) -> str:
    """AMD 57230, section 4.1."""
    leaf, _, what = key.kind.partition("-")
    if what:
        path = {"ca": "cert_chain", "crl": "crl"}[what]
        return f"{base}/{leaf}/v1/{key.platform.capitalize()}/{path}"
    product, hwid, tcb = amd.tcb_of(key)
    query = "&".join(f"{amd.SPLS[name]}={value:02d}" for name, value in tcb.items())
    return f"{base}/{leaf}/v1/{product}/{hwid}?{query}"


class Vendor:
    """A `CollateralSource`. May be shared between threads. Close it."""

    name = "vendor"

    def __init__(self, addresses: Addresses | None = None, https: Https | None = None) -> None:
        self.addresses = addresses or Addresses()
        self._https = https or Https()

    def __enter__(self) -> "Vendor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._https.close()

    def get(self, key: Key) -> Answer | None:
        """None: the vendor knows nothing under this key. Raises: ConnectionFailed, MalformedEvidence."""
        if key.kind == amd.LEAVES[VLEK]:
            hint = "AMD gives it to the cloud only, which hands it to the guest beside its report."
            raise ConnectionFailed("A VLEK certificate must come with the evidence.", step="collateral.vlek", hint=hint)
        fetched = self._https.get(self.addresses.of(key))
        if fetched is None:
            return None
        if key.vendor == tpm.VENDOR:
            return Answer(fetched.body)
        if key.vendor == nvidia.VENDOR:
            return nvidia.answer_of(key, fetched.body)
        return _intel_answer(key, fetched) if key.vendor == intel.VENDOR else _amd_answer(key, fetched)


_CHAINS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        intel.PCK_CRL: ("SGX-PCK-CRL-Issuer-Chain",),
        intel.TCB_INFO: ("TCB-Info-Issuer-Chain", "SGX-TCB-Info-Issuer-Chain"),
        intel.QE_IDENTITY: ("SGX-Enclave-Identity-Issuer-Chain",),
    }
)
"""Kind -> headers that its issuers may come in, percent-encoded PEM."""


def _intel_answer(key: Key, fetched: Fetched) -> Answer:
    kind = key.kind.removesuffix(intel.EARLY)
    body = _der(fetched.body) if kind in (intel.ROOT_CRL, intel.PCK_CRL) else fetched.body
    if kind == intel.ROOT_CRL:
        return Answer(body)
    for name in _CHAINS[kind]:
        if header := fetched.headers.get(name):
            pem = unquote(header).replace("\r\n", "\n").replace("-----\n\n-----", "-----\n-----")
            return Answer(body, pem.encode("ascii", "replace"))
    raise MalformedEvidence(
        f"{key} came without its issuers.", step=f"collateral.{key.kind}", expected=_CHAINS[kind][0]
    )


def _der(body: bytes) -> bytes:
    """A PCCS writes revocation lists in hexadecimal."""
    try:
        return body if body[:1] == b"\x30" else bytes.fromhex(body.decode("ascii"))
    except ValueError:
        return body


def _amd_answer(key: Key, fetched: Fetched) -> Answer:
    if key.kind.endswith(amd.CRL):
        return Answer(pem_or_der_crl(fetched.body))
    if key.kind.endswith(amd.CA):
        return Answer(fetched.body)
    return Answer(pem_or_der_certificates(fetched.body)[0])
