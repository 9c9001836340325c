"""How a verification looks: what was verified, how long it will hold, every factor; a table on a terminal, else text."""

import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

from cloister.cli import output
from cloister.cli.explanations import explain
from cloister.cli.trust import first_use, verdict
from cloister.errors import CloisterError, Malformed, MalformedPolicy, NotTrusted, VerificationFailed
from cloister.verify import Factor, Verified
from cloister.verify.factors import Verdict
from cloister.verify.platform import Expiry, TcbLevel

__all__ = ["Reason", "moment", "reason_of", "refusal_json", "show", "show_json", "show_refusal"]

Reason: TypeAlias = Literal["out-of-date", "expired", "attack-or-mistake"]

_SENTENCES: dict[Reason, str] = {
    "out-of-date": "OUT OF DATE, not an attack: the evidence is genuine, and nothing but the age of the machine's firmware"
    " fails your policy. Its operator has to update it.",
    "expired": "TOO OLD: nothing but the time failed. Ask the enclave for new evidence.",
    "attack-or-mistake": "AN ATTACK OR A MISTAKE: what answers is not what your policy says it must be. Send nothing until"
    " you know why.",
}
_STYLES = {"pass": "green", "fail": "bold red", "not-checked": "yellow"}
_WORDS = {"pass": "pass", "fail": "FAIL", "not-checked": "not proved"}
_DAY = 86400.0
_RED, _YELLOW = 7, 30  # days


def moment(seconds: float) -> str:
    return _calendar(seconds, "%Y-%m-%d %H:%M:%S UTC")


def _calendar(seconds: float, form: str) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime(form)
    except (ValueError, OverflowError, OSError):  # beyond the calendar
        return "beyond the calendar"


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


# What was verified


def show(verified: Verified, *, explained: bool = False, early: TcbLevel | None = None) -> None:
    word, style = verdict(verified.simulated)
    output.line(output.styled((word, style), (f"  {output.one_line(verified.platform)}", "")))
    for part in first_use(verified):
        output.line(part, hang=2)
    for name, value in _facts(verified):
        output.line(f"  {output.one_line(name, 30):<14} {output.one_line(value)}")
    _show_forecast(verified.tcb, verified.expiries, verified.verified_at)
    if early is not None:
        output.line("firmware, by the early update set (tomorrow's standard):")
        for line, style in _firmware(early, verified.verified_at):
            output.line(f"  {line}", style)
    _show_factors(verified.factors, explained=explained)
    if verified.simulated:
        output.line(
            output.styled(("Simulated hardware proves nothing about who can read: whoever runs it can.", style))
        )


def show_json(verified: Verified, *, explained: bool = False, early: TcbLevel | None = None) -> None:
    told = verified.to_json()
    if early is not None:
        told["tcb_early"] = asdict(early)
    output.json_value(told | ({"explanations": _explanations(verified.factors)} if explained else {}))


def _facts(verified: Verified) -> Iterator[tuple[str, str]]:
    launch, statement = verified.launch, verified.statement
    yield "deployment", f"{launch.deployment}, release {launch.release}"
    yield "owner", launch.owner_key
    for model in statement.models:
        yield f"model {model.name}", f"{model.quantization}, sha256 {model.sha256}"
    yield "engine", f"{statement.engine.variant}, sha256 {statement.engine.sha256}"
    yield "weakened", ", ".join(statement.insecure) or "nothing"
    yield "until", moment(verified.expires_at)


# How long it will hold


def _show_forecast(tcb: TcbLevel | None, expiries: Sequence[Expiry], now: float) -> None:
    """The firmware's rating and age, then what ends when, soonest first."""
    if tcb is not None:
        output.line("firmware:")
        for line, style in _firmware(tcb, now):
            output.line(f"  {line}", style)
    if expiries:
        output.line("forecast:")
    for expiry in sorted(expiries, key=lambda one: one.at):
        days = _days(now, expiry.at)
        word, style = _urgency(days)
        row = f"  {_in_days(days):>13}  {_calendar(expiry.at, '%Y-%m-%d')}  {output.one_line(expiry.what, 60)}"
        output.line(output.styled((row, ""), (f"  {word}", style)) if word else row)


def _firmware(tcb: TcbLevel, now: float) -> Iterator[tuple[str, str]]:
    yield f"{output.one_line(tcb.status, 60)}", "green" if tcb.status == "UpToDate" else "yellow"
    if tcb.date is not None:
        ago = _count(max(int(_days(tcb.date, now)), 0))
        yield f"in step with the vendor's updates of {_calendar(tcb.date, '%Y-%m-%d')}, {ago} ago", ""
    if tcb.advisories:
        yield f"open advisories: {output.one_line(', '.join(tcb.advisories))}", "yellow"
    else:
        yield "no open advisories", ""


def _days(start: float, end: float) -> float:
    """At most ten million, whatever evidence says."""
    return max(min(1e7, (end - start) / _DAY), -1e7)


def _in_days(days: float) -> str:
    if days < 0:
        return "over"
    return "today" if days < 1 else f"in {_count(int(days))}"


def _count(days: int) -> str:
    return "1 day" if days == 1 else f"{days} days"


def _urgency(days: float) -> tuple[str, str]:
    if days < _RED:
        return "renew now", "bold red"
    return ("renew soon", "yellow") if days < _YELLOW else ("", "")


# Why it was refused


