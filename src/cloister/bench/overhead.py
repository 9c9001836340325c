"""What the layers around the model cost: the same load on the bare decode loop and on each way around it.

The ways, each with all of the one before: plain HTTP (API and queue, no seal), sealed (gateway and client), proxied (the
local verifying proxy). All run in turn, several times, on the same machine, and are compared round by round with the
bare loop: single figures drift with the machine, ratios hold.
"""

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from cloister.bench.child import module, start_child
from cloister.bench.load import (
    PROMPT_TOKENS,
    SHORT_PROMPT_TOKENS,
    Run,
    as_client,
    completion_body,
    over_http,
    pieces,
    plain_client,
    prompt,
    stream,
)
from cloister.bench.process import cpu_seconds
from cloister.bench.proxied import Counter
from cloister.client import async_http_client
from cloister.errors import ConnectionFailed
from cloister.verify import Policy

__all__ = [
    "CONTEXT",
    "PLAIN",
    "PROXIED",
    "SEALED",
    "Comparison",
    "Cost",
    "Endpoint",
    "Evidence",
    "FirstToken",
    "FreedSlot",
    "Overhead",
    "Spent",
    "compare",
    "loop_of",
    "plain_http",
    "proxied",
    "raw_loop",
    "sealed",
]

RawLoop = Callable[[int, int, int], Run]
"""Of streams, tokens for each, tokens of each prompt."""

PLAIN, SEALED, PROXIED = "plain", "sealed", "proxied"
FIRST_TOKEN_PAIRS = 41
FREED_SLOT_PAIRS = 7
CONTEXT = 1024
"""Tokens of each stream's context, here and in the bare loop."""
_HINT = "See its words above. Is the engine built? Run `make setup`."
_SHORT = 2  # tokens of the shortest answers, whose cost is that of a request
_AWAKE = 16  # tokens after which whoever rested has found its memory again: the first dozen took a tenth longer
_QUEUED = 0.2  # seconds in which a request has surely reached the queue
_ENDLESS = 400  # tokens: longer than a trial lasts, and sixteen times that still fit a gibibyte of cache


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One way to the app: its address, and the processes of ours on it by name. `policy`: its client seals.

    `verifications`: how often evidence was verified for it so far, where somebody counts.
    """

    way: str
    url: str
    processes: Mapping[str, int]
    policy: Policy | None = None
    verifications: Callable[[], int] | None = None


@dataclass(frozen=True, slots=True)
class Spent:
    """A run, and the CPU seconds that each process spent on it."""

    run: Run
    cpu: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs in rounds, in the order they were made. Ratios are way / raw, so 1 is free and 0.95 costs 5 %."""

    streams: int
    raw: tuple[Run, ...]
    ways: Mapping[str, tuple[Run, ...]]

    def ratios(self, way: str) -> list[float]:
        rounds = zip(self.ways[way], self.raw, strict=True)
        return sorted(one.tokens_per_second / raw.tokens_per_second for one, raw in rounds)

    def ratio(self, way: str) -> float:
        return statistics.median(self.ratios(way))

    def to_json(self) -> dict[str, Any]:
        ways = {
            way: {"ratio": self.ratio(way), "ratios": self.ratios(way), "tokens_per_second": _rate(runs)}
            for way, runs in self.ways.items()
        }
        return {
            "streams": self.streams,
            "ratio": self.ratio(SEALED),
            "ratios": self.ratios(SEALED),
            "raw_tokens_per_second": _rate(self.raw),
            "sealed_tokens_per_second": _rate(self.ways[SEALED]),
            "ways": ways,
        }


def _rate(runs: Sequence[Run]) -> float:
    return statistics.median(run.tokens_per_second for run in runs)


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Seconds until the first token of a short prompt, in rounds, one stream at a time."""

    raw: tuple[float, ...]
    ways: Mapping[str, tuple[float, ...]]

    def added(self, way: str) -> float:
        """The median over rounds of the difference."""
        return statistics.median(one - raw for one, raw in zip(self.ways[way], self.raw, strict=True))

    def to_json(self) -> dict[str, Any]:
        ways = {
            way: {"added_ms": self.added(way) * 1000, "ms": statistics.median(seconds) * 1000}
            for way, seconds in self.ways.items()
        }
        return {
            "added_ms": self.added(SEALED) * 1000,
            "raw_ms": statistics.median(self.raw) * 1000,
            "sealed_ms": statistics.median(self.ways[SEALED]) * 1000,
            "pairs": len(self.raw),
            "ways": ways,
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


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU seconds of one process on one way: for each further token, and for a request without its tokens."""

    way: str
    process: str
    streams: int
    per_token: float
    per_request: float

    @staticmethod
    def of(way: str, process: str, long: Sequence[Spent], short: Sequence[Spent]) -> "Cost":
        """From runs with many tokens and runs with few, of as many streams: a line through the two medians."""
        streams = long[0].run.streams
        spent, least = (statistics.median(one.cpu[process] for one in runs) for runs in (long, short))
        tokens, few = (statistics.median(one.run.tokens for one in runs) for runs in (long, short))
        per_token = max(0.0, (spent - least) / (tokens - few))
        return Cost(way, process, streams, per_token, max(0.0, (least - few * per_token) / streams))

    def to_json(self) -> dict[str, Any]:
        return {
            "way": self.way,
            "process": self.process,
            "streams": self.streams,
            "ms_per_token": self.per_token * 1000,
            "ms_per_request": self.per_request * 1000,
        }


