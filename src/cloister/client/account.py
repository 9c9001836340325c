"""What a verification says, in words: the same in the terminal (`cloister verify --explain`) and on the proxy's page.

Nothing here is made fit for a terminal or a page: whoever shows it does that. Times are Unix seconds.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

from cloister.client.explanations import about, explain
from cloister.errors import CloisterError, Malformed, MalformedPolicy, NotTrusted, VerificationFailed
from cloister.verify import Factor, Verified
from cloister.verify.factors import Verdict
from cloister.verify.platform import Expiry, TcbLevel

__all__ = [
    "FIRST_USE",
    "RESULTS",
    "SENTENCES",
    "SIMULATED",
    "Forecast",
    "Reason",
    "Tone",
    "explained",
    "explained_refusal",
    "explanations",
    "factors_of",
    "facts",
    "firmware",
    "forecast",
    "moment",
    "reason_of",
    "refusal_json",
    "urgency",
    "was_judged",
    "word",
]

Reason: TypeAlias = Literal["out-of-date", "expired", "attack-or-mistake"]
Tone: TypeAlias = Literal["", "good", "warn", "bad"]

SENTENCES: dict[Reason, str] = {
    "out-of-date": "OUT OF DATE, not an attack: the evidence is genuine, and nothing but the age of the machine's firmware"
    " fails your policy. Its operator has to update it.",
    "expired": "TOO OLD: nothing but the time failed. Ask the enclave for new evidence.",
    "attack-or-mistake": "AN ATTACK OR A MISTAKE: what answers is not what your policy says it must be. Send nothing until"
    " you know why.",
}
SIMULATED = "Simulated hardware proves nothing about who can read: whoever runs it can."
FIRST_USE = "the policy was written from a running server: compare it with the owner's, by another way."
RESULTS: dict[Verdict, str] = {"pass": "pass", "fail": "FAIL", "not-checked": "not proved"}
_DAY = 86400.0
_RED, _YELLOW = 7, 30  # days


def word(simulated: bool | None) -> str:
    """The verdict's own word; None: not trusted."""
    return "NOT TRUSTED" if simulated is None else "SIMULATED" if simulated else "VERIFIED"


def moment(seconds: float) -> str:
    return _calendar(seconds, "%Y-%m-%d %H:%M:%S UTC")


def _calendar(seconds: float, form: str) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime(form)
    except (ValueError, OverflowError, OSError):  # beyond the calendar
        return "beyond the calendar"


# What was verified, and how long it will hold


def facts(verified: Verified) -> Iterator[tuple[str, str]]:
    launch, statement = verified.launch, verified.statement
    yield "deployment", f"{launch.deployment}, release {launch.release}"
    yield "owner", launch.owner_key
    for model in statement.models:
        yield f"model {model.name}", f"{model.quantization}, sha256 {model.sha256}"
        if model.lineage_sha256 is not None:
            yield "lineage", f"sha256 {model.lineage_sha256}, of the record that `cloister models show` prints"
    yield "engine", f"{statement.engine.variant}, sha256 {statement.engine.sha256}"
    yield "weakened", ", ".join(statement.insecure) or "nothing"
    yield "until", moment(verified.expires_at)


def firmware(tcb: TcbLevel, now: float) -> Iterator[tuple[str, Tone]]:
    """The vendor's rating, its age, and what is still open; each with its tone."""
    yield tcb.status, "good" if tcb.status == "UpToDate" else "warn"
    if tcb.date is not None:
        ago = _count(max(int(_days(tcb.date, now)), 0))
        yield f"in step with the vendor's updates of {_calendar(tcb.date, '%Y-%m-%d')}, {ago} ago", ""
    if tcb.advisories:
        yield f"open advisories: {', '.join(tcb.advisories)}", "warn"
    else:
        yield "no open advisories", ""


@dataclass(frozen=True, slots=True)
class Forecast:
    """`what` ends on `date`, which is `when` from now; `word` says whether to act, in `tone`."""

    when: str
    date: str
    what: str
    word: str
    tone: Tone