def show_refusal(error: CloisterError, *, as_json: bool = False, explained: bool = False) -> None:
    """The verdict to standard output, if there could be one; the error to standard error, where all are."""
    known = _factors_of(error)
    if as_json:
        output.json_value(refusal_json(error) | ({"explanations": _explanations(known)} if explained else {}))
    elif _was_judged(error):
        word, style = verdict(None)
        output.line(output.styled((word, style)))
        _show_factors(known, explained=explained)
        if known:
            output.line(output.styled((_SENTENCES[reason_of(known)], style)), hang=0)
    output.show_error(error, factors=False)


def refusal_json(error: CloisterError) -> dict[str, Any]:
    """The verification document of what was not verified."""
    known = _factors_of(error)
    return {
        "v": 1,
        "verdict": "not-trusted" if _was_judged(error) else "not-verified",
        "reason": reason_of(known) if known else None,
        "error": type(error).__name__,
        "message": error.message,
        "hint": error.hint,
        "factors": [factor.to_json() for factor in known],
    }


def _factors_of(error: CloisterError) -> tuple[Factor, ...]:
    factors = error.factors if isinstance(error, VerificationFailed) else ()
    return tuple(factor for factor in factors if isinstance(factor, Factor))


def _was_judged(error: CloisterError) -> bool:
    """Whether it is about the evidence: a policy at fault judges nothing."""
    policy = isinstance(error, MalformedPolicy) or error.step.startswith("policy.")
    return isinstance(error, NotTrusted | Malformed) and not policy


def _explanations(factors: Iterable[Factor]) -> dict[str, dict[str, str]]:
    found = {factor.step: explain(factor.step) for factor in factors}
    return {step: asdict(one) for step, one in found.items() if one is not None}


# The factors


def _show_factors(factors: Sequence[Factor], *, explained: bool) -> None:
    """What failed comes last: it is what a person looks for, and a terminal shows the end."""
    if output.is_terminal(sys.stdout):
        _show_table(factors, explained=explained)
        return
    for title, verdict_of in (("checked:", "pass"), ("not proved:", "not-checked"), ("failed:", "fail")):
        chosen = [factor for factor in factors if factor.verdict == verdict_of]
        if chosen:
            output.line(title)
        for factor in chosen:
            _show_plain(factor)
            for text in _explained(factor) if explained else ():
                output.line(f"       {text}")


def _show_plain(factor: Factor) -> None:
    """A passed factor's value is for the eye (`--json` has it whole); a failed one's is there to be compared."""
    name, style = output.one_line(factor.step, 40), _STYLES[factor.verdict]
    if factor.verdict == "not-checked":
        output.line(f"  {name}: {output.one_line(factor.hint)}")
        return
    if factor.verdict == "pass":
        output.line(output.styled(("  pass", style), (f" {name:<27} {output.one_line(factor.got, 44)}", "")))
    else:
        output.line(output.styled(("  FAIL", style), (f" {name}", "")))
        output.line(f"       expected: {output.one_line(factor.expected) or 'nothing'}")
        output.line(f"       got:      {output.one_line(factor.got) or 'nothing'}")
    if factor.hint:
        output.line(output.styled((f"       {output.one_line(factor.hint)}", "yellow")))


def _show_table(factors: Sequence[Factor], *, explained: bool) -> None:
    """Of a refusal, unless it shall be explained: what failed, and the mere names of the rest."""
    brief = not explained and any(factor.verdict == "fail" for factor in factors)
    rows = [factor for factor in factors if factor.verdict == "fail"] if brief else factors
    steps = max(8, *(len(output.one_line(factor.step, 34)) for factor in rows))
    width = max(shutil.get_terminal_size((100, 24)).columns - steps - 15, 24)
    if factors:
        output.line(f"{'STEP':<{steps}}  RESULT      WHAT WAS FOUND", "bold")
    for verdict_of in ("pass", "not-checked") if brief else ():
        names = [output.one_line(factor.step, 40) for factor in factors if factor.verdict == verdict_of]
        if names:
            _row(f"{len(names)} steps", verdict_of, _wrapped(", ".join(dict.fromkeys(names)), width, "dim"), steps)
    for factor in sorted(rows, key=lambda one: ("pass", "not-checked", "fail").index(one.verdict)):
        cell = _cell(factor, width, explained=explained)
        _row(output.one_line(factor.step, 34), factor.verdict, cell, steps)


def _row(step: str, verdict_of: Verdict, cell: Iterable[tuple[str, str]], steps: int) -> None:
    for at, (text, style) in enumerate(cell):
        name, word = (step, _WORDS[verdict_of]) if at == 0 else ("", "")
        output.line(output.styled((f"{name:<{steps}}  ", ""), (f"{word:<10}  ", _STYLES[verdict_of]), (text, style)))


def _cell(factor: Factor, width: int, *, explained: bool) -> Iterator[tuple[str, str]]:
    """The lines of a row's last column, and their styles."""
    if factor.verdict == "pass":
        yield output.one_line(factor.got, width), ""
    elif factor.verdict == "fail":
        yield from _wrapped(f"expected {output.one_line(factor.expected) or 'nothing'}", width, "")
        yield from _wrapped(f"got      {output.one_line(factor.got) or 'nothing'}", width, "")
    if factor.hint:
        yield from _wrapped(output.one_line(factor.hint), width, "yellow")
    for text in _explained(factor) if explained else ():
        yield from _wrapped(text, width, "dim")


def _wrapped(text: str, width: int, style: str) -> Iterator[tuple[str, str]]:
    return ((line, style) for line in textwrap.wrap(text, width, break_on_hyphens=False) or [""])


def _explained(factor: Factor) -> Iterator[str]:
    """What it means; of a failed one, also what to do."""
    if found := explain(factor.step):
        yield found.meaning
        if factor.verdict == "fail":
            yield found.remedy
