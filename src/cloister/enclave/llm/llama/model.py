"""A loaded model: its words, its facts, and one context to decode in. Runs where the engine runs."""

import contextlib
import ctypes
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister.enclave.llm.engine import ModelInfo
from cloister.enclave.llm.llama.config import KV_TYPES, VARIANTS, LoopSettings, physical_cores
from cloister.enclave.llm.llama.embedding import MOST_EMBEDDED, is_pooled, unit
from cloister.enclave.llm.llama.memory import overwrite, overwritten_by, watched_buffers
from cloister.enclave.llm.llama.threads import attach_threads, fill_every_core
from cloister.enclave.llm.reasoning import thinking_of
from cloister.enclave.llm.toolcalls import MARKERS, call_form_of
from cloister.errors import MalformedModel, WrongUse

__all__ = ["PART", "AbortedError", "Model", "SelfTestError"]

_CONTROL_ATTRIBUTES = 1 << 0 | 1 << 3  # LLAMA_TOKEN_ATTR_UNKNOWN, LLAMA_TOKEN_ATTR_CONTROL
_LEAST_CACHE, _MOST_CACHE, _MOST_PARTED = 1 << 30, 1 << 31, 1 << 32  # bytes
_MOST_SCORES = 1 << 28  # bytes
_VECTOR = 16
"""Values that are added up side by side."""
PART = 256
"""Cells: llama.cpp fills every part of a cache up to a multiple of it."""
_MOST_CONTEXT = 16384
_SMALL_MODEL = 1 << 26
"""Bytes. Below this, threads spend more time waiting for each other than computing, most of all on a busy machine."""


class SelfTestError(MalformedModel):
    """The file was read, and what was computed from it is wrong: another variant of the engine may do better."""


class AbortedError(Exception):
    """`decode` ended early because `abort` was set."""


