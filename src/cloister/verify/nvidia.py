"""Whether an NVIDIA GPU's or NVSwitch's report is genuine: chain to NVIDIA's root, SPDM signature, nonce, firmware."""

import hashlib
import hmac
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister.evidence.nvidia import GpuReport, parse_chain, parse_fwids, parse_report
from cloister.verify import rim
from cloister.verify.certificates import load_certificate
from cloister.verify.factors import Factor, failed, not_checked, passed
from cloister.verify.measurement import check_measurement
from cloister.verify.p384 import chain_expiries, check_chain, check_root, check_signature
from cloister.verify.platform import Appraisal, Expiry
from cloister.verify.policy import Policy

__all__ = ["ARCHITECTURES", "PLATFORM", "ROOT_SHA256", "judge", "product_of"]

PLATFORM = "nvidia"

# "NVIDIA Device Identity CA": https://github.com/NVIDIA/nvtrust, guest_tools/gpu_verifiers/local_gpu_verifier/src/
# verifier/certs/verifier_device_root.pem; every device's own chain ends in the same certificate.
ROOT_SHA256 = "102bf659d5419614c9d8e6aecebc80454eb26b1df6a769ac720b9a690b167b48"

ARCHITECTURES = MappingProxyType({"GH": "hopper", "GB": "blackwell", "LS": "ls10"})
"""How the names of chips begin -> architecture. `ls10` is the switch beside Hopper GPUs."""

_DEVICE_INFO = x509.ObjectIdentifier("1.3.6.1.4.1.412.274.1")
"""DMTF DSP0274, section 10.6.1: an otherName "manufacturer:product:serial" in the leaf's subjectAltName."""

_DICE = (x509.ObjectIdentifier("2.23.133.5.4.1"), x509.ObjectIdentifier("2.23.133.5.4.1.1"))
_DEVICE = re.compile(rb"\x0c.NVIDIA:([A-Z]{2}[A-Z0-9_]{1,14}):([0-9A-F]{1,32})", re.DOTALL)

Entries = Sequence[Mapping[str, str | int]]
"""Acceptable entries, component -> value; every component that one of them names must match."""


@dataclass(frozen=True, slots=True)
class _Device:
    """`product` such as "GH100", `serial` in hexadecimal, `architecture` "" where it is not one that is known here."""

    product: str = ""
    serial: str = ""
    architecture: str = ""


def judge(
    report: bytes,
    chain: bytes,
    *,
    nonce: bytes,
    policy: Policy,
    now: float,
    root_sha256: str = ROOT_SHA256,
    pins: Entries | None = None,
    rims: Sequence[bytes] = (),
    rim_root_sha256: str = rim.ROOT_SHA256,
) -> Appraisal:
    """Judge one device's report (DMTF DSP0274 1.1.0, section 10.11; NVIDIA nvtrust, "Local GPU Verifier").

    (a) the chain ends in the pinned root
    (b) each certificate is signed by the next, valid at `now`, and used for what it was issued for
    (c) the device is of a known architecture, by its certificate
    (d) the device's key signed request and response
    (e) the request carried `nonce`
    (f) the firmware that holds the key (FWID) is the one the certificate was issued for
    (g) measurements are those of any one entry of `pins`, where given; None leaves that to the caller
    (h) measurements are NVIDIA's reference values for this driver and VBIOS, where their manifests (`rims`) are given
    (i) what is not checked is said: revocation, the mode, where the device is plugged in, and (h) where it could not be

    `report_data` is `nonce` as the report has it (32 bytes): what binds the device to the CPU's evidence.
    Measurement: `driver`, `vbios` (as nvidia-smi writes them, absent where a switch has none), `arch`, `fwid`,
    `measurements` (SHA-256 of the SPDM measurement record) and each of them as `m<SPDM index>`, from m1. They are
    the same on every device of one board, driver and VBIOS. `platform_id` is "product:serial" from the certificate.

    Does not check: how many devices there are, whether two of them are the same one. `policy` is not read.

    Raises: MalformedEvidence.
    """
    _ = policy
    parsed = parse_report(report)
    certificates = tuple(load_certificate(der, what="gpu.chain") for der in parse_chain(chain))
    leaf, device = certificates[0], _device(certificates[0])
    reference, rim_expiries = _check_rims(parsed, device, rims, now, rim_root_sha256)
    appraisal = Appraisal(
        platform=PLATFORM,
        simulated=False,
        report_data=parsed.nonce,
        launch_sha256=None,
        measurement=_measurement(parsed, device),
        engine=None,
        platform_id=_platform_id(leaf, device),
        factors=(
            check_root(certificates[-1], root_sha256, vendor="NVIDIA"),  # (a)
            check_chain(certificates, now),  # (b)
            _check_architecture(device),  # (c)
            check_signature(leaf, parsed.signature, parsed.signed, hint="The report was changed, or forged."),  # (d)
            _check_nonce(parsed, nonce),  # (e)
            _check_firmware(parsed, leaf, device),  # (f)
            *reference,  # (h)
            *_not_proved(),  # (i)
        ),
        expiries=(*chain_expiries(certificates, what=device.product or "GPU"), *rim_expiries),
    )
    return (
        appraisal if pins is None else replace(appraisal, factors=(*appraisal.factors, *_check_pins(appraisal, pins)))
    )


