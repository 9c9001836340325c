import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.cli.running import run

from cloister.bench import overhead
from cloister.bench.child import start_child
from cloister.bench.load import PROMPT_TOKENS, Run, as_client, completion_body, over_http, prompt
from cloister.bench.overhead import Comparison, Cost, Endpoint, FirstToken, FreedSlot, Spent
from cloister.bench.process import cpu_seconds, memory
from cloister.bench.proxied import Counter
from cloister.cli import bench
from cloister.cli.main import app
from cloister.errors import ConnectionFailed, EngineDied
from cloister.evidence.document import Document

FINISH = b'data: {"choices":[{"text":"","finish_reason":"length"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"completion_tokens":3}}\n\ndata: [DONE]\n\n'


def event(text: str) -> bytes:
    return b'data: {"choices":[{"text":%s}]}\n\n' % json.dumps(text).encode()


class Pieces(httpx2.AsyncByteStream):
    """An answer that comes in pieces, each in its turn among those of all answers that share `turn`."""

    def __init__(self, *pieces: tuple[int, bytes], turn: list[int] | None = None) -> None:
        self._pieces = pieces
        self._turn = turn or [0]

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for turn, piece in self._pieces:
            while self._turn[0] != turn:  # noqa: ASYNC110 (one line each is enough here)
                await asyncio.sleep(0)
            for _ in range(100):  # until whoever had the turn before is through with it
                await asyncio.sleep(0)
            yield piece
            self._turn[0] += 1


def test_ratios_are_taken_round_by_round_for_every_way() -> None:
    raw = (Run(1, 100, 1.0, (0.1,)), Run(1, 100, 2.0, (0.2,)))  # the machine slowed down by half in between
    sealed = (Run(1, 100, 1.25, (0.11,)), Run(1, 100, 2.5, (0.21,)))
    found = Comparison(1, raw, {"plain": raw, "sealed": sealed})
    assert found.ratios("sealed") == [0.8, 0.8]
    assert found.ratios("plain") == [1.0, 1.0]
    assert found.to_json()["ratio"] == 0.8
    waits = FirstToken((0.1, 0.2, 0.3), {"plain": (0.1, 0.2, 0.3), "sealed": (0.11, 0.22, 0.31)})
    assert waits.added("sealed") == pytest.approx(0.01)
    assert waits.added("plain") == 0
    assert FreedSlot((0.1, 0.2, 0.3), (0.15, 0.26, 0.34)).held == pytest.approx(0.05)


def test_cost_tells_tokens_from_requests() -> None:
    """Two streams, 3 ms a request and half a millisecond a token."""

    def spent(tokens: int) -> Spent:
        return Spent(Run(2, tokens, 1.0, (0.1, 0.1)), {"front": 2 * 0.003 + tokens * 0.0005})

    cost = Cost.of("sealed", "front", [spent(200)] * 3, [spent(4)] * 3)
    assert cost.per_token == pytest.approx(0.0005)
    assert cost.per_request == pytest.approx(0.003)


def test_decoding_is_counted_while_all_streams_run() -> None:
    assert Run(2, 100, 3.0, (0.5, 1.0), together=(60, 1.5)).decode_per_second == 40
    assert Run(2, 100, 3.0, (0.5, 1.0)).decode_per_second == 49  # nobody looked: all but each stream's first token
    at_once = Run(2, 100, 3.0, (2.8, 2.81), together=(97, 0.19))
    for apart in (Run(2, 2, 1.0, (0.5, 1.0)), Run(2, 100, 3.0, (0.5, 1.0), together=(0, -1.0)), at_once):
        with pytest.raises(ConnectionFailed):
            _ = apart.decode_per_second


def test_what_comes_before_all_streams_run_or_after_one_ended_is_not_decoding_together() -> None:
    turn = [0]
    answers = [
        Pieces((0, event("a")), (1, event("b") * 7), (3, event("c") * 2), (5, FINISH), (6, USAGE), turn=turn),
        Pieces((2, event("a")), (4, event("b")), (7, event("c") + FINISH + USAGE), turn=turn),
    ]
    transport = httpx2.MockTransport(lambda _request: httpx2.Response(200, stream=answers.pop(0)))

    async def load() -> Run:
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await over_http(client, [completion_body(prompt(number, 4), 3) for number in (1, 2)])

    found = asyncio.run(load())
    assert (found.streams, found.tokens) == (2, 6)
    assert found.together is not None
    assert found.together[0] == 3
    assert 0 < found.together[1] < found.seconds - max(found.first_token)


