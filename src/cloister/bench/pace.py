"""How fast one stream goes, in a process of its own: the engine's own loop, each token timed.

Run as `python -m cloister.bench.pace MODEL CONTEXT`. It tells what it holds in memory; then each line of standard input,
`PROMPT TOKENS`, is one run. Unlike `bench.raw` it takes any model: its prompts are of the model's own vocabulary, and the
end that a model may come to is passed over.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from cloister.bench.child import Child, module, run_child, start_child, tell
from cloister.bench.load import prompt
from cloister.bench.process import memory
from cloister.enclave.llm.engine import Sampling
from cloister.enclave.llm.llama.config import LoopSettings
from cloister.enclave.llm.llama.library import load_library
from cloister.enclave.llm.llama.loop import DecodeLoop, Job
from cloister.enclave.llm.llama.model import Model
from cloister.enclave.llm.llama.weights import seal_weights
from cloister.errors import CloisterError

__all__ = ["Pace", "Runner", "run", "runner"]


@dataclass(frozen=True, slots=True)
class Pace:
    """One run: seconds until the first token, the prompt read by then; and seconds of each token after it."""

    first_token: float
    tokens: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Runner:
    """A loaded model. `resident`: bytes that it takes in memory, weights, cache for `context` tokens and buffers."""

    child: Child
    resident: int
    context: int

    def run(self, prompt_tokens: int, tokens: int) -> Pace:
        """One stream, nothing reused. Counts are tokens. Raises: MalformedModel, EngineDied."""
        told = self.child.answer(f"{prompt_tokens} {tokens}")
        return Pace(told["first_token"], tuple(told["tokens"]))


@contextmanager
def runner(model: Path, context: int) -> Iterator[Runner]:
    """`model` loaded once, in a child. `context`: tokens of prompt and answer. Raises: MalformedModel, EngineDied."""
    with start_child(module("cloister.bench.pace", model, context), engine=True) as child:
        yield Runner(child, child.hear()["resident"], context)


def run(loop: DecodeLoop, vocabulary: int, prompt_tokens: int, tokens: int) -> Pace:
    """One stream of `prompt_tokens`, and `tokens` generated, on an idle loop."""
    words = tuple(word % vocabulary for word in prompt(0, prompt_tokens))
    began = time.perf_counter()
    sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    loop.submit(Job(1, words, sampling, scope=None, truncated=0))
    arrivals: list[float] = []
    seen = loop.stats.tokens_generated
    while loop.busy:
        for _, event in loop.step():
            if isinstance(event, CloisterError):
                raise event
        if loop.stats.tokens_generated > seen:
            seen = loop.stats.tokens_generated
            arrivals.append(time.perf_counter())
    return Pace(arrivals[0] - began, tuple(later - earlier for earlier, later in pairwise(arrivals)))


def main(arguments: Sequence[str]) -> None:
    path, context = Path(arguments[0]), int(arguments[1])
    library = load_library()
    before = memory(os.getpid(), "VmRSS")
    with seal_weights(path) as weights:
        model = Model(library, Path(f"/proc/self/fd/{weights.fd}"), LoopSettings(slots=1, context=context))
    loop = DecodeLoop(library, model, slots=1)
    run(loop, model.vocabulary, context // 2, 2)  # the loop learns how much of a prompt to read at once
    tell(resident=memory(os.getpid(), "VmRSS") - before)
    for line in sys.stdin:
        prompt_tokens, tokens = map(int, line.split())
        pace = run(loop, model.vocabulary, prompt_tokens, tokens)
        tell(first_token=pace.first_token, tokens=pace.tokens)


if __name__ == "__main__":
    run_child(main)
