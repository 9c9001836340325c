"""What the layers around the model cost: the same load on the bare decode loop and sealed through gateway and client.

Both run in turn, several times, on the same machine, and are compared pair by pair: single figures drift with the
machine, ratios hold.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from cloister.bench.load import BIAS, PROMPT_TOKENS, SHORT_PROMPT_TOKENS, Run
from cloister.client import async_http_client
from cloister.errors import ConnectionFailed
from cloister.verify import Policy

__all__ = ["Comparison", "FirstToken", "FreedSlot", "compare", "raw_loop", "sealed_run"]

RawLoop = Callable[[int, int, int], Run]
"""Of streams, tokens for each, tokens of each prompt."""

FIRST_TOKEN_PAIRS = 21
FREED_SLOT_PAIRS = 7
_QUEUED = 0.2  # seconds in which a request has surely reached the queue
_ENDLESS = 400  # tokens: longer than a trial lasts, and sixteen times that still fit a gibibyte of cache


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs in pairs, in the order they were made. Ratios are sealed / raw, so 1 is free and 0.95 costs 5 %."""

    streams: int
    raw: tuple[Run, ...]
    sealed: tuple[Run, ...]

    @property
    def ratios(self) -> list[float]:
        pairs = zip(self.sealed, self.raw, strict=True)
        return sorted(sealed.tokens_per_second / raw.tokens_per_second for sealed, raw in pairs)

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    def to_json(self) -> dict[str, Any]:
        return {
            "streams": self.streams,
            "ratio": self.ratio,
            "ratios": self.ratios,
            "raw_tokens_per_second": statistics.median(run.tokens_per_second for run in self.raw),
            "sealed_tokens_per_second": statistics.median(run.tokens_per_second for run in self.sealed),
        }


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Seconds until the first token of a short prompt, in pairs, one stream at a time."""

    raw: tuple[float, ...]
    sealed: tuple[float, ...]

    @property
    def added(self) -> float:
        """The median over pairs of the difference."""
        return statistics.median(sealed - raw for sealed, raw in zip(self.sealed, self.raw, strict=True))

    def to_json(self) -> dict[str, Any]:
        return {
            "added_ms": self.added * 1000,
            "raw_ms": statistics.median(self.raw) * 1000,
            "sealed_ms": statistics.median(self.sealed) * 1000,
            "pairs": len(self.raw),
        }


@dataclass(frozen=True, slots=True)
class FreedSlot:
    """How long a cancelled stream still holds its slot.

    Pairs of seconds until a short prompt's first token, beside as many other streams: `at_once` into a free slot,
    `after_cancel` into the one that another stream is made to give up, counted from the cancel.
    """

    at_once: tuple[float, ...]
    after_cancel: tuple[float, ...]

    @property
    def held(self) -> float:
        """The median over pairs of the difference."""
        return statistics.median(after - free for after, free in zip(self.after_cancel, self.at_once, strict=True))

    def to_json(self) -> dict[str, Any]:
        return {
            "held_ms": self.held * 1000,
            "at_once_ms": statistics.median(self.at_once) * 1000,
            "after_cancel_ms": statistics.median(self.after_cancel) * 1000,
            "pairs": len(self.at_once),
        }


@contextmanager
def raw_loop(model: Path, slots: int) -> Iterator[RawLoop]:
    """The bare loop in a child process, loaded once."""
    argv = [sys.executable, "-m", "cloister.bench.raw", str(model), str(slots)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        if child.stdin is None or child.stdout is None or child.stdout.readline() != "ready\n":
            raise ConnectionFailed("The bare decode loop did not start.", hint="Is the engine built? Run `make setup`.")
        ask, answers = child.stdin, child.stdout

        def run(streams: int, tokens: int, prompt_tokens: int) -> Run:
            ask.write(f"{streams} {tokens} {prompt_tokens}\n")
            ask.flush()
            return Run.decode(json.loads(answers.readline()))

        yield run


async def sealed_run(client: httpx2.AsyncClient, streams: int, tokens: int, prompt_tokens: int = PROMPT_TOKENS) -> Run:
    """The same load over `/v1/completions`, streamed and sealed."""
    began = time.perf_counter()
    numbers = range(1, streams + 1)
    ended = await asyncio.gather(*(_stream(client, number, tokens, prompt_tokens, began) for number in numbers))
    seconds = time.perf_counter() - began
    return Run(streams, sum(count for count, _ in ended), seconds, tuple(first for _, first in ended))


async def _stream(
    client: httpx2.AsyncClient, number: int, tokens: int, prompt_tokens: int, began: float
) -> tuple[int, float]:
    first, tail = 0.0, b""
    async with client.stream("POST", "/v1/completions", json=_body(number, tokens, prompt_tokens)) as answer:
        async for piece in _pieces(answer):
            first = first or time.perf_counter() - began
            tail = (tail + piece)[-8192:]
    return _completion_tokens(tail), first


def _body(number: int, tokens: int, prompt_tokens: int) -> dict[str, Any]:
    return {
        "model": "default",
        "prompt": [300 + (number * 131 + at * 17) % 5000 for at in range(prompt_tokens)],
        "max_tokens": tokens,
        "temperature": 0,
        "logit_bias": {str(token): bias for token, bias in BIAS.items()},
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _pieces(answer: httpx2.Response) -> AsyncGenerator[bytes]:
    if answer.status_code != 200:
        raise ConnectionFailed(f"The enclave answered {answer.status_code} to the benchmark's load.")
    return answer.aiter_raw()


def _completion_tokens(tail: bytes) -> int:
    """From the usage that stands in the last event before `[DONE]`."""
    events = [line[6:] for line in tail.split(b"\n") if line.startswith(b"data: {")]
    usage = json.loads(events[-1]).get("usage") if events else None
    if not usage:
        raise ConnectionFailed("The benchmark's answer had no usage.")
    return int(usage["completion_tokens"])


def compare(
    raw: RawLoop,
    url: str,
    policy: Policy,
    *,
    streams: Sequence[int],
    tokens: int,
    repeats: int,
    on_run: Callable[[], None] = lambda: None,
) -> tuple[list[Comparison], FirstToken, FreedSlot]:
    """One comparison per number of streams, a warm-up of each first, not counted; what the first token waits; and how
    soon a cancelled stream's slot is free, the most streams running that the enclave at `url` must have slots for."""

    async def measure() -> tuple[list[Comparison], FirstToken, FreedSlot]:
        async with async_http_client(url, policy=policy, reuse_cache=False) as client:
            first = await _first_tokens(raw, client)
            pairs = [await _pairs(raw, client, count, tokens, repeats, on_run) for count in streams]
            return pairs, first, await _freed_slots(client, max(streams))

    def client() -> tuple[list[Comparison], FirstToken, FreedSlot]:
        """At lower priority, in a thread of its own: a real client's cores are not the engine's."""
        if sys.platform == "linux":
            os.nice(10)
        return asyncio.run(measure())

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(client).result()


