"""What apps may take of the operator's machine, and whether there is room for one more."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from cloister.errors import HostFull, WrongUse

__all__ = ["TIERS", "Capacity", "Resources", "choose_cores"]

_SMALLEST = 64 << 20


@dataclass(frozen=True, slots=True)
class Resources:
    """Limits of one app: resident memory in bytes, and on how many CPUs it may run."""

    memory_bytes: int
    cores: int


TIERS: Mapping[str, Resources] = MappingProxyType(
    {
        "small": Resources(2 << 30, 1),
        "medium": Resources(8 << 30, 4),
        "large": Resources(32 << 30, 16),
    }
)
"""Words for usual sizes; an app may also ask in numbers. More cores than there are: all there are."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the operator gives to apps together. Memory is promised once; cores are shared."""

    memory_bytes: int
    cpus: tuple[int, ...]

    @classmethod
    def of_this_machine(cls, share: float = 0.9) -> "Capacity":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return cls(int(total * share), tuple(sorted(os.sched_getaffinity(0))))

    def admit(self, wanted: Resources, others: Iterable[Resources]) -> Resources:
        """What is given. Raises: WrongUse for no sensible size, HostFull when it is promised to others."""
        if wanted.memory_bytes < _SMALLEST or wanted.cores < 1:
            raise WrongUse("An app needs a core, and 64 MiB of memory.", step="resources")
        free = self.memory_bytes - sum(other.memory_bytes for other in others)
        if wanted.memory_bytes > free:
            raise HostFull(
                "The host has not that much memory left for an app.",
                hint="Ask for less (resources.memory in cloister.toml), or stop another app.",
                step="resources",
                expected=f"{wanted.memory_bytes >> 20} MiB",
                got=f"{max(free, 0) >> 20} MiB",
            )
        return Resources(wanted.memory_bytes, min(wanted.cores, len(self.cpus)))


def choose_cores(cpus: Sequence[int], taken: Iterable[Sequence[int]], count: int) -> tuple[int, ...]:
    """`count` of `cpus`, those that fewest of the others (`taken`) run on first."""
    load = dict.fromkeys(cpus, 0)
    for one in taken:
        for cpu in one:
            if cpu in load:
                load[cpu] += 1
    return tuple(sorted(sorted(cpus, key=lambda cpu: load[cpu])[:count]))
