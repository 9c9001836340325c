"""How Intel rates a platform's firmware: which levels it reaches, and what the policy makes of them.

Algorithm of Intel's "Provisioning Certification Service for ECDSA Attestation", API version 4, "Get TCB Info" and "Get
Quoting Enclave Identity": the first level of which every component is reached.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from cloister.evidence.intel import EnclaveReport, TdReport
from cloister.evidence.intel_collateral import ModuleIdentity, PlatformLevel, QeIdentity, SvnLevel, TcbInfo
from cloister.verify.factors import Factor, failed, passed
from cloister.verify.platform import TcbLevel
from cloister.verify.policy import TCB_STATUSES, Tcb

__all__ = [
    "RELAUNCH",
    "REVOKED",
    "STATUSES",
    "UP_TO_DATE",
    "Reached",
    "check_evaluation",
    "check_status",
    "join",
    "module_of",
    "rank",
    "reach",
]

UP_TO_DATE = "UpToDate"
REVOKED = "Revoked"
RELAUNCH = ("TDRelaunchAdvised", "TDRelaunchAdvisedConfigurationNeeded")

STATUSES = (*TCB_STATUSES, REVOKED)
"""Intel's words, from the best to the worst; a word that is not among them counts as the worst."""

_OLD = ("OutOfDate", "OutOfDateConfigurationNeeded")
_CONFIGURATION = "Configuration"
_BOTH = (
    ("OutOfDate", _CONFIGURATION, "OutOfDateConfigurationNeeded"),
    ("TDRelaunchAdvised", _CONFIGURATION, "TDRelaunchAdvisedConfigurationNeeded"),
    ("ConfigurationNeeded", "SWHardening", "ConfigurationAndSWHardeningNeeded"),
)
"""The worst of several words, what another of them asks for too, and the word that says both."""

_LAUNCHED, _RUNNING, _QE = "launched", "running", "quoting enclave"


@dataclass(frozen=True, slots=True)
class Reached:
    """What platform, TDX module and quoting enclave reach. `level` is None, and `missing` says of what, where one of
    them is below every level. `level.status` is all their words in one (`join`), `level.date` the platform's."""

    level: TcbLevel | None
    missing: str = ""


def reach(
    tcb_info: TcbInfo,
    identity: QeIdentity,
    *,
    cpu_svn: bytes,
    pce_svn: int,
    qe: EnclaveReport,
    td: TdReport | None = None,
) -> Reached:
    """`cpu_svn`, `pce_svn` from the PCK certificate; `td` for TDX. A TD report 1.5 is rated as launched and as it runs:
    where it runs on firmware that stands, what it was launched on being old is Intel's TDRelaunchAdvised. That says
    nothing about the quoting enclave, whose own word is joined to it."""
    found: dict[str, list[PlatformLevel | SvnLevel]] = {}
    for part, name, level in _levels(tcb_info, identity, cpu_svn, pce_svn, qe, td):
        if level is None:
            return Reached(None, name)
        found.setdefault(part, []).append(level)
    said = {part: join(*(level.status for level in levels)) for part, levels in found.items()}
    firmware = _firmware(said[_LAUNCHED], said.get(_RUNNING))
    advisories = tuple(
        dict.fromkeys(name for levels in found.values() for level in levels for name in level.advisories)
    )
    return Reached(TcbLevel(join(firmware, said[_QE]), advisories, found[_LAUNCHED][0].date))


def join(*statuses: str) -> str:
    """One word for several: the worst, and what another one asks for beside it, where Intel has a word for both."""
    worst = max(statuses, key=rank)
    for word, other, both in _BOTH:
        if worst == word and any(other in status for status in statuses):
            return both
    return worst


def _firmware(launched: str, running: str | None) -> str:
    """Platform and TDX module, as launched and as they run; None: the report does not say how they run."""
    if running is None:
        return launched
    if launched in _OLD and rank(running) < rank(RELAUNCH[0]):
        return RELAUNCH[1] if _CONFIGURATION in launched + running else RELAUNCH[0]
    return join(launched, running)