class Turn:
    """A way that notes in a log that all share when it is loaded, and with how many tokens."""

    def __init__(self, way: str, log: list[tuple[str, int]]) -> None:
        self.endpoint = Endpoint(way, "http://127.0.0.1", {})
        self.runs: dict[int, list[Spent]] = {}
        self.shorts: dict[int, list[Spent]] = {}
        self._log = log

    async def load(self, streams: int, tokens: int, _prompt_tokens: int) -> Spent:
        self._log.append((self.endpoint.way, tokens))
        return Spent(Run(streams, tokens, 1.0, (float(len(self._log)),)), {})


def test_every_other_round_goes_in_the_opposite_order_and_a_short_run_comes_before_each() -> None:
    log: list[tuple[str, int]] = []

    def raw(streams: int, tokens: int, _prompt_tokens: int) -> Run:
        log.append(("raw", tokens))
        return Run(streams, tokens, 1.0, (0.1,))

    ways: Any = [Turn("plain", log), Turn("sealed", log)]
    found = asyncio.run(overhead._rounds(raw, ways, 1, 50, 2, lambda: None))

    def around(tokens: int) -> list[list[tuple[str, int]]]:
        return [[("raw", 16), ("raw", tokens)], *([(way, 16), (way, tokens), (way, 2)] for way in ("plain", "sealed"))]

    warm_up, there, back = around(8), around(50), around(50)[::-1]
    assert log == [turn for turns in (*warm_up, *back, *there) for turn in turns]
    assert [len(runs) for runs in (found.raw, *found.ways.values())] == [2, 2, 2]


def test_a_first_token_that_counts_follows_at_once_on_one_like_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "FIRST_TOKEN_PAIRS", 1)
    log: list[tuple[str, int]] = []

    def raw(streams: int, tokens: int, _prompt_tokens: int) -> Run:
        log.append(("raw", tokens))
        return Run(streams, tokens, 1.0, (float(len(log)),))

    ways: Any = [Turn("plain", log), Turn("sealed", log)]
    found = asyncio.run(overhead._first_tokens(raw, ways))
    assert log == [("raw", 1), ("raw", 1), ("plain", 1), ("plain", 1), ("sealed", 1), ("sealed", 1)] * 2
    assert found.raw == (8.0,)
    assert found.ways == {"plain": (10.0,), "sealed": (12.0,)}


@pytest.mark.parametrize("answer", [(503, b""), (200, b""), (200, event("a"))], ids=["refused", "empty", "no usage"])
def test_an_answer_that_is_none_is_no_figure(answer: tuple[int, bytes]) -> None:
    status, body = answer
    stream = Pieces((0, body)) if body else Pieces()
    transport = httpx2.MockTransport(lambda _request: httpx2.Response(status, stream=stream))

    async def load() -> None:
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            await over_http(client, [completion_body(prompt(1, 4), 3)])

    with pytest.raises(ConnectionFailed):
        asyncio.run(load())


def test_prompts_of_another_salt_share_no_token_at_their_beginning() -> None:
    assert prompt(1, PROMPT_TOKENS) == [300 + (131 + at * 17) % 5000 for at in range(PROMPT_TOKENS)]
    first = {prompt(number, 4, salt)[0] for number in range(1, 17) for salt in range(1, 100)}
    assert len(first) == 99  # of every salt one
    assert len({tuple(prompt(number, 2, 7)) for number in range(64)}) == 64


@pytest.mark.skipif(sys.platform != "linux", reason="niceness is a thread's own on Linux only")
def test_what_stands_for_a_client_comes_last_and_nobody_else_with_it() -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)

    async def measure() -> int:
        return os.getpriority(os.PRIO_PROCESS, 0)

    assert (as_client(measure), as_client(measure, niceness=10)) == (19, min(before + 10, 19))
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_a_process_tells_its_own_cpu_time() -> None:
    before = cpu_seconds(os.getpid())
    until = time.process_time() + 0.02
    while time.process_time() < until:
        pass
    assert cpu_seconds(os.getpid()) - before >= 0.015
    with pytest.raises(OSError, match="Invalid argument"):
        cpu_seconds(1 << 22)


@pytest.mark.parametrize("wait", [0.0, 0.3], ids=["still there", "gone already"])
def test_a_process_that_ends_by_itself_is_said(wait: float) -> None:
    def answer() -> None:
        with start_child(["sh", "-c", "sleep 0.1; exit 7"], hint="Build it.") as child:
            time.sleep(wait)
            child.answer("1 2 3")

    with pytest.raises(EngineDied, match=r"ended by itself \(status 7\)") as caught:
        answer()
    assert caught.value.hint == "Build it."