@dataclass(frozen=True, slots=True)
class Evidence:
    """How often evidence was verified for how many requests."""

    way: str
    verifications: int
    requests: int

    def to_json(self) -> dict[str, Any]:
        return {"way": self.way, "verifications": self.verifications, "requests": self.requests}


@dataclass(frozen=True, slots=True)
class Overhead:
    """All of one measurement."""

    runs: tuple[Comparison, ...]
    first_token: FirstToken
    freed_slot: FreedSlot
    costs: tuple[Cost, ...]
    evidence: tuple[Evidence, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "runs": [one.to_json() for one in self.runs],
            "first_token": self.first_token.to_json(),
            "freed_slot": self.freed_slot.to_json(),
            "cpu": [one.to_json() for one in self.costs],
            "evidence": [one.to_json() for one in self.evidence],
        }


@contextmanager
def loop_of(argv: Sequence[str], hint: str) -> Iterator[RawLoop]:
    """The loop of a process that is asked as `bench.raw` is. Raises: EngineDied when it does not start."""
    with start_child(argv, hint=hint, quiet=False, engine=True) as child:
        child.hear()
        yield lambda streams, tokens, prompt_tokens: Run.decode(child.answer(f"{streams} {tokens} {prompt_tokens}"))


def raw_loop(model: Path, slots: int) -> AbstractContextManager[RawLoop]:
    """The bare loop in a child process, loaded once."""
    return loop_of(module("cloister.bench.raw", model, slots), _HINT)


@contextmanager
def plain_http(model: Path, slots: int) -> Iterator[Endpoint]:
    """The app without the seal, in a process of its own with an engine of its own, as the enclave is."""
    with start_child(module("cloister.bench.plain", model, slots, CONTEXT), hint=_HINT, quiet=False) as app:
        yield Endpoint(PLAIN, f"http://127.0.0.1:{app.hear()['port']}", {"front": app.pid})


def sealed(url: str, policy: Policy, pid: int) -> Endpoint:
    """An enclave that runs already, its front in process `pid`."""
    return Endpoint(SEALED, url, {"front": pid}, policy)


@contextmanager
def proxied(enclave: Endpoint, root: Path) -> Iterator[Endpoint]:
    """The local proxy before a simulated enclave; `root`: the file of the simulator's certificate."""
    with start_child(module("cloister.bench.proxied", enclave.url, root), hint=_HINT, quiet=False) as proxy:
        url = f"http://127.0.0.1:{proxy.hear()['port']}"
        processes = {**enclave.processes, "proxy": proxy.pid}
        yield Endpoint(PROXIED, url, processes, verifications=lambda: int(proxy.answer("")["verifications"]))


@dataclass(slots=True)
class _Way:
    """An endpoint with its client, and what has gone through it."""

    endpoint: Endpoint
    client: httpx2.AsyncClient
    verifications: Callable[[], int] | None
    requests: int = 0
    runs: dict[int, list[Spent]] = field(default_factory=dict)
    shorts: dict[int, list[Spent]] = field(default_factory=dict)

    @staticmethod
    async def open(endpoint: Endpoint, stack: AsyncExitStack) -> "_Way":
        counter = Counter()
        if endpoint.policy is None:
            client = plain_client(endpoint.url)
        else:
            client = async_http_client(endpoint.url, policy=endpoint.policy, reuse_cache=False, complete=counter)
        counted = endpoint.verifications or (endpoint.policy and (lambda: counter.verifications))
        return _Way(endpoint, await stack.enter_async_context(client), counted or None)

    async def load(self, streams: int, tokens: int, prompt_tokens: int) -> Spent:
        """One run, with what it cost. The client's thread is this one."""
        bodies = [completion_body(prompt(number, prompt_tokens), tokens) for number in range(1, streams + 1)]
        self.requests += streams
        before, own = {name: cpu_seconds(pid) for name, pid in self.endpoint.processes.items()}, time.thread_time()
        run = await over_http(self.client, bodies)
        cpu = {name: cpu_seconds(pid) - before[name] for name, pid in self.endpoint.processes.items()}
        return Spent(run, {**cpu, "client": time.thread_time() - own})

    def costs(self, streams: int) -> list[Cost]:
        long, short = self.runs[streams], self.shorts[streams]
        return [Cost.of(self.endpoint.way, process, long, short) for process in long[0].cpu]