def rank(status: str) -> int:
    """Worse is more."""
    return STATUSES.index(status) if status in STATUSES else len(STATUSES)


def _levels(
    tcb_info: TcbInfo, identity: QeIdentity, cpu_svn: bytes, pce_svn: int, qe: EnclaveReport, td: TdReport | None
) -> Iterator[tuple[str, str, PlatformLevel | SvnLevel | None]]:
    """(part, what of it, its level)"""
    if td is None:
        yield _LAUNCHED, "platform", _platform_level(tcb_info.levels, cpu_svn, b"", pce_svn)
    else:
        for part, tdx_svn in ((_LAUNCHED, td.tee_tcb_svn), (_RUNNING, td.tee_tcb_svn2)):
            if tdx_svn is not None:
                yield part, "platform", _platform_level(tcb_info.levels, cpu_svn, tdx_svn, pce_svn)
                module = module_of(tcb_info, tdx_svn)
                if module is None:
                    yield part, "TDX module", None
                elif module.levels:
                    yield part, "TDX module", _svn_level(module.levels, tdx_svn[0])
    yield _QE, _QE, _svn_level(identity.levels, qe.isv_svn)


def _platform_level(levels: Iterable[PlatformLevel], cpu: bytes, tdx: bytes, pce_svn: int) -> PlatformLevel | None:
    """The first two TDX components are the module's; where it has a major version, its own identity rates it instead."""
    skip = 2 if tdx and tdx[1] > 0 else 0
    for level in levels:
        if pce_svn >= level.pce_svn and _reaches(cpu, level.sgx) and _reaches(tdx[skip:], level.tdx[skip:]):
            return level
    return None


def _reaches(svns: Sequence[int], floor: Sequence[int]) -> bool:
    return len(svns) == len(floor) and all(svn >= least for svn, least in zip(svns, floor, strict=True))


def _svn_level(levels: Iterable[SvnLevel], svn: int) -> SvnLevel | None:
    return next((level for level in levels if svn >= level.isv_svn), None)


def module_of(tcb_info: TcbInfo, tdx_svn: bytes) -> ModuleIdentity | None:
    """The TDX module's expected identity by its major version, which is the second byte of TEE_TCB_SVN; None: unknown."""
    if tdx_svn[1] == 0 or not tcb_info.module_identities:
        return tcb_info.module
    wanted = f"TDX_{tdx_svn[1]:02X}"
    return next((identity for identity in tcb_info.module_identities if identity.id.upper() == wanted), None)


def check_status(level: TcbLevel, policy: Tcb) -> Iterator[Factor]:
    """The status is UpToDate or tolerated, and so is every open advisory. Revoked is never tolerated: judged elsewhere."""
    tolerated = {UP_TO_DATE, *policy.tolerate} - {REVOKED}
    if level.status in tolerated:
        yield passed("tcb.status", level.status)
    else:
        hint = "Genuine, but its firmware is not current: ask its owner to update, or add the status to tcb.tolerate."
        yield failed("tcb.status", expected=" or ".join(sorted(tolerated)), got=level.status, hint=hint)
    allowed = policy.tolerate_advisories
    left = [] if allowed is None else [advisory for advisory in level.advisories if advisory not in allowed]
    if left:
        hint = "Read these advisories; where they do not matter here, add them to tcb.tolerate_advisories."
        expected = " ".join(sorted(allowed or ())) or "no open advisory"
        yield failed("tcb.advisories", expected=expected, got=" ".join(left), hint=hint)
    else:
        yield passed("tcb.advisories", " ".join(level.advisories) or "none open")


def check_evaluation(tcb_info: TcbInfo, identity: QeIdentity, policy: Tcb) -> Factor:
    """The lower of both numbers. They grow with each of Intel's TCB recoveries."""
    number = min(tcb_info.evaluation, identity.evaluation)
    floor = policy.min_tcb_evaluation_data_number
    if floor is None or number >= floor:
        return passed("tcb.evaluation", str(number))
    hint = "The collateral is from before a TCB recovery that the policy knows of. Fetch it afresh."
    return failed("tcb.evaluation", expected=f"at least {floor}", got=str(number), hint=hint)
