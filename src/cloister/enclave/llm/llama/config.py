"""How one engine is run: read once, never changed."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cloister.errors import WrongUse

__all__ = ["KV_TYPES", "VARIANTS", "LlamaConfig", "LoopSettings", "cores", "physical_cores"]

VARIANTS = ("native", "no-extra-buffers")
"""The ladder, best first: as built; then without llama.cpp's repacked weight layouts (AMX among them)."""

KV_TYPES = {"f16": (1, 2.0), "q8_0": (8, 34 / 32)}
"""How keys and values are kept: llama.cpp's number for the type, and bytes per value."""


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """What the decode loop needs to know. Counts are tokens unless said otherwise.

    `context`: per stream; 0 takes the model's own, at most 16,384. `kv_tokens`: cells of the key-value cache in
    all; each stream gets a part of its own if they suffice for that. 0 takes a quarter of the free memory, one gibibyte at
    least: four at most for parts, two at most for one cache that all share.
    `threads`: 0 takes the physical cores, and one for a model under 64 MiB. `chunk`: in one batch; at least the 64 that
    llama.cpp's attention reads at once, to which the loop fills a small one up.
    """

    slots: int = 16
    context: int = 0
    kv_tokens: int = 0
    threads: int = 0
    chunk: int = 512
    kv_type: str = "f16"
    variant: str = VARIANTS[0]

    def __post_init__(self) -> None:
        for name, low, high in (
            ("slots", 1, 64),
            ("context", 0, 1 << 20),
            ("kv_tokens", 0, 1 << 24),
            ("threads", 0, 256),
            ("chunk", 64, 4096),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise WrongUse(f"The engine's {name} must be between {low} and {high}.", got=str(value)[:40])
        if self.kv_type not in KV_TYPES:
            raise WrongUse("No such type of cache.", expected=" or ".join(KV_TYPES), got=str(self.kv_type)[:40])
        if self.variant not in VARIANTS:
            raise WrongUse("No such engine variant.", expected=" or ".join(VARIANTS), got=str(self.variant)[:40])

    def encode(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @staticmethod
    def decode(fields: Mapping[str, Any]) -> "LoopSettings":
        """Raises: WrongUse."""
        if set(fields) != set(LoopSettings.__dataclass_fields__):
            raise WrongUse("These are not the engine's settings.")
        return LoopSettings(**fields)


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """One engine: which model, how, and when it counts as dead.

    `name`: what the model is called; empty takes the file's own word. `sha256` (hex): refuse other bytes than these.
    `mode`: "process" (a child, restarted when it dies) or "thread" (for SGX, where a child would be another enclave;
    when the engine dies or hangs there, this whole process ends, with exit code 70 or 71, for its supervisor to
    restart). `measured_files`: the model is taken as it lies, because the system below opens nothing else than what it
    measured (Gramine); elsewhere it is copied into sealed memory first. `hang_timeout`, `load_timeout` (seconds): without a sign of life for so long, while there is work, it
    hangs.
    """

    model: Path
    name: str = ""
    sha256: str | None = None
    loop: LoopSettings = LoopSettings()
    mode: Literal["process", "thread"] = "process"
    measured_files: bool = False
    hang_timeout: float = 60.0
    load_timeout: float = 120.0


def cores() -> tuple[int, ...]:
    """One CPU number for every physical core that this process may use: the first of its hyper-threads."""
    first: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            first.setdefault(siblings.read_text(), cpu)
        except OSError:
            first.setdefault(str(cpu), cpu)
    return tuple(first.values())


def physical_cores() -> int:
    """How many threads pay: hyper-threads counted once, a container's CPU quota respected; 64 at most.

    More threads than that make llama.cpp slower (measured: -40 % with 4 threads on 2 cores).
    """
    count = len(cores())
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no such quota here
    return max(1, min(count, 64))