def compare(
    raw: RawLoop,
    endpoints: Sequence[Endpoint],
    *,
    streams: Sequence[int],
    tokens: int,
    repeats: int,
    on_run: Callable[[], None] = lambda: None,
) -> Overhead:
    """One comparison per number of streams, a warm-up of each first, not counted; what the first token waits; how soon
    a cancelled stream's slot is free, the most streams running that every endpoint must have slots for; and the CPU."""

    async def measure() -> Overhead:
        async with AsyncExitStack() as stack:
            ways = [await _Way.open(endpoint, stack) for endpoint in endpoints]
            first = await _first_tokens(raw, ways)
            runs = [await _rounds(raw, ways, count, tokens, repeats, on_run) for count in streams]
            (inside,) = (way for way in ways if way.endpoint.way == SEALED)
            freed = await _freed_slots(inside, max(streams))
            costs = [cost for count in streams for way in ways for cost in way.costs(count)]
            evidence = [Evidence(w.endpoint.way, w.verifications(), w.requests) for w in ways if w.verifications]
            return Overhead(tuple(runs), first, freed, tuple(costs), tuple(evidence))

    return as_client(measure)


async def _rounds(
    raw: RawLoop, ways: Sequence[_Way], streams: int, tokens: int, repeats: int, on_run: Callable[[], None]
) -> Comparison:
    """Every other round in the opposite order, so that a machine that slows down favours nobody; and a short run before each,
    because who rested while the others ran has its memory to find again, which is no layer's cost."""
    bare: list[Run] = []
    for way in ways:
        way.runs[streams], way.shorts[streams] = [], []
    for repeat in range(repeats + 1):
        count = tokens if repeat else 8
        turns: list[_Way | None] = [None, *ways]
        for turn in reversed(turns) if repeat % 2 else turns:
            if turn is None:
                await asyncio.to_thread(raw, streams, _AWAKE, SHORT_PROMPT_TOKENS)
                one = await asyncio.to_thread(raw, streams, count, PROMPT_TOKENS)
                bare += [one] if repeat else []
                continue
            await turn.load(streams, _AWAKE, SHORT_PROMPT_TOKENS)
            spent = await turn.load(streams, count, PROMPT_TOKENS)
            short = await turn.load(streams, _SHORT, SHORT_PROMPT_TOKENS)
            if repeat:
                turn.runs[streams].append(spent)
                turn.shorts[streams].append(short)
        on_run()
    return Comparison(
        streams, tuple(bare), {way.endpoint.way: tuple(one.run for one in way.runs[streams]) for way in ways}
    )


async def _first_tokens(raw: RawLoop, ways: Sequence[_Way]) -> FirstToken:
    """Each that counts follows at once on one like it, for the same reason."""
    bare: list[float] = []
    waits: dict[str, list[float]] = {way.endpoint.way: [] for way in ways}
    for pair in range(FIRST_TOKEN_PAIRS + 1):
        for _ in range(2):
            one = await asyncio.to_thread(raw, 1, 1, SHORT_PROMPT_TOKENS)
        bare += [one.first_token[0]] if pair else []  # the first warms up
        for way in ways:
            for _ in range(2):
                spent = await way.load(1, 1, SHORT_PROMPT_TOKENS)
            waits[way.endpoint.way] += [spent.run.first_token[0]] if pair else []
    return FirstToken(tuple(bare), {name: tuple(seconds) for name, seconds in waits.items()})


async def _freed_slots(way: _Way, slots: int) -> FreedSlot:
    at_once, after_cancel = [], []
    for _ in range(FREED_SLOT_PAIRS):
        way.requests += slots + 1
        async with AsyncExitStack() as others, AsyncExitStack() as last:
            for number in range(1, slots):
                await _open(way.client, number, others)
            began = time.perf_counter()
            await _open(way.client, slots, last)
            at_once.append(time.perf_counter() - began)
            began = time.perf_counter()
            body = completion_body(prompt(slots + 1, SHORT_PROMPT_TOKENS), 1)
            waiting = asyncio.create_task(stream(way.client, body, began))
            await asyncio.sleep(_QUEUED)
            cancelled = time.perf_counter()
            await last.aclose()
            first = await waiting
            after_cancel.append(began + first - cancelled)
    if min(after_cancel) < 0:
        raise ConnectionFailed("A slot was free before any stream was cancelled.")
    return FreedSlot(tuple(at_once), tuple(after_cancel))


async def _open(client: httpx2.AsyncClient, number: int, stack: AsyncExitStack) -> None:
    """A stream that has begun and goes on until `stack` is closed."""
    body = completion_body(prompt(number, SHORT_PROMPT_TOKENS), _ENDLESS)
    opened = pieces(await stack.enter_async_context(client.stream("POST", "/v1/completions", json=body)))
    await anext(opened)
    stack.push_async_callback(opened.aclose)
