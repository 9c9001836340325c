"""How well a model foretells a text: perplexity, computed exactly as llama.cpp's `llama-perplexity` computes it.

1. The file loses one newline at its end, and is tokenized once, as a whole, with the token that begins a text (BOS) in
   front where the model wants one.
2. It is cut into chunks of 512 tokens that do not overlap; what is left over at the end is not looked at.
3. The first token of each chunk is replaced by BOS where the model wants one.
4. The model foretells the tokens at positions 257 to 511 of each chunk from all that stand before them in it.
5. Perplexity = exp(mean over all scored tokens of -ln p). Its error is the standard error of that mean, times it.

Perplexities of models with different tokenizers cannot be compared; the bits per byte of the scored text can.
Source: llama.cpp, tools/perplexity/perplexity.cpp, with its defaults (`-c 512 -b 2048`). Unlike its command line, this
does not take backslashes in the text for escapes.

The engine runs in a child, `python -m cloister.bench.perplexity MODEL TEXT CHUNKS` (0: all).
"""

import ctypes
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister.bench.child import module, run_child, start_child, tell
from cloister.enclave.llm.llama.config import physical_cores
from cloister.enclave.llm.llama.library import load_library
from cloister.enclave.llm.llama.threads import attach_threads
from cloister.errors import MalformedModel, WrongUse

__all__ = ["SCORED", "WINDOW", "Perplexity", "measure", "negative_log_likelihoods"]

WINDOW = 512
"""Tokens of a chunk."""
SCORED = WINDOW - WINDOW // 2 - 1
"""Tokens of a chunk that are scored: its second half, but for the first one there."""
_AT_ONCE = 4
"""Chunks in one decode, at most."""
_LOGIT_BYTES = 1 << 29
"""What the logits of one decode may take."""
_BLOCK = 64
"""Rows of logits that are made double precision at a time."""
_MOST_TEXT = (1 << 31) - 1
_SMALL_MODEL = 1 << 26  # bytes; below it threads mostly wait for each other, as in the engine


@dataclass(frozen=True, slots=True)
class Perplexity:
    """What was measured. `nll`: for each chunk the sum of -ln p (nats) over its scored tokens; `squares`: the sum of the
    squares over all of them. `scored_bytes`: of the text that these tokens spell. `tokens`: of the whole text."""

    nll: tuple[float, ...]
    squares: float
    scored_bytes: int
    tokens: int
    adds_bos: bool
    seconds: float

    @property
    def chunks(self) -> int:
        return len(self.nll)

    @property
    def scored(self) -> int:
        """Tokens."""
        return SCORED * self.chunks

    @property
    def mean(self) -> float:
        """-ln p of a token, in nats."""
        return math.fsum(self.nll) / self.scored

    @property
    def value(self) -> float:
        return math.exp(self.mean)

    @property
    def course(self) -> tuple[tuple[int, float], ...]:
        """The value after 1, 2, 4 and so on chunks, and after all."""
        counts = sorted({*(1 << power for power in range(self.chunks.bit_length())), self.chunks})
        return tuple((count, math.exp(math.fsum(self.nll[:count]) / count / SCORED)) for count in counts)

    @property
    def error(self) -> float:
        """The standard error of `value`."""
        variance = max(self.squares / self.scored - self.mean**2, 0.0)
        return self.value * math.sqrt(variance / (self.scored - 1))

    @property
    def bits_per_byte(self) -> float:
        return math.fsum(self.nll) / math.log(2) / self.scored_bytes

    def against(self, other: "Perplexity") -> tuple[float, float]:
        """By how much it is larger than `other`'s, as a share, and that share's standard error.

        Both must be of the same chunks: taken chunk by chunk, what makes a text hard cancels out, and the error is much
        smaller than that of either. Infinite with one chunk.
        """
        differences = [(ours - theirs) / SCORED for ours, theirs in zip(self.nll, other.nll, strict=True)]
        count = len(differences)
        mean = math.fsum(differences) / count
        variance = math.fsum((d - mean) ** 2 for d in differences) / (count - 1) if count > 1 else math.inf
        return math.expm1(mean), math.exp(mean) * math.sqrt(variance / count)

    def to_json(self) -> dict[str, Any]:
        return {
            "perplexity": self.value,
            "error": self.error,
            "bits_per_byte": self.bits_per_byte,
            "chunks": self.chunks,
            "scored_tokens": self.scored,
            "scored_bytes": self.scored_bytes,
            "tokens": self.tokens,
            "adds_bos": self.adds_bos,
            "seconds": self.seconds,
        }


