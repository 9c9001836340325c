"""Whether what runs is what the policy allows: any one entry of the platform, every component that it names."""

from collections.abc import Iterator, Mapping

from cloister.verify.factors import Factor, failed, not_checked, passed
from cloister.verify.platform import Appraisal
from cloister.verify.policy import Measurements

__all__ = ["check_measurement"]

_Entry = Mapping[str, str | int]


def check_measurement(allowed: Measurements, appraisal: Appraisal) -> Iterator[Factor]:
    """When no entry matches, the components in which the nearest one differs each become a factor. What it does not name
    is said not to be checked.

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
    for component in sorted(nearest):
        yield _component(component, nearest, got)
    unpinned = sorted(got.keys() - nearest.keys() - {"measurement"})
    if unpinned and "measurement" not in nearest:  # which is over all of them
        yield not_checked("measurement", f"The policy does not pin {', '.join(unpinned)}: any could be running.")


def _differing(entry: _Entry, got: Mapping[str, str]) -> list[str]:
    return [component for component, value in entry.items() if got.get(component) != str(value)]


def _component(component: str, entry: _Entry, got: Mapping[str, str]) -> Factor:
    step = f"measurement.{component}"
    value = got.get(component, "nothing")
    if got.get(component) == str(entry[component]):
        return passed(step, value)
    hint = f"Other {component} runs than the policy allows. If you changed it yourself, update the policy."
    return failed(step, expected=str(entry[component]), got=value, hint=hint)