def product_of(chain: bytes) -> str:
    """Such as "GH100": the device's own word, in its certificate, believed no further than `judge` finds the chain good;
    "" where it says none. Raises: MalformedEvidence."""
    return _device(load_certificate(parse_chain(chain)[0], what="gpu.chain")).product


def _device(leaf: x509.Certificate) -> _Device:
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return _Device()
    for name in names:
        if isinstance(name, x509.OtherName) and name.type_id == _DEVICE_INFO:
            found = _DEVICE.fullmatch(name.value)
            if found:
                product, serial = found[1].decode("ascii"), found[2].decode("ascii").lower()
                return _Device(product, serial, ARCHITECTURES.get(product[:2], ""))
    return _Device()


def _platform_id(leaf: x509.Certificate, device: _Device) -> str:
    if device.serial:
        return f"{device.product}:{device.serial}"
    spki = leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()


def _measurement(report: GpuReport, device: _Device) -> Mapping[str, str]:
    values = {
        "driver": report.driver,
        "vbios": report.vbios,
        "arch": device.architecture,
        "fwid": report.fwid.hex(),
        "measurements": hashlib.sha256(report.record).hexdigest(),
        **{f"m{index}": value.hex() for index, value in report.measurements.items()},
    }
    return MappingProxyType({name: value for name, value in values.items() if value})


def _check_architecture(device: _Device) -> Factor:
    if device.architecture:
        return passed("evidence.architecture", f"{device.architecture} ({device.product})")
    expected = " or ".join(ARCHITECTURES.values())
    hint = "This version knows no such device: nobody here can say what its report means."
    return failed("evidence.architecture", expected=expected, got=device.product or "no device name", hint=hint)


def _check_nonce(report: GpuReport, nonce: bytes) -> Factor:
    if hmac.compare_digest(report.nonce, nonce):
        return passed("evidence.nonce", nonce.hex())
    hint = "Replayed, or made for another CPU's evidence: this GPU does not belong to the enclave."
    return failed("evidence.nonce", expected=nonce.hex()[:64], got=report.nonce.hex(), hint=hint)


def _check_firmware(report: GpuReport, leaf: x509.Certificate, device: _Device) -> Factor:
    """Hopper has it in certificate and report. Blackwell's certificates may lack it, and switches do not report it."""
    step = "evidence.fwid"
    certified = _certified_fwids(leaf)
    if device.architecture == "blackwell" and not certified:
        return not_checked(step, "This Blackwell certificate does not name the firmware it was issued for.")
    if device.architecture == "ls10" and not report.fwid:
        return not_checked(step, "Switches do not report which firmware holds their key.")
    if report.fwid in certified:
        return passed(step, report.fwid.hex())
    hint = "The firmware that runs is not the one the certificate was issued for."
    expected = " or ".join(fwid.hex() for fwid in certified) or "a firmware digest in the certificate"
    return failed(step, expected=expected, got=report.fwid.hex() or "none", hint=hint)


def _certified_fwids(leaf: x509.Certificate) -> tuple[bytes, ...]:
    values = [extension.value for extension in leaf.extensions if extension.oid in _DICE]
    raw = [value.value for value in values if isinstance(value, x509.UnrecognizedExtension)]
    return tuple(fwid for value in raw for fwid in parse_fwids(value))


def _check_pins(appraisal: Appraisal, pins: Entries) -> Iterator[Factor]:
    """As `measurement` compares a CPU's, under names of their own."""
    for factor in check_measurement({PLATFORM: tuple(pins)}, appraisal):
        yield replace(factor, step=f"gpu.{factor.step}")


def _check_rims(
    report: GpuReport, device: _Device, rims: Sequence[bytes], now: float, root_sha256: str
) -> tuple[tuple[Factor, ...], tuple[Expiry, ...]]:
    if not rims:
        hint = "RIM not checked: nothing here says that driver and firmware are NVIDIA's own. Pin their measurements."
        return (not_checked("gpu.rim", hint),), ()
    if not rim.judgeable():
        hint = (
            "RIM not checked: this machine lacks what judges the manifests that came along. pip install 'cloister[rim]'"
        )
        return (not_checked("gpu.rim", hint),), ()
    judged = [rim.judge(data, now=now, root_sha256=root_sha256) for data in rims]
    factors = [replace(f, step=f"gpu.rim.{f.step.rpartition('.')[2]}") for each in judged for f in each.factors]
    manifests = [each.manifest for each in judged if each.manifest is not None and not each.failed]
    factors.append(rim.compare(report, manifests, product=device.product))
    return tuple(factors), tuple(expiry for each in judged for expiry in each.expiries)


def _not_proved() -> Iterator[Factor]:
    yield not_checked("gpu.ocsp", "OCSP not checked: a device whose certificate NVIDIA revoked would not be noticed.")
    yield not_checked(
        "gpu.mode", "That confidential computing is on and developer tools are off is the enclave's word."
    )
    yield not_checked("gpu.relay", "Until TDISP a hypervisor may relay the report of a GPU in another machine.")
