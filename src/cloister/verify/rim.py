"""NVIDIA's reference integrity manifests (RIM): signed XML that names the golden measurements of a driver or VBIOS."""

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from xml.etree import ElementTree as ET

from cryptography import x509

from cloister.errors import MalformedEvidence
from cloister.evidence.nvidia import GpuReport
from cloister.verify.certificates import load_certificate
from cloister.verify.factors import Factor, failed, not_checked, passed
from cloister.verify.p384 import chain_expiries, check_chain, check_root
from cloister.verify.platform import Expiry

__all__ = ["ROOT_SHA256", "Manifest", "RimAppraisal", "compare", "judge", "judgeable"]

# "NVIDIA CoRIM signing Root CA": https://github.com/NVIDIA/nvtrust, guest_tools/gpu_verifiers/local_gpu_verifier/src/
# verifier/certs/verifier_RIM_root.pem
ROOT_SHA256 = "12977b5115acb0381179279fffeb5a8c4d264971ebb32298023a465fa41df5d1"

MAX_RIM = 256 * 1024

_SWID = "{http://standards.iso.org/iso/19770/-2/2015/schema.xsd}"
_HASH = "{http://www.w3.org/2001/04/xmlenc#sha384}Hash"
_DS = "{http://www.w3.org/2000/09/xmldsig#}"
_C14N = "http://www.w3.org/2006/12/xml-c14n11"
_ENVELOPED = "http://www.w3.org/2000/09/xmldsig#enveloped-signature"
_ECDSA_SHA384 = "http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384"
_SHA384 = "http://www.w3.org/2001/04/xmldsig-more#sha384"

_SIGNED_INFO: tuple[tuple[str, dict[str, str]], ...] = (
    ("SignedInfo", {}),
    ("CanonicalizationMethod", {"Algorithm": _C14N}),
    ("SignatureMethod", {"Algorithm": _ECDSA_SHA384}),
    ("Reference", {"URI": ""}),
    ("Transforms", {}),
    ("Transform", {"Algorithm": _ENVELOPED}),
    ("Transform", {"Algorithm": _C14N}),
    ("DigestMethod", {"Algorithm": _SHA384}),
    ("DigestValue", {}),
)
"""Every element of a signature's SignedInfo with its attributes, in document order: the whole document, signed once."""

_DECLARATION = re.compile(rb"\A<\?xml version=[\"']1\.0[\"'](?: encoding=[\"'](?:utf|UTF)-8[\"'])?\s*\?>")
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,31}")
_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-fA-F]{96}")
_INTEGER = re.compile(r"0|[1-9][0-9]{0,2}")
_MAX_INDEX = 254
_MAX_ALTERNATIVES = 64
_MAX_CHAIN = 8

_SWITCH = "LS"

