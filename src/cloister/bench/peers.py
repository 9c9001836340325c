"""cloister beside others that serve the same model, in turn on one machine, like with like.

What runs in process (ctransformers) is held against our bare loop; what answers over HTTP (llama-server, any
OpenAI-compatible server) against our plain HTTP, and, as users get it, against our sealed way. A ratio above 1 means
that cloister is that much faster; each is taken between runs of the same round.
"""

import asyncio
import base64
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import httpx2

from cloister.bench import original
from cloister.bench.load import Run, as_client, completion_body, over_http, plain_client, prompt
from cloister.bench.overhead import CONTEXT, RawLoop, loop_of
from cloister.client import async_http_client
from cloister.enclave.llm.llama.config import physical_cores
from cloister.enclave.pyapp.confinement import die_with_parent
from cloister.errors import ConnectionFailed
from cloister.host.process import listen
from cloister.verify import Policy

__all__ = [
    "Contender",
    "Figure",
    "InProcess",
    "Load",
    "OverHttp",
    "Ratio",
    "compare",
    "ctransformers",
    "ctransformers_python",
    "llama_server",
    "llama_server_program",
    "loads",
    "ours_plain",
    "ours_sealed",
    "ratios",
]

PROMPT = 128
"""Tokens of each prompt where prompts count."""
PREFIX = 512
"""Tokens of a long prompt, and of one that streams share."""
_SUFFIX = 8  # tokens that each stream adds to the shared prefix
_SHORT = 4
_AFTER_PREFIX = 4  # tokens generated after it
_CACHE_MIB = 2048
_WARM_UP = 8  # tokens
_START_SECONDS = 180.0

Kind: TypeAlias = Literal["decode", "aggregate", "prefill", "prefix"]
_TITLES: Mapping[Kind, tuple[str, str]] = {
    "decode": ("decode alone", "tok/s"),
    "aggregate": (f"prompts of {PROMPT} tokens included", "tok/s"),
    "prefill": (f"prefill of {PREFIX} tokens", "tok/s"),
    "prefix": (f"first token after a shared prefix of {PREFIX} tokens", "s"),
}


@dataclass(frozen=True, slots=True)
class Load:
    """What is measured with how many streams."""

    kind: Kind
    streams: int

    @property
    def title(self) -> str:
        return _TITLES[self.kind][0]

    @property
    def unit(self) -> str:
        return _TITLES[self.kind][1]

    def value(self, run: Run) -> float:
        """In `unit`. Raises: ConnectionFailed when the streams were too short to be measured."""
        match self.kind:
            case "decode":
                return run.decode_per_second
            case "aggregate":
                return run.tokens_per_second
            case "prefill":
                return PREFIX / run.first_token[0]
            case "prefix":
                return run.median_first_token

    def faster(self, one: float, other: float) -> float:
        """How many times as fast `one` is."""
        return other / one if self.kind == "prefix" else one / other


def loads(streams: Sequence[int]) -> list[Load]:
    """All that is measured for these numbers of streams."""
    found = [Load("prefill", 1)]
    for count in streams:
        found.append(Load("decode", count))
        if count > 1:
            found += [Load("aggregate", count), Load("prefix", count)]
    return found


class Contender(Protocol):
    """Something that can be put under load. `in_process`: measured without HTTP."""

    @property
    def name(self) -> str: ...

    @property
    def in_process(self) -> bool: ...

    async def run(self, load: Load, tokens: int, salt: int) -> Run | None:
        """None for what it cannot do. No two calls with different salts share a prompt."""

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class InProcess:
    """A loop in a process of its own, which keeps no prompts. `most`: streams that it can decode at once."""

    name: str
    loop: RawLoop
    most: int

    @property
    def in_process(self) -> bool:
        return True

    async def run(self, load: Load, tokens: int, salt: int) -> Run | None:
        if load.streams > self.most or load.kind == "prefix":
            return None
        plan = {"decode": (tokens, _SHORT), "aggregate": (tokens, PROMPT)}.get(load.kind, (1, PREFIX))
        return await asyncio.to_thread(self.loop, load.streams, *plan)

    async def close(self) -> None:
        """Nothing: whoever started the process ends it."""


@dataclass(frozen=True, slots=True)
class OverHttp:
    """A server with `/v1/completions`, through whatever `client` sends its requests."""

    name: str
    client: httpx2.AsyncClient
    model: str = "default"

    @property
    def in_process(self) -> bool:
        return False

    async def run(self, load: Load, tokens: int, salt: int) -> Run | None:
        numbers = range(1, load.streams + 1)
        if load.kind == "prefix":
            shared = prompt(0, PREFIX, salt)
            await self._ask([[*shared, *prompt(load.streams + 1, _SUFFIX)]], 1)
            return await self._ask([[*shared, *prompt(number, _SUFFIX)] for number in numbers], _AFTER_PREFIX)
        count, length = {"decode": (tokens, _SHORT), "aggregate": (tokens, PROMPT)}.get(load.kind, (1, PREFIX))
        return await self._ask([prompt(number, length, salt) for number in numbers], count)

    async def close(self) -> None:
        await self.client.aclose()

    async def _ask(self, prompts: Sequence[Sequence[int]], tokens: int) -> Run:
        return await over_http(self.client, [completion_body(words, tokens, self.model) for words in prompts])


