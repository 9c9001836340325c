"""What a policy would have to say so that it accepts what it, or a session's first verification, has just refused.

It is offered only where nothing but pins differ: what runs, whose it is, which model. Evidence that is not genuine, debug
mode, old firmware and a weakened setting are no matter of a pin, and no lines are offered for them.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence

from cloister.client.attestor import CHANGED
from cloister.evidence.simulated import PLATFORM as SIMULATED
from cloister.verify import Factor
from cloister.verify.policy import GPUS, LEAST

__all__ = ["policy_change"]

_WORDS = {"owner": "owner_key", "deployment": "deployment", "app": "app", "config": "config"}
_COMPONENT = re.compile(r"(gpu-\d+\.)?measurement\.\w+")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LAUNCHED = ("owner", "deployment", "app", "config", "models")
"""What a launch config names: of one that changed under a running session, any of it may be what did."""


def policy_change(factors: Iterable[Factor]) -> str:
    """Lines of TOML; "" where no policy would accept it, or where what runs is not known well enough to name it.

    They say what runs, not that it is right: somebody has to ask the owner.
    """
    known = list(factors)
    failed = {factor.step: factor for factor in known if factor.verdict == "fail"}
    steps = _changed(failed.values())
    got = {factor.step: factor.got for factor in known} | {step: factor.got for step, factor in failed.items()}
    models = _models(known)
    if not steps or not all(_is_pin(step) for step in steps) or ("models" in steps and not models):
        return ""
    lines = [f"{_WORDS[step]} = {_text(got[step])}" for step in _WORDS if step in steps and step in got]
    if "models" in steps:
        lines.append(f"models = [{', '.join(_text(f'sha256:{digest}') for digest in models)}]")
    if "platform" in steps:
        lines.append(f"platforms = [{_text(got['platform'])}]")
    measured = _measurements(steps, got)
    if measured is None or not all(value.isprintable() for value in got.values()):
        return ""
    return "\n".join([*lines, *measured]) + "\n"


def _changed(failed: Iterable[Factor]) -> frozenset[str]:
    steps = set()
    for factor in failed:
        steps |= set(_LAUNCHED) if factor.step == "launch" and factor.hint == CHANGED else {factor.step}
    return frozenset(steps)


def _is_pin(step: str) -> bool:
    return step in (*_LAUNCHED, "platform") or bool(_COMPONENT.fullmatch(step))


def _models(factors: Sequence[Factor]) -> list[str]:
    """All digests that are named, whichever of them the policy did not know."""
    named = [factor.got.split() for factor in factors if factor.step in ("models", "statement.models")]
    return list(dict.fromkeys(word for words in named for word in words if _DIGEST.fullmatch(word)))


def _measurements(steps: frozenset[str], got: Mapping[str, str]) -> list[str] | None:
    """The table of them, where they are among what changed; None where the platform is not known."""
    labels = sorted({found[1] or "" for step in steps if (found := _COMPONENT.fullmatch(step))})
    if not labels:
        return [] if "platform" not in steps else None
    if "platform" not in got:
        return None
    entries: dict[str, list[str]] = {}
    for label in labels:
        entry = _entry(label, got)
        platform = GPUS if label else got["platform"]
        if entry not in entries.setdefault(platform, []):
            entries[platform].append(entry)
    return ["[measurements]", *(f"{name} = [{', '.join(several)}]" for name, several in entries.items())]


def _entry(label: str, got: Mapping[str, str]) -> str:
    """Every component that is known: an entry that names fewer would let more pass."""
    start = f"{label}measurement."
    found = {step.removeprefix(start): value for step, value in got.items() if step.startswith(start)}
    if not label and got["platform"] == SIMULATED and "measurement" in found:
        found = {"measurement": found["measurement"]}  # it is over all the others
    pairs = (f"{name} = {value if name.startswith(LEAST) else _text(value)}" for name, value in found.items())
    return "{ " + ", ".join(pairs) + " }"


def _text(value: str) -> str:
    """JSON's strings are TOML's."""
    return json.dumps(value)
