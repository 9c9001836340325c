import asyncio
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.cli.running import run
from tools import build_peers

from cloister.bench import original
from cloister.bench import peers as module
from cloister.bench.ggml import write_ggml
from cloister.bench.load import Run
from cloister.bench.peers import Figure, InProcess, Load, OverHttp, compare, loads, ratios
from cloister.bench.shapes import SHAPES
from cloister.cli import bench_peers
from cloister.cli.main import app
from cloister.errors import ConnectionFailed, WrongUse
from cloister.host.process import listen


@dataclass
class Fake:
    """A contender of fixed speed that notes what it was asked."""

    name: str
    speed: float = 1.0
    in_process: bool = False
    asked: list[tuple[Load, int, int]] = field(default_factory=list)
    closed: bool = False
    log: list[str] = field(default_factory=list)

    async def run(self, load: Load, tokens: int, salt: int) -> Run | None:
        self.log.append(self.name)
        self.asked.append((load, tokens, salt))
        if self.in_process and load.kind == "prefix":
            return None
        first = (module.PREFIX / self.speed,) * load.streams
        return Run(load.streams, int(self.speed), 1.0, first, together=(int(self.speed), 1.0))

    async def close(self) -> None:
        self.closed = True


def test_a_ratio_above_one_always_means_that_ours_is_faster() -> None:
    assert Load("decode", 1).faster(20.0, 10.0) == 2
    assert Load("prefix", 16).faster(1.0, 5.0) == 5


def test_peers_are_held_against_ours_of_their_kind_round_by_round() -> None:
    loop, original_stack = Fake("loop", in_process=True), Fake("ct", in_process=True)
    http, server = Fake("http"), Fake("server")
    decode = Figure(Load("decode", 1), {"loop": (4, 8), "http": (6, 6), "ct": (2, 4), "server": (3, 2)})
    prefix = Figure(Load("prefix", 2), {"http": (1, 2), "server": (5, 4)})
    found = ratios([decode, prefix], [loop, http], [original_stack, server])
    told = [(one.peer, one.ours, one.load.kind, one.rounds) for one in found]
    assert told == [
        ("ct", "loop", "decode", (2.0, 2.0)),
        ("server", "http", "decode", (2.0, 3.0)),
        ("server", "http", "prefix", (2.0, 5.0)),
    ]
    assert found[1].to_json()["ratio"] == 2.5


def test_everybody_is_measured_in_every_round_after_one_that_does_not_count() -> None:
    log: list[str] = []
    one, other = Fake("one", 3.0, in_process=True, log=log), Fake("other", 4.0, log=log)
    figures = compare([one, other], streams=[1, 2], tokens=50, repeats=2)
    assert [figure.load for figure in figures] == loads([1, 2])
    assert all(figure.values["other"] == (4.0, 4.0) for figure in figures if figure.load.kind != "prefix")
    assert figures[-1].values == {"other": (128.0, 128.0)}  # seconds
    rounds = len(loads([1, 2]))
    there, back = ["one", "other"] * rounds, ["other", "one"] * rounds
    assert log == [*back, *there, *back]
    assert [tokens for _, tokens, _ in one.asked] == [8] * rounds + [50] * 2 * rounds
    assert [salt for *_, salt in one.asked] == [salt for *_, salt in other.asked]
    assert len({salt for *_, salt in one.asked}) == 3 * rounds
    assert one.closed
    assert other.closed


@dataclass
class Ragged(Fake):
    """One whose streams sometimes do not run together."""

    async def run(self, load: Load, tokens: int, salt: int) -> Run | None:
        run = await super().run(load, tokens, salt)
        return None if run is None else replace(run, together=(0, 0.0) if len(self.asked) > 8 else run.together)


def test_whose_streams_did_not_run_together_has_no_figure_for_that_load_and_all_others() -> None:
    figures = compare([Fake("one", 3.0), Ragged("ragged", 4.0)], streams=[2], tokens=50, repeats=2)
    told = {figure.load.kind: set(figure.values) for figure in figures}
    assert told.pop("decode") == {"one"}
    assert set(map(frozenset, told.values())) == {frozenset({"one", "ragged"})}


class Placed(Fake):
    """Notes in which place its client stands."""

    async def run(self, load: Load, tokens: int, salt: int) -> Run | None:
        self.log.append(str(os.getpriority(os.PRIO_PROCESS, 0)))
        return await super().run(load, tokens, salt)


def test_a_client_stands_where_the_servers_stand_that_it_asks() -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    one = Placed("one")
    compare([one], streams=[1], tokens=8, repeats=1)
    assert set(one.log) == {str(before), "one"}


def test_a_loop_is_asked_for_what_it_can_do() -> None:
    asked: list[tuple[int, int, int]] = []

    def loop(streams: int, tokens: int, prompt_tokens: int) -> Run:
        asked.append((streams, tokens, prompt_tokens))
        return Run(streams, streams * tokens, 4.0, (2.0,) * streams)

    async def measure(load: Load) -> float | None:
        run = await InProcess("loop", loop, most=2).run(load, 64, 1)
        return None if run is None else load.value(run)

    values = [asyncio.run(measure(load)) for load in loads([1, 2])]
    assert values == [512 / 2, 63 / 2, 126 / 2, 128 / 4, None]
    assert asked == [(1, 1, 512), (1, 64, 4), (2, 64, 4), (2, 64, 128)]
    assert asyncio.run(measure(Load("decode", 3))) is None


