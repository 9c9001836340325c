"""Choosing the next token: llama.cpp's own samplers, one chain per stream; log-probabilities with numpy."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister.enclave.llm.engine import Sampling, TokenLogprob
from cloister.enclave.llm.llama.model import Model
from cloister.errors import WrongUse

__all__ = ["Sampler", "logprob_of"]

_REPEAT_WINDOW = 64
"""Tokens that `repeat_penalty` looks back on, the prompt's end among them; the other penalties see the answer alone."""
_COLDEST = 1e-5
"""Below this temperature the best token is taken: logits divided by less run over in 32 bits, and any token could come."""
_RANDOM_SEED = 0xFFFFFFFF  # llama.cpp takes this value for "draw one yourself"


class Sampler:
    """One stream's chain: bias, penalties, top_k, top_p, min_p, temperature, then a draw (or the best at 0).

    `prompt` primes the repeat penalty. `length`: how many tokens the answer may have. Raises: WrongUse.
    """

    def __init__(self, library: Any, model: Model, sampling: Sampling, *, prompt: Sequence[int], length: int) -> None:
        self._lib = library
        self._model = model
        self._chain = library.llama_sampler_chain_init(library.llama_sampler_chain_default_params())
        try:
            for link in _links(library, model, sampling, prompt, length):
                library.llama_sampler_chain_add(self._chain, link)
        except WrongUse:
            self.close()
            raise

    def choose(self, row: int) -> int:
        """The next token from the logits of the last batch's `row`-th item; the chain remembers it."""
        return int(self._lib.llama_sampler_sample(self._chain, self._model.context, row))

    def close(self) -> None:
        if self._chain:
            self._lib.llama_sampler_free(self._chain)
            self._chain = None


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