@dataclass(frozen=True, slots=True)
class Figure:
    """One load: what each contender that can do it reached, round by round."""

    load: Load
    values: Mapping[str, tuple[float, ...]]

    def to_json(self) -> dict[str, Any]:
        medians = {name: statistics.median(values) for name, values in self.values.items()}
        values = {name: list(values) for name, values in self.values.items()}
        title = {"load": self.load.kind, "streams": self.load.streams, "unit": self.load.unit}
        return {**title, "medians": medians, "values": values}


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as fast `ours` was as `peer`, round by round, sorted."""

    load: Load
    ours: str
    peer: str
    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def to_json(self) -> dict[str, Any]:
        return {
            "load": self.load.kind,
            "streams": self.load.streams,
            "ours": self.ours,
            "peer": self.peer,
            "ratio": self.median,
            "ratios": list(self.rounds),
        }


def ratios(figures: Sequence[Figure], ours: Sequence[Contender], peers: Sequence[Contender]) -> list[Ratio]:
    """Each peer against each of ours of its kind, for every load that both can do."""
    found = []
    for peer in peers:
        for figure in figures:
            for own in ours:
                if own.in_process == peer.in_process and {own.name, peer.name} <= figure.values.keys():
                    pairs = zip(figure.values[own.name], figure.values[peer.name], strict=True)
                    rounds = tuple(sorted(figure.load.faster(one, other) for one, other in pairs))
                    found.append(Ratio(figure.load, own.name, peer.name, rounds))
    return found


def compare(
    contenders: Sequence[Contender],
    *,
    streams: Sequence[int],
    tokens: int,
    repeats: int,
    on_run: Callable[[], None] = lambda: None,
) -> list[Figure]:
    """Every load in `repeats` rounds, every other one in the opposite order; a short round first, not counted. The
    contenders are closed at the end. Whose streams once ended before all of them ran has no figure for that load."""

    async def measure() -> list[Figure]:
        salt = int(time.time()) % 2000
        found: dict[Load, dict[str, list[float]]] = {load: {} for load in loads(streams)}
        short: set[tuple[Load, str]] = set()
        async with AsyncExitStack() as stack:
            for contender in contenders:
                stack.push_async_callback(contender.close)
            for repeat in range(repeats + 1):
                for load, values in found.items():
                    salt += 1
                    for contender in contenders if repeat % 2 else reversed(contenders):
                        run = await contender.run(load, tokens if repeat else _WARM_UP, salt)
                        if repeat and run is not None:
                            try:
                                values.setdefault(contender.name, []).append(load.value(run))
                            except ConnectionFailed:
                                short.add((load, contender.name))
                    on_run()
        return [
            Figure(load, {name: tuple(listed) for name, listed in values.items() if (load, name) not in short})
            for load, values in found.items()
        ]

    # In a later place than theirs, what a peer whose threads spin says is heard late, or all at once.
    return as_client(measure, niceness=0)


def ours_plain(url: str) -> OverHttp:
    """Our app without the seal; its caches open to one secret, as a client of ours sends one."""
    client = plain_client(url)
    client.headers["cloister-cache-secret"] = base64.urlsafe_b64encode(os.urandom(32)).rstrip(b"=").decode()
    return OverHttp("cloister, plain HTTP", client)


def ours_sealed(url: str, policy: Policy) -> OverHttp:
    return OverHttp("cloister, sealed", async_http_client(url, policy=policy))


def llama_server_program(folder: Path) -> Path:
    return folder / "llama-server" / "llama-server"


def ctransformers_python(folder: Path) -> Path:
    return folder / "ctransformers" / "bin" / "python"


@contextmanager
def llama_server(program: Path, model: Path, slots: int) -> Iterator[OverHttp]:
    """llama.cpp's own server: our threads, our slots and context, continuous batching, prompt cache on, f16 cache.

    Raises: ConnectionFailed when it does not serve.
    """
    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]  # one that nobody listens on once we do not
    threads = str(physical_cores())
    argv = [str(program), "--model", str(model), "--host", "127.0.0.1", "--port", str(port), "--log-disable"]
    argv += ["--threads", threads, "--threads-batch", threads, "--parallel", str(slots), "--cont-batching"]
    argv += ["--ctx-size", str(slots * CONTEXT), "--no-webui", "--cache-prompt", "--cache-ram", str(_CACHE_MIB)]
    argv += ["--cache-type-k", "f16", "--cache-type-v", "f16"]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(argv, stdout=quiet, stderr=quiet, preexec_fn=die_with_parent) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_served(process, url)
            yield OverHttp("llama-server", plain_client(url))
        finally:
            process.terminate()


def _wait_until_served(process: subprocess.Popen[bytes], url: str) -> None:
    until = time.monotonic() + _START_SECONDS
    with httpx2.Client(trust_env=False) as client:
        while process.poll() is None and time.monotonic() < until:
            try:
                if client.get(f"{url}/health").status_code == 200:
                    return
            except httpx2.HTTPError:
                pass  # it does not listen yet
            time.sleep(0.1)
    raise ConnectionFailed(
        "llama-server did not start.",
        hint="It is built for one CPU: python tools/build_peers.py",
        got=f"status {process.poll()}",
    )


@contextmanager
def ctransformers(python: Path, model: Path) -> Iterator[InProcess]:
    """The original's stack on a file in the old format, with our threads and the batch that it reads prompts best with."""
    argv = [
        str(python),
        "-I",
        "-W",
        "ignore",
        str(Path(original.__file__)),
        str(model),
        str(physical_cores()),
        str(PREFIX),
    ]
    with loop_of(argv, "python tools/build_peers.py") as loop:
        yield InProcess("ctransformers", loop, most=1)