def test_streams_share_a_prefix_that_one_request_brought_before() -> None:
    prompts: list[list[int]] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content)
        prompts.append(body["prompt"])
        told = b'data: {"choices":[{"text":"a"}]}\n\ndata: {"usage":{"completion_tokens":1}}\n\ndata: [DONE]\n\n'
        return httpx2.Response(200, stream=httpx2.ByteStream(told))

    async def measure() -> Run | None:
        async with httpx2.AsyncClient(transport=httpx2.MockTransport(answer), base_url="http://127.0.0.1") as client:
            return await OverHttp("server", client).run(Load("prefix", 3), 64, 5)

    run = asyncio.run(measure())
    assert run is not None
    assert len(run.first_token) == 3
    assert len(prompts) == 4
    assert len({tuple(words[:512]) for words in prompts}) == 1
    assert len({tuple(words[512:]) for words in prompts}) == 4


class FakeModel:
    """ctransformers' model, as far as it is used."""

    def __init__(self) -> None:
        self.evaluated: list[int] = []

    def reset(self) -> None:
        self.evaluated.clear()

    def eval(self, tokens: Sequence[int]) -> None:
        self.evaluated.append(len(tokens))

    def sample(self, **_: Any) -> int:
        return 7


def test_the_originals_stack_reads_the_prompt_at_once_and_generates_what_is_asked() -> None:
    model = FakeModel()
    for _ in range(2):
        told = original.run(model, 5, 32)
        assert model.evaluated == [32, 1, 1, 1, 1]
        assert Run.decode(told).tokens == 5
        assert 0 < told["first_token"][0] <= told["seconds"]


def test_the_old_format_is_written_whole(tmp_path: Path) -> None:
    shape = SHAPES["gptneox-mini"]
    data = write_ggml("gptneox-mini", tmp_path, note=lambda _line: None).read_bytes()
    header = struct.unpack_from("<I8i", data)
    assert header == (0x67676D6C, shape.vocabulary, shape.context, 128, 4, 2, shape.rotary, 1, 2008)
    at = struct.calcsize("<I8i")
    for _ in range(shape.vocabulary):
        at += 4 + struct.unpack_from("<I", data, at)[0]
    found: dict[str, tuple[int, ...]] = {}
    while at < len(data):
        dimensions, length, kind = struct.unpack_from("<3i", data, at)
        sizes = struct.unpack_from(f"<{dimensions}i", data, at + 12)
        at += 12 + 4 * dimensions
        found[data[at : at + length].decode()] = sizes
        cells = 1
        for size in sizes:
            cells *= size
        at += length + {0: cells * 4, 6: cells // 32 * 22}[kind]
    assert at == len(data)
    assert len(found) == 4 + 12 * shape.layers
    block = "gpt_neox.layers.1"
    assert found["embed_out.weight"] == (128, shape.vocabulary)
    assert found[f"{block}.attention.query_key_value.weight"] == (128, 384)  # columns first
    assert found[f"{block}.attention.query_key_value.bias"] == (384,)
    assert found[f"{block}.mlp.dense_4h_to_h.weight"] == (512, 128)
    assert found[f"{block}.mlp.dense_4h_to_h.bias"] == (128,)
    assert found[f"{block}.input_layernorm.weight"] == (128,)


def test_the_old_format_cut_short_is_not_taken_for_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("cloister.bench.ggml._describe", cut)
    with pytest.raises(OSError, match="disk full"):
        write_ggml("gptneox-mini", tmp_path, note=lambda _line: None)
    assert not list(tmp_path.iterdir())
    with pytest.raises(WrongUse):
        write_ggml("mpt-mini", tmp_path, note=lambda _line: None)


def test_a_peer_is_known_by_its_key_and_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = build_peers.root() / "llama-server"
    assert build_peers.recorded(place) == ""
    for key in ("first", "second"):
        made = build_peers.root() / "done"
        made.mkdir(parents=True)
        (made / key).touch()
        build_peers.put(made, "llama-server", key)
        assert build_peers.recorded(place) == key
    assert {path.name for path in place.iterdir()} == {"second", "peer.json"}
    (place / "peer.json").write_text("{")
    assert build_peers.recorded(place) == ""


def test_refuses_what_is_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run(app, "bench", "peers", "--streams", "one").exit_code == 2
    assert run(app, "bench", "peers", "--streams", "65").exit_code == 2


@pytest.mark.parametrize(
    ("scheme", "message"),
    [("ftp", "A server's address looks like"), ("http", "No OpenAI-compatible server lists its models there.")],
)
def test_a_named_server_is_looked_for_before_any_model_is_loaded(
    scheme: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model(_name: str) -> None:
        pytest.fail("a model was looked for")

    monkeypatch.setattr(bench_peers, "_model", model)
    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
    refused = run(app, "bench", "peers", "--url", f"{scheme}://127.0.0.1:{port}")
    assert refused.exit_code == (WrongUse if scheme == "ftp" else ConnectionFailed).exit_code
    assert message in " ".join(refused.stderr.split())


def test_peers_that_are_not_here_are_a_row_and_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "PREFIX", 64)
    monkeypatch.setattr(module, "PROMPT", 16)
    options = ("--model", "pythia-70m", "--streams", "2", "--tokens", "32", "--repeats", "1", "--json")
    ran = run(app, "bench", "peers", *options)
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.stdout)
    assert told["absent"] == dict.fromkeys(("llama-server", "ctransformers"), "python tools/build_peers.py")
    assert told["ratios"] == []
    medians = {one["load"]: one["medians"] for one in told["figures"]}
    assert all(medians["aggregate"][f"cloister, {name}"] > 0 for name in ("bare loop", "plain HTTP", "sealed"))
    assert set(medians["prefix"]) == {"cloister, plain HTTP", "cloister, sealed"}
