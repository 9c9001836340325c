"""ctransformers, the original's stack, under the same load: one stream, as that is all it knows.

Run by path, in the peer's own environment (`tools/build_peers.py`), where cloister is not: nothing of it is imported.
`python original.py MODEL THREADS BATCH`; each line of standard input, `1 TOKENS PROMPT`, is one run, and it tells what
`cloister.bench.raw` tells.
"""

import importlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

__all__ = ["main"]


def _generate(model: Any, prompt: list[int]) -> Iterator[int]:
    """As its own `generate`, greedily and to no end of its own: no stream may end early."""
    model.reset()
    model.eval(prompt)
    while True:
        token = model.sample(top_k=1, repetition_penalty=1.0)
        yield token
        model.eval([token])


def run(model: Any, tokens: int, prompt_tokens: int) -> dict[str, Any]:
    prompt = [300 + (131 + at * 17) % 5000 for at in range(prompt_tokens)]
    began = time.perf_counter()
    first = 0.0
    for number, _ in enumerate(_generate(model, prompt), 1):
        first = first or time.perf_counter() - began
        if number == tokens:
            break
    return {"streams": 1, "tokens": tokens, "seconds": time.perf_counter() - began, "first_token": [first]}


def main() -> None:
    ctransformers: Any = importlib.import_module("ctransformers")  # in the peer's environment only
    threads, batch = int(sys.argv[2]), int(sys.argv[3])
    config = ctransformers.Config(threads=threads, batch_size=batch, context_length=1024)
    model = ctransformers.LLM(sys.argv[1], "gpt-neox", config=config)
    _tell({"ready": True})
    for line in sys.stdin:
        _, tokens, prompt_tokens = map(int, line.split())
        _tell(run(model, tokens, prompt_tokens))


def _tell(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
