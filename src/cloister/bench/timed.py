"""The decode loop bare, in a process of its own, with the time of every token: what `bench speed` asks.

Run as `python -m cloister.bench.timed MODEL SLOTS CONTEXT`, context in tokens for each stream; a line of standard input,
`STREAMS TOKENS PROMPT`, is one run. The file is read without the sealed copy that an enclave makes of it first, so a
model may be twice as large here; what is in memory afterwards is the same.
"""

import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

from cloister.bench.child import run_child, tell
from cloister.bench.load import BIAS, prompt
from cloister.bench.process import memory
from cloister.enclave.llm.engine import Delta, Done, Sampling
from cloister.enclave.llm.llama.config import LoopSettings
from cloister.enclave.llm.llama.library import load_library
from cloister.enclave.llm.llama.loop import DecodeLoop, Job
from cloister.enclave.llm.llama.model import Model
from cloister.errors import CloisterError, MalformedModel

__all__ = ["SLACK", "Arrivals", "Timing", "run", "summarize"]

SLACK = 2
"""Times the number of streams: tokens that the first stream may get before the last one's prompt is read."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One run of `streams` at once. Times in seconds.

    `first_token`: the median over streams, all prompts having come at once. `between` and `between_p95`: mean and 95th
    percentile of the times from token to token of all streams, those while another's prompt was read among them.
    `tokens_per_second`: of all streams together once all of them ran, `measured` tokens; `with_prompts`: from the
    beginning, reading the prompts included.
    """

    streams: int
    first_token: float
    between: float
    between_p95: float
    tokens_per_second: float
    with_prompts: float
    measured: int


@dataclass(slots=True)
class Arrivals:
    """When tokens came: for each stream, pairs of (seconds since the beginning, tokens).

    `all_began`: when the last stream had its first token; None: not yet. `steady`: tokens of each stream since then.
    """

    streams: int
    came: dict[int, list[tuple[float, int]]] = field(default_factory=dict)
    all_began: float | None = None
    steady: Counter[int] = field(default_factory=Counter)

    def add(self, stream: int, at: float, tokens: int) -> None:
        if not tokens:
            return
        self.came.setdefault(stream, []).append((at, tokens))
        if self.all_began is not None:
            self.steady[stream] += tokens
        elif len(self.came) == self.streams:
            self.all_began = at

    def enough(self, tokens: int) -> bool:
        """Whether each stream had so many while all of them ran."""
        return self.all_began is not None and all(self.steady[stream] >= tokens for stream in self.came)


def summarize(arrivals: Arrivals, end: float) -> Timing:
    """`end`: when the first stream ended, in seconds. Raises: MalformedModel when not all of them ran by then."""
    measured = arrivals.steady.total()
    if arrivals.all_began is None or not measured:
        raise MalformedModel("The first stream ended before all of them ran.", hint="Ask for more tokens.")
    tokens = sum(count for came in arrivals.came.values() for _, count in came)
    gaps = sorted(gap for came in arrivals.came.values() for gap in _gaps(came))
    return Timing(
        streams=arrivals.streams,
        first_token=statistics.median(came[0][0] for came in arrivals.came.values()),
        between=statistics.fmean(gaps),
        between_p95=gaps[len(gaps) * 95 // 100],
        tokens_per_second=measured / (end - arrivals.all_began),
        with_prompts=tokens / end,
        measured=measured,
    )


def _gaps(came: Sequence[tuple[float, int]]) -> list[float]:
    """Seconds before each token but the first; tokens that came together (one character of several) share theirs."""
    found: list[float] = []
    for (before, _), (at, tokens) in pairwise(came):
        found += [(at - before) / tokens] * tokens
    return found


def run(loop: DecodeLoop, vocabulary: int, streams: int, tokens: int, prompt_tokens: int) -> Timing:
    """Prompts of `prompt_tokens` at once; ends when each stream had `tokens` while all of them ran, or the first ends."""
    most = tokens + SLACK * streams
    sampling = Sampling(max_tokens=most, temperature=0.0, logit_bias=BIAS, ignore_eos=True)
    arrivals, ended = Arrivals(streams), False
    began = time.perf_counter()
    for number in range(1, streams + 1):
        words = tuple(word % vocabulary for word in prompt(number, prompt_tokens))
        loop.submit(Job(number, words, sampling, scope=None, truncated=0))
    while not ended and not arrivals.enough(tokens):
        for number, event in loop.step():
            match event:
                case CloisterError():
                    raise event
                case Delta():
                    arrivals.add(number, time.perf_counter() - began, event.tokens)
                case Done():
                    ended = True
    end = time.perf_counter() - began
    for number in range(1, streams + 1):
        loop.cancel(number)
    while loop.busy:
        loop.step()
    return summarize(arrivals, end)


def main(arguments: Sequence[str]) -> None:
    path, slots, context = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    library = load_library()
    settings = LoopSettings(slots=slots, context=context, kv_tokens=slots * context)
    model = Model(library, path, settings, progress=lambda share: tell(loaded=share))
    loop = DecodeLoop(library, model, slots=slots)
    found = model.describe()
    tell(ready={"architecture": found.architecture, "parameters": found.parameters})
    for line in sys.stdin:
        streams, tokens, prompt_tokens = map(int, line.split())
        timing = run(loop, model.vocabulary, streams, tokens, prompt_tokens)
        tell(timing=asdict(timing), resident=memory(os.getpid(), "VmRSS"))


if __name__ == "__main__":
    run_child(main)