def test_a_process_that_tells_no_json_is_said() -> None:
    with pytest.raises(EngineDied, match="no JSON"), start_child(["echo", "ready"]) as child:
        child.hear()


def test_a_child_is_asked_to_end_before_it_is_killed(tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    with start_child(["sh", "-c", f"cat >/dev/null; touch {ended}"]):
        pass
    assert ended.exists()


def test_a_process_tells_its_memory_in_bytes() -> None:
    held = bytearray(b"x") * (1 << 24)
    resident, most = memory(os.getpid(), "VmRSS"), memory(os.getpid(), "VmHWM")
    assert len(held) < resident <= most


def test_verifications_are_counted_and_change_nothing() -> None:
    counter, document = Counter(), Document.__new__(Document)
    assert counter(document, 0.0) is document
    assert counter.verifications == 1


def test_measures_every_way_against_the_bare_loop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(overhead, "FIRST_TOKEN_PAIRS", 3)
    monkeypatch.setattr(overhead, "FREED_SLOT_PAIRS", 2)
    options = ("--shape", "pythia-70m", "--streams", "1,2", "--tokens", "8", "--repeats", "1", "--json")
    ran = run(app, "bench", "overhead", *options, "--plot", str(tmp_path / "plots"))
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.stdout)
    runs = told["runs"]
    assert told["first_token"]["pairs"] == 3
    assert told["freed_slot"]["pairs"] == 2
    assert told["freed_slot"]["after_cancel_ms"] > 0
    assert [one["streams"] for one in runs] == [1, 2]
    assert all(one["raw_tokens_per_second"] > 0 and one["sealed_tokens_per_second"] > 0 for one in runs)
    ways = ["plain", "sealed", "proxied"]
    assert all(list(one["ways"]) == ways and one["ways"]["sealed"]["ratio"] == one["ratio"] for one in runs)
    assert list(told["first_token"]["ways"]) == ways
    processes = {(one["way"], one["process"]) for one in told["cpu"]}
    fronts = {(way, name) for way in ways for name in ("front", "client")}
    assert processes == fronts | {("proxied", "proxy")}
    assert [(one["way"], one["verifications"]) for one in told["evidence"]] == [("sealed", 1), ("proxied", 1)]
    assert all(one["requests"] > 10 for one in told["evidence"])
    assert (told["platform"], told["beside"]) == ("", None)  # no TEE here, and nothing to set it beside
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"overhead.png", "overhead.svg"}


def of_the_other_side(tmp_path: Path, **changes: Any) -> Path:
    """What the command would say in a trust domain, where all goes half as fast as 100 tokens a second."""
    ways = {way: {"tokens_per_second": 50.0} for way in ("plain", "sealed", "proxied")}
    runs = [{"streams": streams, "raw_tokens_per_second": 50.0, "ways": ways} for streams in (1, 16)]
    file = tmp_path / "inside.json"
    file.write_text(json.dumps({"shape": "pythia-70m", "platform": "tdx", "runs": runs, **changes}))
    return file


def test_two_sides_of_a_tees_wall_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ways = {way: {"tokens_per_second": 100.0} for way in ("plain", "sealed", "proxied")}
    here = {"platform": "", "runs": [{"streams": 16, "raw_tokens_per_second": 80.0, "ways": ways}]}
    there = bench._other_side(of_the_other_side(tmp_path), "pythia-70m", (16,))
    sides = bench._sides(here, there)
    assert sides == [{"streams": 16, "raw": 1.6, "plain": 2.0, "sealed": 2.0, "proxied": 2.0}]
    bench._show_sides(here, there, sides)
    shown = capsys.readouterr().out
    assert "no TEE / tdx" in shown
    assert "1.600" in shown


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": "pythia-1b"}, "another load"),
        ({"runs": []}, "another load"),
        ({"runs": [{"streams": 1}]}, "no run"),
        ({"platform": None, "runs": 7}, "no run"),
    ],
)
def test_a_run_of_another_load_is_not_set_beside_this_one(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    file = of_the_other_side(tmp_path, **changes)
    ran = run(app, "bench", "overhead", "--shape", "pythia-70m", "--streams", "1,16", "--beside", str(file))
    assert ran.exit_code == 2
    assert words in ran.stderr
