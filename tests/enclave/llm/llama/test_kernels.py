"""The processor's own kernels (`tools/engine.patch` changes AMX's, and has one for attention) against llama.cpp's plain ones."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.enclave.llm.llama.random_model import write_model

from cloister.enclave.llm.llama import LoopSettings
from cloister.enclave.llm.llama.config import VARIANTS
from cloister.enclave.llm.llama.library import library_dir
from cloister.enclave.llm.llama.model import Model
from cloister.models.quantizer import quantize

ROWS = (1, 2, 15, 16, 17, 31, 32, 33, 40, 64)
TOLERANCE = 0.02
"""Of the largest logit. The same products are added in another order, and inputs are rounded to 8 bits in between."""

ATTENTION_TOLERANCE = 0.005
"""Of the largest logit. Without flash attention queries and weights are rounded to 16 bits, with it they are not."""


def answers(library: Any, path: Path, variant: str) -> list[NDArray[np.float32]]:
    """The last row's logits of prompts of so many `ROWS`, and of a token after each. All rows stand in their attention."""
    places = os.sched_getaffinity(0)
    model = Model(library, path, LoopSettings(slots=2, threads=2, variant=variant))
    found = []
    for rows in ROWS:
        model.decode([((7 * at) % 250, at, 0, at == rows - 1) for at in range(rows)])
        found.append(model.logits(rows - 1).copy())
        model.decode([(5, rows, 0, True)])
        found.append(model.logits(0).copy())
        model.forget(0)
    model.close()
    os.sched_setaffinity(0, places)  # a decode keeps its thread on one core, and the next model wants them all
    return found


def apart(one: list[NDArray[np.float32]], other: list[NDArray[np.float32]]) -> float:
    """The largest difference, as a share of the largest logit."""
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("kind", "width"),
    [("Q8_0", 32), ("Q8_0", 256), ("Q4_0", 32), ("Q4_0", 256), ("Q6_K", 256), ("Q5_K_M", 256), ("Q4_K_M", 256)],
)
def test_they_compute_the_same(library: Any, tmp_path: Path, kind: str, width: int) -> None:
    full = write_model(tmp_path / "full.gguf", width=width)
    path = tmp_path / "small.gguf"
    quantize(full, path, kind, library=library_dir(), threads=1)
    own, plain = (answers(library, path, variant) for variant in VARIANTS)
    assert apart(own, plain) < TOLERANCE
    assert apart(answers(library, full, VARIANTS[1]), plain) > 0  # it was quantized at all


def conversations(library: Any, path: Path) -> list[NDArray[np.float32]]:
    """Logits of two that go on by turns, each with chunks of few rows and of many, some of a block of cells and some of three;
    and of one of them after the other's cells were taken away."""
    places = os.sched_getaffinity(0)
    model = Model(library, path, LoopSettings(slots=2, threads=2, context=512))
    assert model.parted
    found, past = [], [0, 0]
    for sequence, rows in ((0, 100), (1, 3), (0, 1), (1, 70), (0, 5), (1, 1), (0, 63), (1, 20), (0, 1), (1, 1)):
        start = past[sequence]
        model.decode([((11 * at) % 250, at, sequence, at == start + rows - 1) for at in range(start, start + rows)])
        found.append(model.logits(rows - 1).copy())
        past[sequence] += rows
    model.decode([(7, past[0], 0, True), (9, past[1], 1, True)])
    found += [model.logits(0).copy(), model.logits(1).copy()]
    model.forget(0)
    model.decode([(3, past[1] + 1, 1, True)])
    found.append(model.logits(0).copy())
    model.close()
    os.sched_setaffinity(0, places)
    return found


@pytest.mark.parametrize("width", [64, 96, 256], ids=["heads of 16", "of 24", "of 64"])
def test_attention_of_few_rows_is_that_of_the_whole_matrix(
    library: Any, tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(tmp_path / "model.gguf", width=width)
    own = conversations(library, path)
    monkeypatch.setattr(Model, "_few_rows_are_fast", False)
    plain = conversations(library, path)
    assert apart(own, plain) < ATTENTION_TOLERANCE
    assert (apart(own, plain) > 0) == (width != 96)  # no other way was taken where it does not fit