def measure(
    model: Path, text: Path, *, chunks: int | None = None, progress: Callable[[int, int, float], None] | None = None
) -> Perplexity:
    """The perplexity of `model` on the file `text`: on its first `chunks` chunks, or all of them.

    `progress` is told, every few chunks: how many are done, how many there are, and the perplexity so far.

    Raises: WrongUse (no such text, not UTF-8, or fewer than 1,024 tokens), MalformedModel, EngineDied.
    """
    with start_child(module("cloister.bench.perplexity", model, text, chunks or 0)) as child:
        head = child.hear()
        nll: list[float] = []
        squares, size = 0.0, 0
        while len(nll) < head["chunks"]:
            part = child.hear()
            nll += part["nll"]
            squares += part["squares"]
            size += part["bytes"]
            if progress:
                progress(len(nll), head["chunks"], math.exp(math.fsum(nll) / len(nll) / SCORED))
        return Perplexity(tuple(nll), squares, size, head["tokens"], head["adds_bos"], child.hear()["seconds"])


def negative_log_likelihoods(logits: NDArray[np.float32], targets: NDArray[np.int32]) -> NDArray[np.float64]:
    """-ln of the softmax of each row of `logits` (rows, vocabulary) at that row's target (rows), in nats."""
    found = np.empty(len(targets))
    for start in range(0, len(targets), _BLOCK):
        rows = logits[start : start + _BLOCK].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        wanted = rows[np.arange(len(rows)), targets[start : start + _BLOCK]]
        np.exp(rows, out=rows)
        found[start : start + _BLOCK] = np.log(rows.sum(axis=1)) - wanted
    return found


# The child.


def main(arguments: Sequence[str]) -> None:
    model_path, text_path, most = Path(arguments[0]), Path(arguments[1]), int(arguments[2])
    text = _read(text_path)
    library = load_library()
    with _loaded(library, model_path) as model:
        vocab = library.llama_model_get_vocab(model)
        tokens = _tokenize(library, vocab, text)
        if len(tokens) < 2 * WINDOW:
            raise WrongUse(
                f"The text is too short: it has {len(tokens)} tokens of this model, and at least {2 * WINDOW} are needed.",
                hint="Take a text of 5,000 letters or more.",
            )
        found = tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW)
        found = found[:most] if most else found
        adds_bos = bool(library.llama_vocab_get_add_bos(vocab))
        tell(chunks=len(found), tokens=len(tokens), adds_bos=adds_bos)
        sizes = _piece_sizes(library, vocab, found)
        began = time.perf_counter()
        for part, nll in _score(library, model, found, library.llama_vocab_bos(vocab) if adds_bos else None):
            if not np.isfinite(nll).all():
                raise MalformedModel("The model computes no finite numbers.", hint="The file may be damaged.")
            size = int(sizes[part[:, -SCORED:]].sum())
            tell(nll=nll.sum(axis=1).tolist(), squares=float((nll**2).sum()), bytes=size)
        tell(seconds=time.perf_counter() - began)


def _read(path: Path) -> bytes:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise WrongUse(f"The text cannot be read: {error.strerror or type(error).__name__}.") from error
    if len(text) > _MOST_TEXT:
        raise WrongUse("The text is too long: 2 GiB are the most.", hint="Take a part of it.")
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise WrongUse(f"The text is not UTF-8: byte {error.start} is out of place.") from error
    return text.removesuffix(b"\n")


@contextmanager
def _loaded(library: Any, path: Path) -> Iterator[Any]:
    """The model, loaded as the engine loads it. Raises: MalformedModel, WrongUse (perplexity is not defined for it)."""
    params = library.llama_model_default_params()
    params.load_mode = 0
    params.check_tensors = True
    model = library.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise MalformedModel("The engine cannot read this model file.", hint="Is it a whole GGUF file of a known kind?")
    try:
        _check(library, model)
        yield model
    finally:
        library.llama_model_free(model)


