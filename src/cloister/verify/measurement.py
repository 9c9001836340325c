"""Whether what runs is what the policy allows: any one entry of the platform, every component that it names."""

from collections.abc import Iterator, Mapping

from cloister.verify.factors import Factor, failed, not_checked, passed
from cloister.verify.platform import Appraisal
from cloister.verify.policy import LEAST, NOTES, Measurements

__all__ = ["check_measurement"]

_Entry = Mapping[str, str | int]


def check_measurement(allowed: Measurements, appraisal: Appraisal) -> Iterator[Factor]:
    """When no entry matches, the components in which the nearest one differs each become a factor. What it does not name
    is said not to be checked.

    A component `min_…` is a number that what it names must reach; `vcpus` says what a measurement was computed for.

    A policy without any measurement accepts a simulator (said as "not-checked") and no hardware.
    """
    got = appraisal.measurement
    if not allowed and appraisal.simulated:
        yield not_checked(
            "measurement", "The policy pins no measurement: any code could be running.", got["measurement"]
        )
        return
    entries = allowed.get(appraisal.platform, ())
    if not entries:
        hint = f"The policy has no measurement for {appraisal.platform}."
        yield failed("measurement", expected="nothing of this platform", got=appraisal.platform, hint=hint)
        return
    nearest = min(entries, key=lambda entry: len(_differing(entry, got)))
    for component in sorted(nearest.keys() - NOTES):
        yield _component(component, nearest, got)
    unpinned = sorted(got.keys() - {name.removeprefix(LEAST) for name in nearest} - {"measurement"})
    if unpinned and not (appraisal.simulated and "measurement" in nearest):  # a simulator's is over all of them
        yield not_checked("measurement", f"The policy does not pin {', '.join(unpinned)}: any could be running.")


def _differing(entry: _Entry, got: Mapping[str, str]) -> list[str]:
    return [name for name, value in entry.items() if name not in NOTES and not _fits(name, value, got)]


def _fits(name: str, value: str | int, got: Mapping[str, str]) -> bool:
    if not name.startswith(LEAST):
        return got.get(name) == str(value)
    number = got.get(name.removeprefix(LEAST), "")
    return number.isdecimal() and isinstance(value, int) and int(number) >= value


def _component(component: str, entry: _Entry, got: Mapping[str, str]) -> Factor:
    step = f"measurement.{component}"
    value = got.get(component.removeprefix(LEAST), "nothing")
    if _fits(component, entry[component], got):
        return passed(step, value)
    hint = f"Other {component} runs than the policy allows. If you changed it yourself, update the policy."
    return failed(step, expected=str(entry[component]), got=value, hint=hint)
