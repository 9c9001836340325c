"""Whether a boot log is that of the registers which the hardware signed: replayed, every register that it touches equal."""

from collections.abc import Mapping

from cloister.evidence.eventlog import parse_eventlog, replay_pcrs, replay_rtmrs
from cloister.verify.factors import Factor, failed, passed

__all__ = ["check_pcr_log", "check_rtmr_log"]

_STEP = "evidence.eventlog"


def check_pcr_log(log: bytes, pcrs: Mapping[int, bytes]) -> Factor:
    """The SHA-256 bank; `pcrs` as the TPM signed them. A PCR that the log touches and the quote lacks does not match.

    Does not check: whether what the log says beside its digests is true (`Event.proves_data` tells), nor that every
    PCR is in it.

    Raises: MalformedEvidence.
    """
    return _compare("pcr", replay_pcrs(parse_eventlog(log)), pcrs)


def check_rtmr_log(log: bytes, rtmrs: Mapping[int, bytes]) -> Factor:
    """A CCEL against RTMR0 to RTMR3, as the TD quote has them (48 bytes each). Otherwise as `check_pcr_log`."""
    return _compare("rtmr", replay_rtmrs(parse_eventlog(log)), rtmrs)


def _compare(word: str, replayed: Mapping[int, bytes], signed: Mapping[int, bytes]) -> Factor:
    wrong = [index for index in sorted(replayed) if signed.get(index) != replayed[index]]
    if not replayed:
        return failed(_STEP, expected="measurements", got="an empty log", hint="The boot log says nothing.")
    if not wrong:
        return passed(_STEP, "replayed into " + " ".join(f"{word}{index}" for index in sorted(replayed)))
    first = wrong[0]
    return failed(
        _STEP,
        expected=f"{word}{first} {signed[first].hex()}" if first in signed else f"{word}{first} in the quote",
        got=" ".join([f"{word}{first} {replayed[first].hex()}", *(f"{word}{index}" for index in wrong[1:])]),
        hint="The boot log is another machine's, or another boot's, or was changed.",
    )
