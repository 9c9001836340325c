"""Choosing the next token: llama.cpp's own samplers, one chain per stream; log-probabilities with numpy."""

import ctypes
import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cloister.enclave.llm.engine import Sampling, TokenLogprob
from cloister.enclave.llm.grammar import Grammar, State
from cloister.enclave.llm.llama.model import Model
from cloister.errors import WrongUse

__all__ = ["Sampler", "logprob_of"]

_REPEAT_WINDOW = 64
"""Tokens that `repeat_penalty` looks back on, the prompt's end among them; the other penalties see the answer alone."""
_COLDEST = 1e-5
"""Below this temperature the best token is taken: logits divided by less run over in 32 bits, and any token could come."""
_RANDOM_SEED = 0xFFFFFFFF  # llama.cpp takes this value for "draw one yourself"


_Tokens: TypeAlias = NDArray[np.int32]
_Logits: TypeAlias = NDArray[np.float32]
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data
_DRAWS = 4
"""How often a token is drawn, each time without those that did not fit the grammar, before they are told apart further."""
_MOST_FITTING = 64
"""How many of those are enough, the likeliest first."""
_LIKELIEST = 4096
_SEARCH_STEPS = 30_000
"""Steps of the grammar for either: a tenth of a second or so, in which nobody else gets a token."""
_STEPS_PER_TOKEN = 5_000
_STEPS_AT_ONCE = 500_000
"""Steps that an answer may take in all: so many for each of its tokens, and these."""


