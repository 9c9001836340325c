"""One real model that fits the machine at hand. Sizes are of the files; a context of 4,096 tokens is counted in."""

import os
from dataclasses import dataclass

__all__ = ["Suggestion", "suggest"]

_GIB = 1 << 30

# Smallest memory (GiB, free for the model), fewest cores, reference. Strongest first.
_TABLE = (
    (40.0, 16, "hf.co/Qwen/Qwen3-32B-GGUF:Q8_0"),
    (18.0, 8, "hf.co/Qwen/Qwen3-14B-GGUF:Q8_0"),
    (11.0, 4, "hf.co/Qwen/Qwen3-8B-GGUF:Q8_0"),
    (6.0, 4, "hf.co/Qwen/Qwen3-4B-GGUF:Q8_0"),
    (3.0, 2, "hf.co/Qwen/Qwen3-1.7B-GGUF:Q8_0"),
    (0.0, 1, "hf.co/Qwen/Qwen3-0.6B-GGUF:Q8_0"),
)


@dataclass(frozen=True, slots=True)
class Suggestion:
    reference: str
    why: str


def suggest(memory: int | None = None, cores: int | None = None) -> Suggestion:
    """`memory` in bytes and `cores`; None: this machine's. Half of the memory is left to everything else."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if memory is None else memory
    cores = os.cpu_count() or 1 if cores is None else cores
    free = memory / 2 / _GIB
    reference = next(name for least, fewest, name in _TABLE if (free >= least and cores >= fewest) or not least)
    return Suggestion(reference, f"{memory / _GIB:.0f} GiB, {cores} cores")
