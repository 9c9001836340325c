"""What a genuine report may say: debug mode, attributes and features of enclaves and trust domains, Intel's own ones."""

from collections.abc import Iterator

from cloister.evidence.intel import EnclaveReport, TdReport
from cloister.evidence.intel_collateral import ModuleIdentity, QeIdentity
from cloister.verify.factors import Factor, failed, passed

__all__ = ["check_domain", "check_enclave", "check_module", "differing"]

_SGX_INIT, _SGX_DEBUG, _SGX_MODE64 = 0x01, 0x02, 0x04
_SGX_ALLOWED = 0x05 | 0x40 | 0x80 | 0x400
"""INIT, MODE64BIT; CET, KSS, AEXNOTIFY (SDM volume 3D, "ATTRIBUTES"). Not the keys for provisioning and launching."""

_XFRM_ALLOWED = 0x602FF
"""x87 to PKRU and AMX. A bit outside is a register set that this code knows nothing of."""

_TD_DEBUG = 0xFF
"""The TUD group (TDX module ABI, "ATTRIBUTES"): any bit of it makes the trust domain untrusted; bit 0 is DEBUG."""

_TD_SEPT_VE_DISABLE = 1 << 28
_TD_ALLOWED = _TD_DEBUG | _TD_SEPT_VE_DISABLE | 1 << 30 | 1 << 31 | 1 << 63
"""Beside those above: PKS, KL, PERFMON. MIGRATABLE (29) is not allowed: its migration TD would have to be judged."""

_XFAM_FIXED_1 = 0x3
_XFAM_ALLOWED = 0x0006DBE7


def _debug(got: str) -> Factor:
    hint = "Whoever runs a machine can read what is in debug mode. Start it without."
    return failed("evidence.debug", expected="off", got=got, hint=hint)


def check_enclave(report: EnclaveReport) -> Iterator[Factor]:
    """Initialised, 64-bit, not in debug mode, without privileged keys or unknown features (SDM 3D, "ATTRIBUTES")."""
    flags = int.from_bytes(report.attributes[:8], "little")
    xfrm = int.from_bytes(report.attributes[8:], "little")
    yield _debug(f"{flags:#x}") if flags & _SGX_DEBUG else passed("evidence.debug", "off")
    needed = _SGX_INIT | _SGX_MODE64
    if flags & needed == needed and not flags & ~(_SGX_ALLOWED | _SGX_DEBUG):
        yield passed("evidence.attributes", f"{flags:#x}")
    else:
        hint = "The enclave may use keys that no application needs, or features unknown here."
        yield failed(
            "evidence.attributes", expected=f"{needed:#x} within {_SGX_ALLOWED:#x}", got=f"{flags:#x}", hint=hint
        )
    yield _check_features("evidence.xfrm", xfrm, _XFRM_ALLOWED)


def _check_features(step: str, got: int, allowed: int) -> Factor:
    if got & _XFAM_FIXED_1 == _XFAM_FIXED_1 and not got & ~allowed:
        return passed(step, f"{got:#x}")
    hint = "Processor features are on that this version knows nothing of. A newer one may."
    return failed(step, expected=f"0x3 within {allowed:#x}", got=f"{got:#x}", hint=hint)


def check_domain(report: TdReport) -> Iterator[Factor]:
    """Not in debug mode; SEPT_VE_DISABLE; no unknown attribute or feature; no service TD (TDX module ABI, TD_PARAMS)."""
    flags = int.from_bytes(report.td_attributes, "little")
    yield _debug(f"{flags & _TD_DEBUG:#x}") if flags & _TD_DEBUG else passed("evidence.debug", "off")
    if flags & _TD_SEPT_VE_DISABLE:
        yield passed("evidence.sept-ve", "disabled")
    else:
        hint = "The host could inject exceptions on memory access. Start the domain with SEPT_VE_DISABLE."
        yield failed("evidence.sept-ve", expected="SEPT_VE_DISABLE", got=f"{flags:#x}", hint=hint)
    if flags & ~_TD_ALLOWED:
        hint = "The trust domain is migratable, or has attributes unknown here."
        yield failed("evidence.attributes", expected=f"within {_TD_ALLOWED:#x}", got=f"{flags:#x}", hint=hint)
    else:
        yield passed("evidence.attributes", f"{flags:#x}")
    yield _check_features("evidence.xfam", int.from_bytes(report.xfam, "little"), _XFAM_ALLOWED)
    if report.mr_service_td is not None and any(report.mr_service_td):
        hint = "Another trust domain, which nobody judged, has rights over this one."
        yield failed("evidence.service-td", expected="none", got=report.mr_service_td.hex()[:32], hint=hint)
    elif report.mr_service_td is not None:
        yield passed("evidence.service-td", "none")


def check_module(report: TdReport, module: ModuleIdentity | None) -> Factor:
    """MRSIGNERSEAM and SEAMATTRIBUTES against TCB info's `module`, None: unknown. Attribute bits outside the mask must be
    zero."""
    got = f"signer {report.mr_signer_seam.hex()[:16]}, attributes {report.seam_attributes.hex()}"
    fits = module is not None and (
        report.mr_signer_seam == module.mr_signer
        and _masked(module.attributes, module.attributes_mask) == report.seam_attributes
    )
    if fits:
        return passed("evidence.seam", got)
    expected = "a known module"
    if module is not None:
        expected = f"signer {module.mr_signer.hex()[:16]}, attributes {module.attributes.hex()}"
    hint = "Not one of Intel's TDX modules, or one for debugging: it could read what the trust domain holds."
    return failed("evidence.seam", expected=expected, got=got, hint=hint)


def differing(qe: EnclaveReport, identity: QeIdentity) -> Iterator[tuple[str, str]]:
    """Where a quoting enclave's report differs from Intel's identity of it: (expected, got), under its masks."""
    if qe.mr_signer != identity.mr_signer:
        yield f"signer {identity.mr_signer.hex()}", qe.mr_signer.hex()
    if qe.isv_prod_id != identity.isv_prod_id:
        yield f"product {identity.isv_prod_id}", str(qe.isv_prod_id)
    mask = identity.misc_select_mask
    if qe.misc_select & mask != identity.misc_select & mask:
        yield f"MISCSELECT {identity.misc_select:08x}", f"{qe.misc_select:08x}"
    if _masked(qe.attributes, identity.attributes_mask) != _masked(identity.attributes, identity.attributes_mask):
        yield f"attributes {identity.attributes.hex()}", qe.attributes.hex()
    if qe.attributes[0] & _SGX_DEBUG:
        yield "not in debug mode", "debug"


def _masked(value: bytes, mask: bytes) -> bytes:
    return bytes(byte & allowed for byte, allowed in zip(value, mask, strict=True))
