"""Factors: the named outcome of each step of a verification, the same in the terminal, JSON, proxy and web panel."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

__all__ = ["Factor", "Verdict", "compare", "failed", "not_checked", "passed"]

Verdict: TypeAlias = Literal["pass", "fail", "not-checked"]


@dataclass(frozen=True, slots=True)
class Factor:
    """`step` is a stable name; `expected` and `got` are short and printable; `hint` is one line for a person.

    "not-checked" is said of what this verification does not prove; it never stands for a check that could not run.
    """

    step: str
    verdict: Verdict
    expected: str = ""
    got: str = ""
    hint: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def passed(step: str, got: str = "", hint: str = "") -> Factor:
    return Factor(step, "pass", got, got, hint)


def failed(step: str, *, expected: str = "", got: str = "", hint: str = "") -> Factor:
    return Factor(step, "fail", expected, got, hint)


def not_checked(step: str, hint: str, got: str = "") -> Factor:
    return Factor(step, "not-checked", "", got, hint)


def compare(step: str, *, expected: str | Iterable[str], got: str, hint: str) -> Factor:
    """Pass when `got` is (one of) `expected`; `hint` is shown only on a failure."""
    allowed = [expected] if isinstance(expected, str) else sorted(expected)
    if got in allowed:
        return passed(step, got)
    return failed(step, expected=" or ".join(allowed) or "nothing", got=got or "nothing", hint=hint)