class Model:
    """One model in one context, driven by one thread; the words (`tokenize`, `piece`) may be used from any.

    Raises: MalformedModel when llama.cpp refuses the file, SelfTestError when its first logits are not finite.
    """

    def __init__(
        self, library: Any, path: Path, settings: LoopSettings, *, progress: Callable[[float], None] | None = None
    ) -> None:
        self._lib = library
        self._model: Any = None
        self._context: Any = None
        self._memory: Any = None
        params = library.llama_model_default_params()
        params.load_mode = 0  # into anonymous memory: no mapping whose pages the host could be asked for again
        params.check_tensors = True
        params.use_extra_bufts = settings.variant == VARIANTS[0]
        report = library.llama_progress_callback(lambda share, _data: not progress or progress(share) is None)
        params.progress_callback = report
        self._model = library.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise MalformedModel(
                "The engine cannot read this model file.", hint="Is it a whole GGUF file of a known kind?"
            )
        self._vocab = library.llama_model_get_vocab(self._model)
        self.vocabulary: int = library.llama_vocab_n_tokens(self._vocab)
        if library.llama_model_has_encoder(self._model) or self.vocabulary < 1:
            raise MalformedModel("This is not a model that continues text.")
        self._pieces: dict[int, bytes] = {}
        self._beginnings: NDArray[np.int32] | None = None
        self.pooled = is_pooled(self._meta, self._meta("general.architecture"))
        self._open_context(settings)
        self._batch = _Batch(library, self.chunk)
        self.end_tokens = frozenset(t for t in range(self.vocabulary) if library.llama_vocab_is_eog(self._vocab, t))
        self.bos: int = library.llama_vocab_bos(self._vocab)
        self.eos: int = library.llama_vocab_eos(self._vocab)
        self.adds_bos: bool = library.llama_vocab_get_add_bos(self._vocab) and self.bos >= 0
        self.control_texts = self._find_control_texts()
        template = library.llama_model_chat_template(self._model, None)
        self.chat_template: str | None = template.decode(errors="replace") if template else None
        self._self_test()

    def close(self) -> None:
        """Free everything. Nothing else may be called afterwards."""
        if self._context:
            self._lib.llama_free(self._context)
            self._context = None
            self._end_threads()
        if self._model:
            self._lib.llama_model_free(self._model)
            self._model = None

    # Facts.

    def describe(self) -> ModelInfo:
        """What the file says of itself; digest and size are the front's business."""
        lib = self._lib
        quantization = lib.llama_ftype_name(lib.llama_model_ftype(self._model)) or b""
        return ModelInfo(
            name=self._meta("general.name"),
            sha256="",
            quantization=quantization.decode(errors="replace"),
            architecture=self._meta("general.architecture"),
            parameters=lib.llama_model_n_params(self._model),
            size=lib.llama_model_size(self._model),
            context_length=self.context_length,
            has_chat_template=self.chat_template is not None and not self.pooled,
            calls=call_form_of(self.chat_template),
            thinking=thinking_of(self.chat_template),
            embedding=int(lib.llama_model_n_embd_out(self._model)) if self.pooled else 0,
            generates=not self.pooled,
        )

    def _meta(self, key: str) -> str:
        buffer = ctypes.create_string_buffer(256)
        length = self._lib.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.value.decode(errors="replace") if length >= 0 else ""

    def _find_control_texts(self) -> tuple[str, ...]:
        lib, texts = self._lib, set()
        for token in range(self.vocabulary):
            if lib.llama_vocab_get_attr(self._vocab, token) & _CONTROL_ATTRIBUTES:
                text = (lib.llama_vocab_get_text(self._vocab, token) or b"").decode(errors="replace")
                texts.add(text)
                if text in MARKERS:
                    self._pieces[token] = text.encode()
        return tuple(sorted(texts - {""}, key=len, reverse=True))

    # Words.

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        data = text.encode(errors="replace")
        room = len(data) + 16
        while True:
            tokens = np.empty(room, dtype=np.int32)
            pointer = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
            count = self._lib.llama_tokenize(self._vocab, data, len(data), pointer, room, add_special, parse_special)
            if count >= 0:
                return [int(t) for t in tokens[:count]]
            if count == -(1 << 31):
                raise WrongUse("The text is too long.")
            room = -count

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The token's bytes; unless `special`, empty for control tokens but those that mark calls and thoughts."""
        if not special and (known := self._pieces.get(token)) is not None:
            return known
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = self._lib.llama_token_to_piece(self._vocab, token, buffer, room, 0, special)
            if count >= 0:
                break
            room = -count
        piece = buffer.raw[:count]
        if not special:
            self._pieces[token] = piece
        return piece

    def beginnings(self) -> NDArray[np.int32]:
        """How every token's piece begins: 257 times its first byte, and 1 more than its second if there is one.

        256 * 257 for an empty piece. The first call takes a while.
        """
        if self._beginnings is None:
            pieces = (self.piece(token) for token in range(self.vocabulary))
            found = [257 * (piece[0] if piece else 256) + (piece[1] + 1 if len(piece) > 1 else 0) for piece in pieces]
            self._beginnings = np.array(found, dtype=np.int32)
        return self._beginnings

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Raises: WrongUse when one is not in the vocabulary."""
        for token in tokens:
            if type(token) is not int or not 0 <= token < self.vocabulary:
                raise WrongUse("A token is not in the vocabulary.", expected=f"0 to {self.vocabulary - 1}")

    # Decoding: one thread only.

    def _open_context(self, settings: LoopSettings) -> None:
        lib = self._lib
        trained = lib.llama_model_n_ctx_train(self._model)
        self.context_length: int = settings.context or min(trained, _MOST_CONTEXT)
        if self.context_length < 1:
            raise MalformedModel("The model file names no context length.")
        number, width = KV_TYPES[settings.kv_type]
        cell = self._cell_bytes(width)
        self.cell_size, self.weights_size = int(cell), int(lib.llama_model_size(self._model))  # bytes
        self.reuses_prefixes = not (lib.llama_model_is_recurrent(self._model) or lib.llama_model_is_hybrid(self._model))
        parts = min(settings.slots, lib.llama_max_parallel_sequences())
        within = settings.kv_tokens or int(_cache_budget(_MOST_PARTED) / cell)
        self.parted = parts * -(-self.context_length // PART) * PART <= within and self._may_be_parted(settings)
        if self.parted:
            self.sequences: int = parts
            self.kv_tokens: int = parts * self.context_length
            most = settings.chunk if self._few_rows_are_fast else self._rows_within(_MOST_SCORES)
            self.chunk: int = max(min(settings.chunk, most), self.sequences)
        else:
            within = max(self.context_length, int(_cache_budget(_MOST_CACHE) / cell))
            self.sequences = min(2 * settings.slots, lib.llama_max_parallel_sequences())
            self.kv_tokens = max(
                self.context_length, settings.kv_tokens or min(settings.slots * self.context_length, within)
            )
            self.chunk = max(settings.chunk, self.sequences)
        if self.pooled:  # a text at a time, and all of it at once
            self.context_length = settings.context or min(trained, MOST_EMBEDDED)
            self.kv_tokens = self.chunk = self.context_length
            self.sequences = 1
        params = lib.llama_context_default_params()
        params.n_ctx = self.kv_tokens
        params.n_batch = params.n_ubatch = self.chunk
        params.n_seq_max = self.sequences
        params.n_outputs_max = self.chunk if self.pooled else self.sequences
        params.embeddings = self.pooled
        threads = 1 if lib.llama_model_size(self._model) < _SMALL_MODEL else physical_cores()
        params.n_threads = params.n_threads_batch = settings.threads or threads
        params.type_k = params.type_v = number
        params.kv_unified = not self.parted
        apart = self.parted and not self._few_rows_are_fast
        params.flash_attn_type = 0 if apart else -1  # LLAMA_FLASH_ATTN_TYPE_DISABLED, _AUTO
        params.swa_full = True  # a sliding window could not give up part of a sequence
        params.no_perf = True
        self._flag = ctypes.create_string_buffer(2)
        params.abort_callback = _abort_callback(lib)
        params.abort_callback_data = ctypes.addressof(self._flag)
        with watched_buffers() as buffers:
            self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            hint = "Is there memory enough?" if settings.kv_type == "f16" else "Try it with kv_type f16."
            raise MalformedModel("The engine cannot open a context for this model.", hint=hint)
        self.fills_every_core = fill_every_core(params.n_threads)
        self._end_threads = attach_threads(self._context, params.n_threads)
        self._memory = lib.llama_get_memory(self._context)
        self._cache = overwritten_by(lambda: lib.llama_memory_clear(self._memory, True), buffers)  # noqa: FBT003

    def _may_be_parted(self, settings: LoopSettings) -> bool:
        """Values of less than 16 bit need flash attention; states that are not cells cannot be cut back."""
        return self.reuses_prefixes and not self.pooled and settings.kv_type == "f16"

    @property
    def _few_rows_are_fast(self) -> bool:
        """Whether flash attention has a way of its own for fewer than 64 rows (`tools/engine.patch`)."""
        return platform.machine() == "x86_64" and not any(length % _VECTOR for length in self._head_lengths)

    @property
    def _head_lengths(self) -> list[int]:
        """Of a head's keys, and of its values."""
        architecture = self._meta("general.architecture")
        plain = int(self._lib.llama_model_n_embd(self._model)) // max(int(self._lib.llama_model_n_head(self._model)), 1)
        lengths = [self._meta(f"{architecture}.attention.{name}") for name in ("key_length", "value_length")]
        return [int(length) if length.isdecimal() else plain for length in lengths]

    def _rows_within(self, size: int) -> int:
        """How many rows' scores, against a whole conversation, take `size` bytes in one layer: a multiple of 64."""
        row = 4 * int(self._lib.llama_model_n_head(self._model)) * self.context_length
        return max(1, size // max(row, 1) // 64) * 64

    def _cell_bytes(self, width: float) -> float:
        """Roughly what one token takes in the cache, at `width` bytes a value."""
        heads = int(self._lib.llama_model_n_layer(self._model)) * int(self._lib.llama_model_n_head_kv(self._model))
        return float(width * max(heads * sum(self._head_lengths), 1))

    @property
    def context(self) -> Any:
        return self._context

    def abort(self, now: bool) -> None:
        """From any thread: end the running `decode`, and any until this is called with False."""
        self._flag[0] = b"\1" if now else b"\0"

    def decode(self, items: Sequence[tuple[int, int, int, bool]]) -> None:
        """Evaluate (token, position, sequence, wants logits) rows. Raises: AbortedError, MalformedModel."""
        code = self._lib.llama_decode(self._context, self._batch.fill(items))
        if code == 2:
            raise AbortedError
        if code != 0:
            raise MalformedModel(f"The engine cannot evaluate this model (code {code}).")

    def logits(self, row: int) -> NDArray[np.float32]:
        """The logits of the `row`-th item of the last batch: a view, valid until the next `decode`."""
        pointer = self._lib.llama_get_logits_ith(self._context, row)
        if not pointer:
            raise MalformedModel("The engine gave no logits.")
        return np.ctypeslib.as_array(pointer, shape=(self.vocabulary,))

    def embed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """What a `pooled` model makes of a text of at most `context_length` tokens, as a direction of length 1.

        Raises: AbortedError, MalformedModel.
        """
        try:
            self.decode([(token, at, 0, True) for at, token in enumerate(tokens)])
            pointer = self._lib.llama_get_embeddings_seq(self._context, 0)
            if not pointer:
                raise MalformedModel("The engine gave no embedding.")
            width = int(self._lib.llama_model_n_embd_out(self._model))
            return unit(np.ctypeslib.as_array(pointer, shape=(width,)))
        finally:  # of one that was aborted, too: the next would look at its cells
            self.forget(0)

    def forget(self, sequence: int, start: int = 0) -> bool:
        """Drop a sequence's cells from position `start` on. False: only whole sequences can be dropped here."""
        return bool(self._lib.llama_memory_seq_rm(self._memory, sequence, start, -1))

    def share(self, source: int, target: int, end: int) -> None:
        """Let `target` use `source`'s cells before position `end` too; in a parted cache it gets a copy of them."""
        if self.parted:  # whole parts only; llama.cpp copies them before it next evaluates anything
            self._lib.llama_memory_seq_cp(self._memory, source, target, 0, -1)
            self.forget(target, end)
        else:
            self._lib.llama_memory_seq_cp(self._memory, source, target, 0, end)

    def erase(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Forget every sequence, and overwrite the cache with zeros: False if `stop` said to leave the rest for later."""
        self._lib.llama_memory_clear(self._memory, not self._cache)
        return overwrite(self._cache, stop)

    def _self_test(self) -> None:
        """Both kinds of batch, a prompt's and a single token's, must give finite logits before anybody is served."""
        words = [(1 + at * 7) % self.vocabulary for at in range(8)]
        if self.pooled:
            try:
                self.embed(words)
            except MalformedModel as error:
                raise SelfTestError(error.message, hint="The file may be damaged.") from error
            self.erase()
            return
        self.decode([(token, at, 0, at == 7) for at, token in enumerate(words)])
        finite = bool(np.isfinite(self.logits(7)).all())
        self.decode([(words[0], 8, 0, True)])
        if not (finite and bool(np.isfinite(self.logits(0)).all())):
            raise SelfTestError("The model computes no finite numbers.", hint="The file may be damaged.")
        self.erase()


def _cache_budget(most: int, root: Path = Path("/")) -> int:
    """Bytes that the cache may take where nobody said how many: a quarter of what is free. `root` for tests."""
    return min(max(_free_memory(root) // 4, _LEAST_CACHE), most)


def _free_memory(root: Path) -> int:
    """Bytes: the kernel's word, and what a control group leaves. 0 where neither says anything."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    group = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError, ValueError):
        limit = int((group / "memory.max").read_text())  # "max" is no number: there is no limit
        found.append(max(0, limit - int((group / "memory.current").read_text())))
    return min(found, default=0)


def _abort_callback(library: Any) -> Any:
    """A function of C that llama.cpp asks before every node whether to stop: `strlen`, over a buffer of ours.

    It answers 0 while the buffer begins with a zero byte and 1 after `abort(True)`. A callback in Python would take
    the interpreter's lock hundreds of times per token.
    """
    strlen = ctypes.CDLL(None).strlen
    return ctypes.cast(strlen, library.ggml_abort_callback)


class _Batch:
    """llama.cpp's batch over arrays that are allocated once."""

    def __init__(self, library: Any, size: int) -> None:
        self._token = np.zeros(size, dtype=np.int32)
        self._position = np.zeros(size, dtype=np.int32)
        self._ones = np.ones(size, dtype=np.int32)
        self._sequence = np.zeros(size, dtype=np.int32)
        self._wanted = np.zeros(size, dtype=np.int8)
        base = self._sequence.ctypes.data
        self._pointers = (ctypes.POINTER(ctypes.c_int32) * size)(
            *(ctypes.cast(base + 4 * at, ctypes.POINTER(ctypes.c_int32)) for at in range(size))
        )
        numbers = ctypes.POINTER(ctypes.c_int32)
        self._batch = library.llama_batch()
        self._batch.token = self._token.ctypes.data_as(numbers)
        self._batch.embd = None
        self._batch.pos = self._position.ctypes.data_as(numbers)
        self._batch.n_seq_id = self._ones.ctypes.data_as(numbers)
        self._batch.seq_id = ctypes.cast(self._pointers, ctypes.POINTER(numbers))
        self._batch.logits = self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))

    def fill(self, items: Sequence[tuple[int, int, int, bool]]) -> Any:
        count = len(items)
        self._batch.n_tokens = count
        rows = np.array(items, dtype=np.int32)
        self._token[:count] = rows[:, 0]
        self._position[:count] = rows[:, 1]
        self._sequence[:count] = rows[:, 2]
        self._wanted[:count] = rows[:, 3]
        return self._batch
