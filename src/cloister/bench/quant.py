"""One model in several quantizations, held against each other on this machine: size, memory, speed, perplexity.

1. For each type: quantize with llama.cpp's own quantizer into a file that is removed afterwards.
2. With a text: its perplexity, on the same chunks for all types.
3. Load it in a child as the engine would; time a long prompt, and every token that follows a short one. Medians.
4. What decoding takes of the memory's bandwidth: short runs and readings in turn, the best token of each run against the
   best readings before and after it, for a machine that others share may give half as much a second later. The median.
5. Recommend one.
"""

import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from cloister.bench.pace import runner
from cloister.bench.perplexity import Perplexity
from cloister.bench.perplexity import measure as measure_perplexity
from cloister.bench.roofline import read_bandwidth, weight_bytes_per_token
from cloister.bench.shapes import check_room
from cloister.enclave.llm.llama.config import physical_cores
from cloister.enclave.llm.llama.library import library_dir
from cloister.errors import WrongUse
from cloister.models.gguf import Description, read_description
from cloister.models.memory import kv_bytes
from cloister.models.quantizer import quantize

__all__ = ["TYPES", "Comparison", "Row", "Text", "compare"]

TYPES = ("f16", "q8_0", "q6_K", "q5_K_M", "q5_1", "q5_0", "q4_K_M", "q4_0")
"""As llama.cpp writes them, the largest first."""

TOLERANCE = 0.005
"""By what share perplexity may rise in a type that is still recommended."""

_RUNS = 5
_TOKENS = 64
_ROUNDS, _FEW_TOKENS = 16, 10  # as many tokens as a reading has repeats: the best of either has the same luck
_SHORT_PROMPT, _LONG_PROMPT = 32, 512
_SAFE = "q8_0"  # where no text tells the types apart: this one's loss was never found to matter


