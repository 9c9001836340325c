"""Whether an engine stays fair, quick to stop and of one size: long prompts, cancels, memory, thousands of requests.

Measured on the engine as it serves (a process of its own behind its socket), without HTTP and seal around it.
"""

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cloister.bench import process
from cloister.bench.load import BIAS, SHORT_PROMPT_TOKENS
from cloister.enclave.llm.engine import Delta, Done, GenerateRequest, Prompt, Sampling
from cloister.enclave.llm.llama import LlamaConfig, LlamaEngine, LoopSettings
from cloister.models.gguf import read_description
from cloister.models.memory import kv_bytes

__all__ = ["Fairness", "Growth", "Memory", "cancel_in_prompt", "fairness", "growth", "memory", "split"]

_TRIALS = 5
_LONG = 4000
_QUIET_TOKENS = 48
_SETTLING = 8  # tokens of each stream that came while others began
_SAMPLES = 40


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. `resident`: the engine's process after loading; `peak`: at most while loading, the sealed copy of the
    file counted in. `weights` is the file, `cache` what keys and values take."""

    weights: int
    cache: int
    resident: int
    peak: int

    def to_json(self) -> dict[str, Any]:
        whole = self.weights + self.cache
        return {**asdict(self), "resident_ratio": self.resident / whole, "peak_ratio": self.peak / whole}


@dataclass(frozen=True, slots=True)
class Fairness:
    """Seconds between two tokens of a stream, over all streams: before, and while a long prompt is read beside them."""

    streams: int
    prompt_tokens: int
    quiet: tuple[float, ...]
    beside: tuple[float, ...]
    first_token: float

    def to_json(self) -> dict[str, Any]:
        quiet, beside = statistics.fmean(self.quiet), statistics.fmean(self.beside)
        return {
            "streams": self.streams,
            "prompt_tokens": self.prompt_tokens,
            "quiet_ms": quiet * 1000,
            "beside_ms": beside * 1000,
            "ratio": beside / quiet,
            "longest_gap_ms": max(self.beside) * 1000,
            "long_prompt_first_token_s": self.first_token,
        }


@dataclass(frozen=True, slots=True)
class Growth:
    """Resident bytes of the engine's process after each so many requests; the slope is of the later half."""

    requests: tuple[int, ...]
    resident: tuple[int, ...]

    @property
    def slope(self) -> float:
        """Bytes per request."""
        half = len(self.requests) // 2
        return float(np.polyfit(self.requests[half:], self.resident[half:], 1)[0])

    def to_json(self) -> dict[str, Any]:
        return {
            "requests": self.requests[-1],
            "bytes_per_request": self.slope,
            "samples": [list(pair) for pair in zip(self.requests, self.resident, strict=True)],
        }


def _prompt(number: int, length: int) -> tuple[int, ...]:
    return tuple(300 + (number * 131 + at * 17) % 3500 for at in range(length))


def _request(number: int, prompt_tokens: int, tokens: int) -> GenerateRequest:
    prompt = Prompt(tokens=_prompt(number, prompt_tokens))
    return GenerateRequest(prompt, Sampling(max_tokens=tokens, temperature=0.0, logit_bias=BIAS))


async def _run(engine: LlamaEngine, request: GenerateRequest, on_text: Callable[[float], None]) -> None:
    """To the end; `on_text` gets the moment of each piece of text as it comes."""
    async with aclosing(engine.generate(request)) as events:  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, Delta):
                on_text(time.perf_counter())


async def _first(engine: LlamaEngine, number: int) -> float:
    """Seconds until a short prompt's only token."""
    began = time.perf_counter()
    moments: list[float] = []
    await _run(engine, _request(number, SHORT_PROMPT_TOKENS, 1), moments.append)
    return moments[0] - began