class Sampler:
    """One stream's chain: bias, penalties, top_k, top_p, min_p, temperature, then a draw (or the best at 0).

    `prompt` primes the repeat penalty. `length`: how many tokens the answer may have. With a `grammar`, only tokens that
    fit it are chosen. Raises: WrongUse.
    """

    def __init__(
        self,
        library: Any,
        model: Model,
        sampling: Sampling,
        *,
        prompt: Sequence[int],
        length: int,
        grammar: Grammar | None = None,
    ) -> None:
        self._lib = library
        self._model = model
        self._grammar = grammar
        self._state = State(()) if grammar is None else grammar.start
        self._chosen = 0
        self.finished = False
        """The grammar lets nothing follow what was chosen."""
        self._chain = library.llama_sampler_chain_init(library.llama_sampler_chain_default_params())
        try:
            for link in _links(library, model, sampling, prompt, length):
                library.llama_sampler_chain_add(self._chain, link)
        except WrongUse:
            self.close()
            raise

    def choose(self, row: int) -> int:
        """The next token from the logits of the last batch's `row`-th item; the chain remembers it.

        Raises: WrongUse when no token fits the grammar.
        """
        if self._grammar is None:
            return int(self._lib.llama_sampler_sample(self._chain, self._model.context, row))
        if self._grammar.steps > _STEPS_AT_ONCE + _STEPS_PER_TOKEN * self._chosen:
            raise WrongUse("The grammar takes too long to follow.", hint="Write it with fewer ways to say the same.")
        token, state = self._fitting_token(self._grammar, self._model.logits(row))
        self._lib.llama_sampler_accept(self._chain, token)
        self._chosen += 1
        self._state, self.finished = state, state.must_end
        return token

    def _fitting_token(self, grammar: Grammar, logits: NDArray[np.float32]) -> tuple[int, State]:
        """Drawn from all tokens; if that does not fit, from those that may; and in the end from those that do."""
        tokens = np.arange(self._model.vocabulary, dtype=np.int32)
        narrower = (self._possible, self._likely, self._fitting)
        for draws, narrow in zip((1, _DRAWS, _DRAWS, 1), (None, *narrower), strict=True):
            tokens = tokens if narrow is None else narrow(grammar, tokens, logits)
            for _ in range(draws):
                if not len(tokens):
                    raise _stuck()
                token = self._draw(logits, tokens)
                if (state := self._after(grammar, token)) is not None:
                    return token, state
                tokens = tokens[tokens != token]
        raise _stuck()

    def _draw(self, logits: _Logits, tokens: _Tokens) -> int:
        candidates = np.zeros(len(tokens), dtype=_CANDIDATE)
        candidates["id"], candidates["logit"] = tokens, logits[tokens]
        pointer = candidates.ctypes.data_as(ctypes.POINTER(self._lib.llama_token_data))
        array = self._lib.llama_token_data_array(data=pointer, size=len(tokens), selected=-1, sorted=False)
        self._lib.llama_sampler_apply(self._chain, ctypes.byref(array))
        if not 0 <= array.selected < array.size:
            raise _stuck()
        return int(array.data[array.selected].id)

    def _after(self, grammar: Grammar, token: int) -> State | None:
        """The grammar's state after the token; None where it does not fit."""
        if token in self._model.end_tokens:
            return self._state if self._state.may_end else None
        piece = self._model.piece(token)
        return grammar.after(self._state, piece) if piece else None

    def _possible(self, _grammar: Grammar, tokens: _Tokens, _logits: _Logits) -> _Tokens:
        """Those whose first byte fits, and the ends where the text may end."""
        first = np.zeros(257, dtype=np.bool_)
        first[list(self._state.first_bytes())] = True
        fits = first[self._model.beginnings()[tokens] // 257]
        return tokens[np.where(np.isin(tokens, list(self._model.end_tokens)), self._state.may_end, fits)]

    def _likely(self, grammar: Grammar, tokens: _Tokens, _logits: _Logits) -> _Tokens:
        """Those whose first two bytes fit, and the ends that are left."""
        beginnings, places = np.unique(self._model.beginnings()[tokens], return_inverse=True)
        limit = grammar.steps + _SEARCH_STEPS
        fits = [
            grammar.steps > limit or grammar.after(self._state, _bytes_of(int(beginning))) is not None
            for beginning in beginnings
        ]
        return tokens[np.array(fits, dtype=np.bool_)[places] | np.isin(tokens, list(self._model.end_tokens))]

    def _fitting(self, grammar: Grammar, tokens: _Tokens, logits: _Logits) -> _Tokens:
        """The likeliest of those that fit; not all, where they are many or hard to tell."""
        limit, found = grammar.steps + _SEARCH_STEPS, list[int]()
        known: dict[bytes, State | None] = {b"": self._state}
        for token in _likeliest_first(logits, tokens):
            if token in self._model.end_tokens or _fits(grammar, self._model.piece(token), known):
                found.append(token)
            if len(found) == _MOST_FITTING or grammar.steps > limit:
                break
        return np.array(found, dtype=np.int32)

    def close(self) -> None:
        if self._chain:
            self._lib.llama_sampler_free(self._chain)
            self._chain = None


def _fits(grammar: Grammar, piece: bytes, known: dict[bytes, State | None]) -> bool:
    """`known`: where beginnings of other pieces have led."""
    for end in range(1, len(piece) + 1):
        if piece[:end] not in known:
            before = known[piece[: end - 1]]
            known[piece[:end]] = None if before is None else grammar.after(before, piece[end - 1 : end])
        if known[piece[:end]] is None:
            return False
    return bool(piece)


def _bytes_of(beginning: int) -> bytes:
    """The bytes that `Model.beginnings` tells of."""
    first, second = divmod(beginning, 257)
    return bytes([first, second - 1] if second else [first]) if first < 256 else b""


def _stuck() -> WrongUse:
    return WrongUse("No token of this model can go on as the grammar demands.")


def _likeliest_first(logits: _Logits, tokens: _Tokens) -> Iterator[int]:
    """The `_LIKELIEST` of them are sorted first, as more are seldom looked at."""
    while len(tokens):
        top = min(_LIKELIEST, len(tokens))
        order = np.argpartition(-logits[tokens], top - 1)
        best, tokens = tokens[order[:top]], tokens[order[top:]]
        yield from best[np.argsort(-logits[best], kind="stable")].tolist()


def _links(library: Any, model: Model, sampling: Sampling, prompt: Sequence[int], length: int) -> list[Any]:
    size, links = model.vocabulary, []
    bias = dict(sampling.logit_bias)
    model.check_tokens(tuple(bias))
    if sampling.ignore_eos:
        bias |= dict.fromkeys(model.end_tokens, float("-inf"))
    if bias:
        entries = (library.llama_logit_bias * len(bias))(*(library.llama_logit_bias(t, b) for t, b in bias.items()))
        links.append(library.llama_sampler_init_logit_bias(size, len(bias), entries))
    if sampling.repeat_penalty != 1.0:
        if not 0.0 < sampling.repeat_penalty <= 10.0:
            raise WrongUse("repeat_penalty must be above 0 and at most 10.")
        repeat = library.llama_sampler_init_penalties(size, _REPEAT_WINDOW, sampling.repeat_penalty, 0.0, 0.0)
        for token in prompt[-_REPEAT_WINDOW:]:
            library.llama_sampler_accept(repeat, token)
        links.append(repeat)
    if sampling.frequency_penalty or sampling.presence_penalty:
        frequency, presence = sampling.frequency_penalty, sampling.presence_penalty
        links.append(library.llama_sampler_init_penalties(size, max(length, 1), 1.0, frequency, presence))
    if sampling.temperature < _COLDEST:
        return [*links, library.llama_sampler_init_greedy()]
    if sampling.top_k > 0:
        links.append(library.llama_sampler_init_top_k(min(sampling.top_k, size)))
    if sampling.top_p < 1.0:
        links.append(library.llama_sampler_init_top_p(max(sampling.top_p, 0.0), 1))
    if sampling.min_p > 0.0:
        links.append(library.llama_sampler_init_min_p(min(sampling.min_p, 1.0), 1))
    if sampling.temperature != 1.0:
        links.append(library.llama_sampler_init_temp(sampling.temperature))
    return [*links, library.llama_sampler_init_dist(_seed(sampling.seed))]


def _seed(seed: int | None) -> int:
    """32 bits: those given (larger ones folded), or fresh ones."""
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    folded = (seed ^ seed >> 32) & 0xFFFFFFFF
    return folded if folded != _RANDOM_SEED else 0


def logprob_of(model: Model, logits: NDArray[np.float32], token: int, top: int) -> TokenLogprob:
    """The token's natural log-probability, and the `top` likeliest, in the model's own distribution.

    That is before bias, penalties, temperature and truncation, as OpenAI-compatible servers report it.
    """
    wide = logits.astype(np.float64)
    wide -= wide.max()
    wide -= np.log(np.exp(wide).sum())
    best: list[int] = []
    if top:
        some = np.argpartition(wide, -min(top, len(wide)))[-top:]
        best = [int(t) for t in some[np.argsort(-wide[some], kind="stable")]]
    others = tuple(TokenLogprob(t, model.piece(t, special=True), _finite(wide[t])) for t in best)
    return TokenLogprob(token, model.piece(token, special=True), _finite(wide[token]), others)


def _finite(value: Any) -> float:
    """JSON has no infinity."""
    return max(float(value), -9999.0)