def _check(library: Any, model: Any) -> None:
    vocab = library.llama_model_get_vocab(model)
    if library.llama_vocab_type(vocab) == library.LLAMA_VOCAB_TYPE_NONE:
        raise WrongUse("This model has no tokenizer in its file, so it cannot read a text.")
    if library.llama_model_has_encoder(model) or library.llama_vocab_get_add_eos(vocab):
        raise WrongUse("Perplexity is measured of models that continue text, and this one does not.")
    trained = library.llama_model_n_ctx_train(model)
    if trained < WINDOW:
        raise WrongUse(f"This model was trained for {trained} tokens; the measurement takes {WINDOW} at a time.")


def _tokenize(library: Any, vocab: Any, text: bytes) -> NDArray[np.int32]:
    tokens = np.empty(len(text) + 16, dtype=np.int32)
    pointer = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
    count = library.llama_tokenize(vocab, text, len(text), pointer, len(tokens), True, False)  # noqa: FBT003
    if count < 0:
        raise MalformedModel("The model's tokenizer makes more tokens than the text has bytes.")
    return tokens[:count]


def _piece_sizes(library: Any, vocab: Any, chunks: NDArray[np.int32]) -> NDArray[np.int64]:
    """Bytes that each token of the vocabulary spells, where it occurs in `chunks`; 0 elsewhere."""
    sizes = np.zeros(library.llama_vocab_n_tokens(vocab), dtype=np.int64)
    for token in np.unique(chunks):
        sizes[token] = abs(library.llama_token_to_piece(vocab, int(token), None, 0, 0, True))  # noqa: FBT003
    return sizes


def _score(
    library: Any, model: Any, chunks: NDArray[np.int32], bos: int | None
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.float64]]]:
    """Some chunks at a time, with -ln p of their scored tokens (chunks, SCORED), in nats."""
    vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    at_once = min(_AT_ONCE, max(1, _LOGIT_BYTES // (4 * SCORED * vocabulary)), len(chunks))
    with _opened(library, model, at_once) as context, _batch(library, at_once) as batch:
        memory = library.llama_get_memory(context)
        token = np.ctypeslib.as_array(batch.token, shape=(at_once * WINDOW,))
        for start in range(0, len(chunks), at_once):
            part = chunks[start : start + at_once]
            inputs = part.copy()
            if bos is not None:
                inputs[:, 0] = bos
            batch.n_tokens = inputs.size
            token[: inputs.size] = inputs.ravel()
            library.llama_memory_clear(memory, True)  # noqa: FBT003
            code = library.llama_decode(context, batch)
            if code != 0:
                raise MalformedModel(f"The engine cannot evaluate this model (code {code}).")
            rows = len(part) * SCORED
            logits = np.ctypeslib.as_array(library.llama_get_logits(context), shape=(rows, vocabulary))
            yield part, negative_log_likelihoods(logits, part[:, -SCORED:].ravel()).reshape(-1, SCORED)


@contextmanager
def _opened(library: Any, model: Any, sequences: int) -> Iterator[Any]:
    """A context with a cache of one chunk for each sequence, and room for all their logits."""
    params = library.llama_context_default_params()
    params.n_ctx = params.n_batch = sequences * WINDOW
    params.n_ubatch = WINDOW
    params.n_seq_max = sequences
    params.n_outputs_max = sequences * SCORED
    small = library.llama_model_size(model) < _SMALL_MODEL
    params.n_threads = params.n_threads_batch = 1 if small else physical_cores()
    params.no_perf = True
    context = library.llama_init_from_model(model, params)
    if not context:
        raise MalformedModel("The engine cannot open a context for this model.", hint="Is there memory enough?")
    end_threads = attach_threads(context, params.n_threads)
    try:
        yield context
    finally:
        library.llama_free(context)
        end_threads()


@contextmanager
def _batch(library: Any, sequences: int) -> Iterator[Any]:
    """A batch in which each sequence has one chunk, and all but the tokens stands there already."""
    batch = library.llama_batch_init(sequences * WINDOW, 0, 1)
    for row in range(sequences * WINDOW):
        sequence, at = divmod(row, WINDOW)
        batch.pos[row] = at
        batch.n_seq_id[row] = 1
        batch.seq_id[row][0] = sequence
        batch.logits[row] = WINDOW - SCORED - 1 <= at < WINDOW - 1  # the logits at one position foretell the next
    try:
        yield batch
    finally:
        library.llama_batch_free(batch)


if __name__ == "__main__":
    run_child(main)