@dataclass(frozen=True, slots=True)
class Text:
    """What perplexity is measured on. `chunks` of 512 tokens; None: all."""

    path: Path
    chunks: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One type. `resident`: bytes in memory, with a cache for the comparison's context. `read`: bytes that a token of the
    timed runs read. `token`: seconds for one, and `prompt`: tokens per second of a prompt; medians. `shares`: of what memory
    could give, how much decoding took, once for each round. `bandwidth`: bytes per second, the best reading of them."""

    type: str
    file_size: int
    resident: int
    read: float
    token: float
    prompt: float
    shares: tuple[float, ...]
    bandwidth: float
    perplexity: Perplexity | None

    @property
    def share(self) -> float:
        """Of what memory can give, how much decoding takes."""
        return statistics.median(self.shares)

    @property
    def tokens_per_second(self) -> float:
        return 1 / self.token


@dataclass(frozen=True, slots=True)
class Comparison:
    """All rows, the largest type first. `context` in tokens."""

    rows: tuple[Row, ...]
    context: int

    @property
    def bandwidth(self) -> float:
        """Bytes per second, the best reading of all."""
        return max(row.bandwidth for row in self.rows)

    def loss(self, row: Row) -> tuple[float, float]:
        """By what share the perplexity is above the largest type's, and that share's standard error.

        Only where perplexity was measured.
        """
        first = self.rows[0].perplexity
        if row.perplexity is None or first is None:
            raise WrongUse("Without a text there is no perplexity to compare.")
        return row.perplexity.against(first)

    def recommend(self) -> tuple[Row, str]:
        """The type to take on this machine, and why, in a sentence."""
        fastest = max(self.rows, key=lambda row: row.tokens_per_second)
        if self.rows[0].perplexity is None:
            safe = next((row for row in self.rows if row.type == _SAFE), self.rows[0])
            return safe, self._without_perplexity(safe, fastest)
        best = max((row for row in self.rows if self._as_good(row)), key=lambda row: row.tokens_per_second)
        return best, self._with_perplexity(best, fastest)

    def _as_good(self, row: Row) -> bool:
        """Within the tolerance, or not to be told apart on this text."""
        loss, error = self.loss(row)
        return loss <= TOLERANCE or (math.isfinite(error) and loss <= error)

    def _without_perplexity(self, safe: Row, fastest: Row) -> str:
        reason = f"{safe.type}: {safe.tokens_per_second:.1f} tokens/s; what quality costs was not measured"
        if safe.type == _SAFE:
            reason += ", and this type is known to lose next to nothing"
        if fastest is not safe:
            reason += f" ({fastest.type} would give {fastest.tokens_per_second:.1f} tokens/s)"
        return reason + "."

    def _with_perplexity(self, best: Row, fastest: Row) -> str:
        largest = self.rows[0].type
        if best is self.rows[0]:
            quality = "no smaller type is both as good and faster"
        else:
            quality = f"the fastest whose perplexity ({_percent(self.loss(best))}) is as good as {largest}'s"
        reason = f"{best.type}: {best.tokens_per_second:.1f} tokens/s, {quality}"
        if fastest is not best:
            reason += f"; {fastest.type} is faster ({fastest.tokens_per_second:.1f}), but worse ({_percent(self.loss(fastest))})"
        return reason + "."

    def to_json(self) -> dict[str, Any]:
        best, reason = self.recommend()
        return {
            "context": self.context,
            "bandwidth_bytes_per_second": self.bandwidth,
            "types": [self._row_json(row) for row in self.rows],
            "recommendation": {"type": best.type, "reason": reason},
        }

    def _row_json(self, row: Row) -> dict[str, Any]:
        figures: dict[str, Any] = {
            "type": row.type,
            "file_bytes": row.file_size,
            "resident_bytes": row.resident,
            "ms_per_token": row.token * 1000,
            "tokens_per_second": row.tokens_per_second,
            "prompt_tokens_per_second": row.prompt,
            "bytes_read_per_token": row.read,
            "bandwidth_bytes_per_second": row.bandwidth,
            "roofline_share": row.share,
            "roofline_shares": list(row.shares),
        }
        if row.perplexity is not None:
            loss, error = self.loss(row)
            figures |= row.perplexity.to_json()
            figures |= {"loss": loss, "loss_error": error if math.isfinite(error) else None}
        return figures


def _percent(loss: tuple[float, float]) -> str:
    share, error = loss
    return f"{100 * share:+.2f} %" + (f" ± {100 * error:.2f}" if math.isfinite(error) else "")


def compare(
    model: Path,
    folder: Path,
    *,
    types: Sequence[str],
    context: int,
    text: Text | None = None,
    progress: Callable[[str, float], None] = lambda _what, _done: None,
) -> Comparison:
    """Measure `model` (not quantized) in each of `types`. Files of its quantizations lie in `folder` for a while.

    `context`: tokens that memory is shown for, at most what the model was trained for. `progress` is told what is being
    done, and how many types are done already.

    Raises: WrongUse (a quantized model, no room, a text too short), MalformedModel, EngineDied.
    """
    description = read_description(model)
    if description.quantized:
        raise WrongUse(
            "This model is quantized already, and would only get worse.",
            hint="Take the same model as f16, bf16 or f32.",
            got=description.quantization,
        )
    context = min(context, description.context or context)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for done, kind in enumerate(sorted(types, key=TYPES.index)):
        stage = _Stage(kind, done, progress)
        with tempfile.TemporaryDirectory(prefix="quant-", dir=folder) as name:
            path = _provide(model, description, kind, Path(name), stage)
            rows.append(_measure(path, kind, context, text, stage))
    return Comparison(tuple(rows), context)


@dataclass(frozen=True, slots=True)
class _Stage:
    """Says what is being done for one type, and what share of that type is done."""

    type: str
    done: int
    progress: Callable[[str, float], None]

    def __call__(self, what: str, share: float) -> None:
        self.progress(f"{self.type}: {what}", self.done + share)


def _provide(model: Path, description: Description, kind: str, folder: Path, stage: _Stage) -> Path:
    """The model in that type: itself, when it is of that type, or a file in `folder`."""
    if description.quantization.lower() == kind.lower():
        return model
    path = folder / f"{kind}.gguf"
    check_room(path, description.file_size)

    def progress(done: int, total: int) -> None:
        stage("quantizing", 0.2 * done / total)

    quantize(model, path, kind, library=library_dir(), threads=physical_cores(), progress=progress)
    return path


def _measure(path: Path, kind: str, context: int, text: Text | None, stage: _Stage) -> Row:
    description = read_description(path)
    long_prompt, tokens = min(_LONG_PROMPT, context // 2), min(_TOKENS, context // 4)
    short_prompt = min(_SHORT_PROMPT, context // 4)
    found = None
    if text is not None:  # first: whether the text will do shows at once
        stage("perplexity", 0.25)

        def tell_chunks(done: int, total: int, value: float) -> None:
            stage(f"perplexity {value:.2f}", 0.25 + 0.35 * done / total)

        found = measure_perplexity(path, text.path, chunks=text.chunks, progress=tell_chunks)
    stage("loading", 0.6)
    with runner(path, context) as model:
        stage("speed", 0.7)
        firsts = [model.run(long_prompt, 1).first_token for _ in range(_RUNS)]
        stage("speed", 0.85)
        runs = [model.run(short_prompt, tokens).tokens for _ in range(_RUNS)]
        stage("roofline", 0.9)
        bandwidths, best = [read_bandwidth()], []
        for _ in range(_ROUNDS):
            best.append(min(model.run(short_prompt, 1 + min(_FEW_TOKENS, tokens)).tokens))
            bandwidths.append(read_bandwidth())
    cell = kv_bytes(description, 1)
    weights = weight_bytes_per_token(description)
    least = weights + cell * short_prompt
    return Row(
        type=kind,
        file_size=description.file_size,
        resident=model.resident,
        read=weights + cell * (short_prompt + tokens / 2),
        token=statistics.median(second for run in runs for second in run),
        prompt=long_prompt / statistics.median(firsts),
        shares=tuple(2 * least / token / sum(around) for token, around in zip(best, pairwise(bandwidths), strict=True)),
        bandwidth=max(bandwidths),
        perplexity=found,
    )
