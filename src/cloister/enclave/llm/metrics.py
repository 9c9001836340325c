"""Counters without content: how much, never what."""

from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Metrics"]


@dataclass(slots=True)
class Metrics:
    """Since the start. `responses` counts by status; `cancelled` the clients that left, `broken` the streams that
    failed after their first byte. A prompt's tokens count once it is taken on, however its answer ends. Who runs and waits
    now is the queue's to tell."""

    requests: int = 0
    responses: Counter[int] = field(default_factory=Counter)
    cancelled: int = 0
    broken: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