def memory(model: Path, *, tokens: int) -> Memory:
    """What an engine takes that has `tokens` cells of cache (f16)."""
    size, cache = model.stat().st_size, kv_bytes(read_description(model), tokens)

    async def measure() -> Memory:
        engine = LlamaEngine(LlamaConfig(model, loop=LoopSettings(slots=8, context=tokens // 8, kv_tokens=tokens)))
        await engine.start()
        try:
            await _first(engine, 1)
            resident, most = process.memory(engine.pid, "VmRSS"), process.memory(engine.pid, "VmHWM")
            return Memory(size, cache, resident, most + size)
        finally:
            await engine.close()

    return asyncio.run(measure())


def fairness(model: Path, *, streams: int = 8, prompt_tokens: int = _LONG) -> Fairness:
    """So many answers run; then a long prompt comes."""

    async def measure() -> Fairness:
        engine = LlamaEngine(LlamaConfig(model, loop=LoopSettings(slots=streams + 1, context=prompt_tokens + 4096)))
        await engine.start()
        moments: list[list[float]] = [[] for _ in range(streams)]
        settled = asyncio.Event()

        def note(number: int, at: float) -> None:
            moments[number].append(at)
            if min(map(len, moments)) >= _QUIET_TOKENS:
                settled.set()

        running = [
            asyncio.create_task(_run(engine, _request(number, SHORT_PROMPT_TOKENS, 4000), partial(note, number)))
            for number in range(streams)
        ]
        try:
            await settled.wait()
            began = time.perf_counter()
            first: list[float] = []
            await _run(engine, _request(streams, prompt_tokens, 1), first.append)
            ended = first[0]
        finally:
            for task in running:
                task.cancel()
            await asyncio.wait(running)
            await engine.close()
        return Fairness(streams, prompt_tokens, *split(moments, began, ended), ended - began)

    return asyncio.run(measure())


def split(
    moments: Sequence[Sequence[float]], began: float, ended: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds between the moments of each stream: those over when the long prompt began, and those that touch its time."""
    quiet, beside = [], []
    for stream in moments:
        for before, after in pairwise(stream[_SETTLING:]):
            if after <= began:
                quiet.append(after - before)
            elif before <= ended:
                beside.append(after - before)
    return tuple(quiet), tuple(beside)


def cancel_in_prompt(model: Path, *, prompt_tokens: int = _LONG) -> tuple[float, ...]:
    """Seconds for which a long prompt that is given up midway still keeps the engine from a short one (one slot): what
    the short one's first token took after the cancel, less what it takes on its own. One for each trial."""

    async def measure() -> tuple[float, ...]:
        engine = LlamaEngine(LlamaConfig(model, loop=LoopSettings(slots=1, context=prompt_tokens + 256)))
        await engine.start()
        held = []
        try:
            alone = statistics.median([await _first(engine, number) for number in range(_TRIALS)])
            for trial in range(_TRIALS):
                long = asyncio.create_task(_run(engine, _request(100 + trial, prompt_tokens, 1), lambda _at: None))
                await asyncio.sleep(0.3 + 0.2 * trial)
                if long.done():
                    continue
                began = time.perf_counter()
                long.cancel()
                short = asyncio.create_task(_first(engine, 200 + trial))
                await asyncio.wait([long])
                await short
                held.append(time.perf_counter() - began - alone)
        finally:
            await engine.close()
        return tuple(held)

    return asyncio.run(measure())


def growth(model: Path, *, requests: int = 2000, on_step: Callable[[], None] = lambda: None) -> Growth:
    """So many short requests of different lengths, eight at a time, a third of them with a scope of their own."""

    async def one(engine: LlamaEngine, number: int) -> None:
        request = _request(number, 8 + number % 97, 1 + number % 13)
        if number % 3 == 0:
            request = GenerateRequest(request.prompt, request.sampling, scope=(number % 50).to_bytes(32, "big"))
        async with aclosing(engine.generate(request)) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, Done):
                    return

    async def measure() -> Growth:
        engine = LlamaEngine(LlamaConfig(model, loop=LoopSettings(slots=8, context=512)))
        await engine.start()
        counts, resident = [], []
        try:
            for sample in range(_SAMPLES):
                start, end = requests * sample // _SAMPLES, requests * (sample + 1) // _SAMPLES
                for number in range(start, end, 8):
                    await asyncio.gather(*(one(engine, n) for n in range(number, min(number + 8, end))))
                counts.append(end)
                resident.append(process.memory(engine.pid, "VmRSS"))
                on_step()
        finally:
            await engine.close()
        return Growth(tuple(counts), tuple(resident))

    return asyncio.run(measure())
