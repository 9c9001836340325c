"""Models that give embeddings: which they are, and a direction of length 1 from what they compute."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from cloister.errors import MalformedModel

__all__ = ["MOST_EMBEDDED", "NoDirectionError", "is_pooled", "unit"]

MOST_EMBEDDED = 8192
"""Tokens of one text, where nobody says another number: all of them are computed at once, and take memory."""
_POOLED = ("1", "2", "3")  # mean, the first token's, the last token's
_NOT_POOLED = ("", "0")


class NoDirectionError(MalformedModel):
    """What was computed of one text has no direction; of the next it may have one."""


def is_pooled(meta: Callable[[str], str], architecture: str) -> bool:
    """Whether a model joins its tokens' states into one, and so is made for embeddings; else it continues texts.

    Raises: MalformedModel for what does neither.
    """
    pooling = meta(f"{architecture}.pooling_type")
    if pooling in _POOLED:
        return True
    if pooling not in _NOT_POOLED or meta(f"{architecture}.attention.causal") == "false":
        raise MalformedModel("This is not a model that continues text, nor one that gives embeddings.")
    return False


def unit(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Raises: NoDirectionError."""
    length = float(np.linalg.norm(values.astype(np.float64)))
    if not 0 < length < np.inf:
        raise NoDirectionError("The model computes no finite embedding.")
    return (values / np.float32(length)).astype(np.float32)