def forecast(expiries: Sequence[Expiry], now: float) -> Iterator[Forecast]:
    """What ends when, soonest first."""
    for expiry in sorted(expiries, key=lambda one: one.at):
        days = _days(now, expiry.at)
        yield Forecast(_in_days(days), _calendar(expiry.at, "%Y-%m-%d"), expiry.what, *urgency(days))


def urgency(days: float) -> tuple[str, Tone]:
    if days < _RED:
        return "renew now", "bad"
    return ("renew soon", "warn") if days < _YELLOW else ("", "")


def _days(start: float, end: float) -> float:
    """At most ten million, whatever evidence says."""
    return max(min(1e7, (end - start) / _DAY), -1e7)


def _in_days(days: float) -> str:
    if days < 0:
        return "over"
    return "today" if days < 1 else f"in {_count(int(days))}"


def _count(days: int) -> str:
    return "1 day" if days == 1 else f"{days} days"


# Why it was refused


def reason_of(factors: Iterable[Factor]) -> Reason:
    """What kind of refusal these factors make: only the firmware's age, only the time, or anything else.

    A label in front (`gpu-0.tcb.status`) changes nothing.
    """
    failed = [factor.step.split(".") for factor in factors if factor.verdict == "fail"]
    if failed and all("tcb" in (words[0], *words[1:-1]) for words in failed):
        return "out-of-date"
    if failed and all(words in (["expires"], ["issued"]) for words in failed):
        return "expired"
    return "attack-or-mistake"


def refusal_json(error: CloisterError) -> dict[str, Any]:
    """The verification document of what was not verified."""
    known = factors_of(error)
    return {
        "v": 1,
        "verdict": "not-trusted" if was_judged(error) else "not-verified",
        "reason": reason_of(known) if known else None,
        "error": type(error).__name__,
        "message": error.message,
        "hint": error.hint,
        "factors": [factor.to_json() for factor in known],
    }


def factors_of(error: CloisterError) -> tuple[Factor, ...]:
    factors = error.factors if isinstance(error, VerificationFailed) else ()
    return tuple(factor for factor in factors if isinstance(factor, Factor))


def was_judged(error: CloisterError) -> bool:
    """Whether it is about the evidence: a policy at fault judges nothing."""
    policy = isinstance(error, MalformedPolicy) or error.step.startswith("policy.")
    return isinstance(error, NotTrusted | Malformed) and not policy


# With explanations


def explanations(factors: Iterable[Factor]) -> dict[str, dict[str, str]]:
    found = {factor.step: explain(factor.step) for factor in factors}
    return {step: asdict(one) for step, one in found.items() if one is not None}


def explained(verified: Verified) -> dict[str, Any]:
    """All that `cloister verify --explain` says of a verification, as data for a page."""
    now = verified.verified_at
    return {
        "word": word(verified.simulated),
        "platform": verified.platform,
        "sentence": SIMULATED if verified.simulated else "",
        "first_use": FIRST_USE if verified.first_use else "",
        "facts": [list(fact) for fact in facts(verified)],
        "firmware": [] if verified.tcb is None else [list(line) for line in firmware(verified.tcb, now)],
        "forecast": [asdict(one) for one in forecast(verified.expiries, now)],
        "steps": [_step(factor) for factor in verified.factors],
    }


def explained_refusal(error: CloisterError) -> dict[str, Any]:
    """As `explained`, of what was not verified; where nothing could be judged, `word` is empty as in the terminal."""
    known = factors_of(error)
    return {
        "word": word(None) if was_judged(error) else "",
        "platform": "",
        "sentence": SENTENCES[reason_of(known)] if known else "",
        "first_use": "",
        "facts": [],
        "firmware": [],
        "forecast": [],
        "steps": [_step(factor) for factor in known],
    }


def _step(factor: Factor) -> dict[str, str]:
    """`meaning`: what it is; `remedy`: what to do about it, of a failed one only."""
    found = explain(factor.step)
    told = {**factor.to_json(), "about": about(factor.step), "result": RESULTS[factor.verdict]}
    failed = factor.verdict == "fail"
    return told | {
        "meaning": found.meaning if found else "",
        "remedy": found.remedy if found and failed else "",
    }