async def _pairs(
    raw: RawLoop, client: httpx2.AsyncClient, streams: int, tokens: int, repeats: int, on_run: Callable[[], None]
) -> Comparison:
    bare, sealed = [], []
    for repeat in range(repeats + 1):
        count = tokens if repeat else 8
        one = await asyncio.to_thread(raw, streams, count, PROMPT_TOKENS)
        other = await sealed_run(client, streams, count)
        if repeat:
            bare.append(one)
            sealed.append(other)
        on_run()
    return Comparison(streams, tuple(bare), tuple(sealed))


async def _first_tokens(raw: RawLoop, client: httpx2.AsyncClient) -> FirstToken:
    bare, sealed = [], []
    for pair in range(FIRST_TOKEN_PAIRS + 1):
        one = await asyncio.to_thread(raw, 1, 2, SHORT_PROMPT_TOKENS)
        other = await sealed_run(client, 1, 2, SHORT_PROMPT_TOKENS)
        if pair:  # the first warms up
            bare.append(one.first_token[0])
            sealed.append(other.first_token[0])
    return FirstToken(tuple(bare), tuple(sealed))


async def _freed_slots(client: httpx2.AsyncClient, slots: int) -> FreedSlot:
    at_once, after_cancel = [], []
    for _ in range(FREED_SLOT_PAIRS):
        async with AsyncExitStack() as others, AsyncExitStack() as last:
            for number in range(1, slots):
                await _open(client, number, others)
            began = time.perf_counter()
            await _open(client, slots, last)
            at_once.append(time.perf_counter() - began)
            began = time.perf_counter()
            waiting = asyncio.create_task(_stream(client, slots + 1, 1, SHORT_PROMPT_TOKENS, began))
            await asyncio.sleep(_QUEUED)
            cancelled = time.perf_counter()
            await last.aclose()
            _, first = await waiting
            after_cancel.append(began + first - cancelled)
    if min(after_cancel) < 0:
        raise ConnectionFailed("A slot was free before any stream was cancelled.")
    return FreedSlot(tuple(at_once), tuple(after_cancel))


async def _open(client: httpx2.AsyncClient, number: int, stack: AsyncExitStack) -> None:
    """A stream that has begun and goes on until `stack` is closed."""
    body = _body(number, _ENDLESS, SHORT_PROMPT_TOKENS)
    pieces = _pieces(await stack.enter_async_context(client.stream("POST", "/v1/completions", json=body)))
    await anext(pieces)
    stack.push_async_callback(pieces.aclose)
