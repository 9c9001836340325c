"""How a verification looks: what was verified, how long it will hold, every factor; a table on a terminal, else text."""

import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import typer

from cloister.cli import output
from cloister.cli.trust import first_use, verdict
from cloister.client import account
from cloister.client.account import RESULTS, SENTENCES, Reason, moment, reason_of, refusal_json
from cloister.client.explanations import explain
from cloister.client.policy_change import policy_change
from cloister.errors import CloisterError
from cloister.verify import Factor, Verified
from cloister.verify.factors import Verdict
from cloister.verify.platform import Expiry, TcbLevel

__all__ = [
    "Reason",
    "moment",
    "reason_of",
    "refusal_json",
    "show",
    "show_blocked",
    "show_json",
    "show_refusal",
    "stopping",
]

_STYLES = {"pass": "green", "fail": "bold red", "not-checked": "yellow"}
_TONES: dict[account.Tone, str] = {"": "", "good": "green", "warn": "yellow", "bad": "bold red"}
_CHANGE = (
    "These lines of a policy would accept what answers there now. They say what runs, not that it is right: ask its owner"
    " first, by another way. Then start the command again with that policy."
)


# What was verified


def show(verified: Verified, *, explained: bool = False, early: TcbLevel | None = None) -> None:
    word, style = verdict(verified.simulated)
    output.line(output.styled((word, style), (f"  {output.one_line(verified.platform)}", "")))
    for part in first_use(verified):
        output.line(part, hang=2)
    for name, value in account.facts(verified):
        output.line(f"  {output.one_line(name, 30):<14} {output.one_line(value)}")
    _show_forecast(verified.tcb, verified.expiries, verified.verified_at)
    if early is not None:
        output.line("firmware, by the early update set (tomorrow's standard):")
        for line, style in _firmware(early, verified.verified_at):
            output.line(f"  {line}", style)
    _show_factors(verified.factors, explained=explained)
    if verified.simulated:
        output.line(output.styled((account.SIMULATED, style)))


def show_json(verified: Verified, *, explained: bool = False, early: TcbLevel | None = None) -> None:
    told = verified.to_json()
    if early is not None:
        told["tcb_early"] = asdict(early)
    output.json_value(told | ({"explanations": account.explanations(verified.factors)} if explained else {}))


# How long it will hold


def _show_forecast(tcb: TcbLevel | None, expiries: Sequence[Expiry], now: float) -> None:
    """The firmware's rating and age, then what ends when, soonest first."""
    if tcb is not None:
        output.line("firmware:")
        for line, style in _firmware(tcb, now):
            output.line(f"  {line}", style)
    if expiries:
        output.line("forecast:")
    for one in account.forecast(expiries, now):
        row = f"  {one.when:>13}  {one.date}  {output.one_line(one.what, 60)}"
        output.line(output.styled((row, ""), (f"  {one.word}", _TONES[one.tone])) if one.word else row)


def _firmware(tcb: TcbLevel, now: float) -> Iterator[tuple[str, str]]:
    return ((output.one_line(line), _TONES[tone]) for line, tone in account.firmware(tcb, now))


# Why it was refused


def show_refusal(error: CloisterError, *, as_json: bool = False, explained: bool = False) -> None:
    """The verdict to standard output, if there could be one; the error to standard error, where all are."""
    known = account.factors_of(error)
    if as_json:
        told = refusal_json(error) | {"policy_change": policy_change(known)}
        output.json_value(told | ({"explanations": account.explanations(known)} if explained else {}))
    elif account.was_judged(error):
        word, style = verdict(None)
        output.line(output.styled((word, style)))
        _show_factors(known, explained=explained)
        if lines := policy_change(known):
            output.line("if this change was meant:", "bold")
            output.line(_CHANGE, hang=0)
            output.line(lines)
        if known:
            output.line(output.styled((SENTENCES[reason_of(known)], style)), hang=0)
    output.show_error(error, factors=False)


def show_blocked(error: CloisterError) -> None:
    """The error with old and new of what failed, and the lines of a policy that would accept it, where only pins differ;
    all to standard error."""
    output.show_error(error)
    if lines := policy_change(account.factors_of(error)):
        output.note("if this change was meant:", "bold")
        output.note(_CHANGE, hang=0)
        output.note(lines.rstrip("\n"))


@contextmanager
def stopping() -> Iterator[None]:
    """An error within is shown as `show_blocked` does, and ends the command. Raises: typer.Exit with the error's code."""
    try:
        yield
    except CloisterError as error:
        show_blocked(error)
        raise typer.Exit(error.exit_code) from error


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
        name, word = (step, RESULTS[verdict_of]) if at == 0 else ("", "")
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
