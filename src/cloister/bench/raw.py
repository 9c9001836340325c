"""The decode loop bare, in a process of its own: no socket, no HTTP, no seal. The yardstick for everything around it.

Run as `python -m cloister.bench.raw MODEL SLOTS`; each line of standard input, `STREAMS TOKENS PROMPT`, is one run.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cloister.bench.child import run_child, tell
from cloister.bench.load import BIAS, Run, prompt
from cloister.enclave.llm.engine import Delta, Done, Sampling, Started
from cloister.enclave.llm.llama.config import LoopSettings
from cloister.enclave.llm.llama.library import load_library
from cloister.enclave.llm.llama.loop import DecodeLoop, Job
from cloister.enclave.llm.llama.model import Model
from cloister.enclave.llm.llama.weights import seal_weights
from cloister.errors import CloisterError

__all__ = ["main", "run"]


def run(loop: DecodeLoop, streams: int, tokens: int, prompt_tokens: int) -> Run:
    """`streams` prompts of `prompt_tokens` at once, `tokens` generated for each."""
    sampling = Sampling(max_tokens=tokens, temperature=0.0, logit_bias=BIAS)
    began = time.perf_counter()
    first: dict[int, float] = {}
    generated = 0
    for number in range(1, streams + 1):
        words = tuple(prompt(number, prompt_tokens))
        loop.submit(Job(number, words, sampling, scope=None, truncated=0))
    while loop.busy:
        for number, event in loop.step():
            match event:
                case CloisterError():
                    raise event
                case Delta():
                    first.setdefault(number, time.perf_counter() - began)
                case Done():
                    generated += event.completion_tokens
                case Started():
                    pass
    return Run(streams, generated, time.perf_counter() - began, tuple(first.values()))


def main(arguments: Sequence[str]) -> None:
    path, slots = Path(arguments[0]), int(arguments[1])
    library = load_library()
    with seal_weights(path) as weights:
        settings = LoopSettings(slots=slots, context=1024)
        model = Model(library, Path(f"/proc/self/fd/{weights.fd}"), settings)
    loop = DecodeLoop(library, model, slots=slots)
    tell(ready=True)
    for line in sys.stdin:
        streams, tokens, prompt_tokens = map(int, line.split())
        tell(**run(loop, streams, tokens, prompt_tokens).encode())


if __name__ == "__main__":
    run_child(main)