_NVDEC0 = 35
"""NVIDIA's verifier leaves this reference value out where the report says that NVDEC0 is disabled."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """`version` of the driver or VBIOS. `measurements`: index (from 0: SPDM's less one) -> acceptable digests, of those
    that are in use."""

    product: str
    version: str
    tag_id: str
    measurements: Mapping[int, frozenset[bytes]]


@dataclass(frozen=True, slots=True)
class RimAppraisal:
    """`manifest` was read from the signed bytes alone; None where the signature does not hold. `certificates`: its
    signer's own first."""

    manifest: Manifest | None
    certificates: tuple[x509.Certificate, ...]
    factors: tuple[Factor, ...]
    expiries: tuple[Expiry, ...]

    @property
    def failed(self) -> bool:
        return any(factor.verdict == "fail" for factor in self.factors)


def judgeable() -> bool:
    """Whether the extra `rim` is here, and loads."""
    return _signxml() is not None


def judge(data: bytes, *, now: float, root_sha256: str = ROOT_SHA256) -> RimAppraisal:
    """Judge one manifest, an ISO 19770-2 SWID tag (TCG, "Reference Integrity Manifest Information Model", 1.01; W3C,
    "XML Signature Syntax and Processing 1.1", section 3.2).

    (a) the chain inside the signature ends in the pinned root
    (b) each certificate is signed by the next, valid at `now`, and used for what it was issued for
    (c) the first one's key signed the whole document, once
    (d) what is not checked is said

    Needs the extra `rim` (signxml); without it (c) fails. No document type, entity, comment, processing instruction or
    other transform gets as far as a signature check, and values are read from what was signed.

    Raises: MalformedEvidence.
    """
    signature = _signature(_load(data))
    chain = tuple(load_certificate(der, what="rim.chain") for der in _chain(signature))
    signed, factor = _check_signature(data, chain[0])
    return RimAppraisal(
        manifest=_manifest(_load(signed)) if signed is not None else None,
        certificates=chain,
        factors=(
            check_root(chain[-1], root_sha256, vendor="NVIDIA"),  # (a)
            check_chain(chain, now),  # (b)
            factor,  # (c)
            not_checked(
                "evidence.ocsp", "OCSP not checked: a manifest that NVIDIA revoked would not be noticed."
            ),  # (d)
        ),
        expiries=chain_expiries(chain, what="RIM"),
    )


def compare(report: GpuReport, manifests: Sequence[Manifest], *, product: str) -> Factor:
    """Each part of the device has a manifest, and every reference value in them is what the device measured.

    `manifests` are genuine ones: of the report's driver and of its VBIOS (a switch has no driver), for `product`. A
    value that both of them name contradicts itself; NVDEC0's is left out where the report says that it is disabled.
    """
    step, parts = "gpu.rim", _parts(report, product)
    complete = all(len(_of(manifests, product, version)) == 1 for _, version in parts)
    if not complete or len(manifests) != len(parts):
        expected = " and ".join(f"one for {what} {version or '(not reported)'}" for what, version in parts)
        got = ", ".join(f"{m.product} {m.version}" for m in manifests) or "no genuine manifest"
        hint = f"Give NVIDIA's manifests for {product or 'the device'}: of the very driver and VBIOS, one each."
        return failed(step, expected=expected, got=got, hint=hint)
    golden = [(index, digests) for manifest in manifests for index, digests in manifest.measurements.items()]
    wrong = sorted({index for index, digests in golden if not _matches(report, index, digests)} | _repeated(golden))
    if wrong:
        hint = "This device runs firmware that NVIDIA does not vouch for."
        got = f"others at {', '.join(f'm{index + 1}' for index in wrong)}"
        return failed(step, expected="NVIDIA's reference values", got=got[:400], hint=hint)
    if not golden:
        return failed(step, expected="reference values", got="none", hint="These manifests vouch for nothing.")
    return passed(step, f"{len(golden)} reference values")


def _parts(report: GpuReport, product: str) -> tuple[tuple[str, str], ...]:
    vbios = ("VBIOS", report.vbios)
    return (vbios,) if product.startswith(_SWITCH) else (("driver", report.driver), vbios)


def _of(manifests: Sequence[Manifest], product: str, version: str) -> list[Manifest]:
    def plain(name: str) -> str:
        return name.replace("_", "").upper()

    return [m for m in manifests if m.version == version and plain(m.product) == plain(product)]


def _matches(report: GpuReport, index: int, digests: frozenset[bytes]) -> bool:
    return (index == _NVDEC0 and report.nvdec0_disabled) or report.measurements.get(index + 1) in digests


def _repeated(golden: Sequence[tuple[int, frozenset[bytes]]]) -> set[int]:
    indices = [index for index, _ in golden]
    return {index for index in indices if indices.count(index) > 1}


def _load(data: bytes) -> ET.Element:
    if len(data) > MAX_RIM:
        raise MalformedEvidence("The manifest is too long.", step="rim", expected=f"{MAX_RIM} bytes")
    body = _DECLARATION.sub(b"", data)
    if b"<!" in body or b"<?" in body or b"\0" in body:
        raise MalformedEvidence("The manifest has a document type, a comment or an instruction.", step="rim")
    try:
        body.decode("utf-8")
        root = ET.fromstring(data)  # noqa: S314 - nothing that expands is left
    except (ET.ParseError, ValueError) as error:
        raise MalformedEvidence("The manifest is not XML in UTF-8.", step="rim") from error
    if root.tag != f"{_SWID}SoftwareIdentity":
        raise MalformedEvidence("The manifest is not a SoftwareIdentity.", step="rim")
    return root


def _signature(root: ET.Element) -> ET.Element:
    """The only signature, a child of the root, over the whole document."""
    found = root.findall(f"{_DS}Signature")
    if len(found) != 1 or len(list(root.iter(f"{_DS}Signature"))) != 1:
        raise MalformedEvidence(
            "The manifest does not have one signature, in its outermost element.", step="rim.signature"
        )
    if [child.tag for child in found[0]] != [f"{_DS}{name}" for name in ("SignedInfo", "SignatureValue", "KeyInfo")]:
        raise MalformedEvidence("The manifest's signature has other parts than XML-DSig's three.", step="rim.signature")
    shape = [(element.tag, dict(element.attrib)) for element in found[0][0].iter()]
    if shape != [(f"{_DS}{name}", attributes) for name, attributes in _SIGNED_INFO]:
        raise MalformedEvidence("The manifest is signed in another way than NVIDIA signs.", step="rim.signature")
    return found[0]


def _chain(signature: ET.Element) -> tuple[bytes, ...]:
    data = signature[2][0] if len(signature[2]) == 1 else ET.Element("nothing")
    tags = [certificate.tag for certificate in data]
    if data.tag != f"{_DS}X509Data" or set(tags) != {f"{_DS}X509Certificate"} or len(tags) > _MAX_CHAIN:
        raise MalformedEvidence("The manifest's signature does not carry its certificates.", step="rim.chain")
    try:
        return tuple(base64.b64decode("".join((c.text or "").split()), validate=True) for c in data)
    except ValueError as error:
        raise MalformedEvidence("A certificate in the manifest is not base64.", step="rim.chain") from error


def _signxml() -> tuple[Any, ...] | None:
    """What judges XML signatures; None where it is not installed, or does not load."""
    try:
        from lxml.etree import LxmlError  # type: ignore[import-untyped]
        from signxml.algorithms import DigestAlgorithm, SignatureMethod
        from signxml.exceptions import SignXMLException
        from signxml.verifier import SignatureConfiguration, XMLVerifier
    except ImportError:
        return None
    return LxmlError, DigestAlgorithm, SignatureMethod, SignXMLException, SignatureConfiguration, XMLVerifier


def _check_signature(data: bytes, signer: x509.Certificate) -> tuple[bytes | None, Factor]:
    """The signed bytes, canonical and without the signature, where it holds."""
    step, hint = "evidence.signature", "The manifest was changed, or is not NVIDIA's."
    parts = _signxml()
    if parts is None:
        hint = "Manifests need an extra: pip install 'cloister[rim]'"
        return None, failed(step, expected="signxml", got="not installed", hint=hint)
    LxmlError, DigestAlgorithm, SignatureMethod, SignXMLException, SignatureConfiguration, XMLVerifier = parts  # noqa: N806
    expected = SignatureConfiguration(
        location="./",
        signature_methods=frozenset({SignatureMethod.ECDSA_SHA384}),
        digest_algorithms=frozenset({DigestAlgorithm.SHA384}),
        # The library asks for a time; whether the certificate is valid was judged at `now`, with its chain.
        verification_time=signer.not_valid_before_utc,
    )
    try:
        verified = XMLVerifier().verify(data, x509_cert=signer, validate_schema=False, expect_config=expected)
    except (
        SignXMLException,
        LxmlError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
    ) as error:
        return None, failed(step, expected="signed by NVIDIA", got=type(error).__name__, hint=hint)
    if isinstance(verified, list):
        return None, failed(step, expected="one signature", got=str(len(verified)), hint=hint)
    return verified.signed_data, passed(step, "ECDSA P-384 SHA-384")


def _manifest(root: ET.Element) -> Manifest:
    metas, payloads = root.findall(f"{_SWID}Meta"), root.findall(f"{_SWID}Payload")
    if len(metas) != 1 or len(payloads) != 1:
        raise MalformedEvidence("The manifest does not have one Meta and one Payload.", step="rim.payload")
    measurements: dict[int, frozenset[bytes]] = {}
    for index, digests in _resources(payloads[0]):
        if index in measurements:
            raise MalformedEvidence("A reference value stands there twice.", step="rim.payload", got=str(index))
        measurements[index] = digests
    return Manifest(
        product=_text(metas[0], "product", _NAME),
        version=_text(metas[0], "colloquialVersion", _VERSION),
        tag_id=_text(root, "tagId", _DIGEST),
        measurements=MappingProxyType(measurements),
    )


def _resources(payload: ET.Element) -> Iterator[tuple[int, frozenset[bytes]]]:
    for resource in payload:
        if resource.tag != f"{_SWID}Resource" or resource.get("type") != "Measurement" or resource.get("size") != "48":
            raise MalformedEvidence("The payload holds something other than SHA-384 measurements.", step="rim.payload")
        index, count = _number(resource, "index", _MAX_INDEX), _number(resource, "alternatives", _MAX_ALTERNATIVES)
        digests = frozenset(bytes.fromhex(_text(resource, f"{_HASH}{at}", _DIGEST)) for at in range(count))
        if not digests or sum(name.startswith(_HASH) for name in resource.attrib) != count:
            raise MalformedEvidence("A reference value has other alternatives than it says.", step="rim.payload")
        active = resource.get("active")
        if active not in ("True", "False"):
            raise MalformedEvidence("A reference value is neither active nor not.", step="rim.payload")
        if active == "True":
            yield index, digests


def _text(element: ET.Element, name: str, pattern: re.Pattern[str]) -> str:
    value = element.get(name, "")
    if not pattern.fullmatch(value):
        raise MalformedEvidence(
            "An attribute of the manifest is missing or out of bounds.", step="rim", got=ascii(name)
        )
    return value


def _number(element: ET.Element, name: str, high: int) -> int:
    value = int(_text(element, name, _INTEGER))
    if value > high:
        raise MalformedEvidence("A number in the manifest is out of bounds.", step="rim", got=ascii(name))
    return value
