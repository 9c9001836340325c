"""The engine is killed, hangs, or is fed a damaged model: the front lives on."""

import asyncio
import os
import random
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from tests.enclave.llm.llama.serving import Answer, answer, ask, serve

from cloister.enclave.llm.engine import Event
from cloister.enclave.llm.llama import LlamaConfig, LlamaEngine, LoopSettings
from cloister.enclave.llm.llama.child import read_beat
from cloister.enclave.llm.llama.process import EXIT_DIED, EXIT_HUNG, Running, spawn
from cloister.errors import CloisterError, EngineDied, EngineLoading, MalformedModel, WrongUse

pytestmark = pytest.mark.anyio


GUARD = 120
"""Seconds after which a test that waits for something is ended: a limit on failure, not on speed."""


class Clock:
    """The front's clock stands still unless a test moves it: what is slow on a busy machine takes no time on it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.reads = 0

    def monotonic(self) -> float:
        self.reads += 1
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("cloister.enclave.llm.llama.front.time", found)
    return found


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(GUARD):
        while not condition():  # noqa: ASYNC110 - whatever it asks has no event
            await asyncio.sleep(0.01)


async def answered(engine: LlamaEngine) -> Answer:
    """Ask until the engine is back."""
    async with asyncio.timeout(GUARD):
        while True:
            try:
                return await answer(engine, ask("once"))
            except (EngineLoading, EngineDied):
                await asyncio.sleep(0.05)


async def fate(engine: LlamaEngine, text: str) -> Event | CloisterError:
    try:
        return (await answer(engine, ask(text, max_tokens=None))).done
    except CloisterError as error:
        return error


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSEGV])
async def test_killed_during_eight_streams_gives_eight_errors_and_comes_back(
    slow_path: Path, sign: signal.Signals
) -> None:
    async with serve(slow_path, threads=1) as engine:
        streams = [asyncio.create_task(fate(engine, f"prompt {n}")) for n in range(8)]
        while (await engine.stats())["decode_steps"] <= 3:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0.01)
        first = engine.pid
        os.kill(first, sign)
        ends = await asyncio.gather(*streams)
        assert [type(end) for end in ends] == [EngineDied] * 8
        assert (await answered(engine)).done.completion_tokens == 16
        assert engine.pid != first


async def test_the_first_restart_is_at_once_and_further_ones_ever_later(
    model_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = LlamaEngine(LlamaConfig(model=model_path))
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def crash() -> None:
        engine._crashes.append(clock.now)
        await engine._pause()

    with monkeypatch.context() as patch:
        patch.setattr(asyncio, "sleep", sleep)
        for _ in range(6):
            await crash()
        clock.now += 61
        await crash()
    assert slept == [0.0, 0.5, 1.0, 2.0, 30.0, 30.0, 0.0]
    await engine.close()


async def test_a_stopped_engine_counts_as_hung(model_path: Path, clock: Clock) -> None:
    async with serve(model_path, hang_timeout=0.4) as engine:
        os.kill(engine.pid, signal.SIGSTOP)
        asked = asyncio.create_task(fate(engine, "once"))
        reads = clock.reads
        await until(lambda: clock.reads > reads + 3)
        assert not asked.done()
        clock.now += 0.5
        await until(asked.done)
        assert isinstance(asked.result(), EngineDied)
        await answered(engine)


async def test_an_idle_engine_is_not_taken_for_hung(model_path: Path, clock: Clock) -> None:
    async with serve(model_path, hang_timeout=0.2) as engine:
        before = engine.pid
        for _ in range(3):
            clock.now += 60
            reads = clock.reads
            await until(lambda: clock.reads > reads + 3)  # noqa: B023 - called at once
        os.kill(before, signal.SIGSTOP)
        clock.now += 60
        asked = asyncio.create_task(answer(engine, ask("once")))
        reads = clock.reads
        await until(lambda: clock.reads > reads + 3)
        os.kill(before, signal.SIGCONT)
        assert (await asked).done.completion_tokens == 16
        assert engine.pid == before


async def test_a_busy_engine_that_shows_life_is_not_taken_for_hung(slow_path: Path, clock: Clock) -> None:
    """However long it takes on the clock, as long as the beat goes on between two looks."""
    async with serve(slow_path, hang_timeout=0.2, threads=1) as engine:
        before = engine.pid
        endless = engine.generate(ask("once", max_tokens=None))
        await anext(endless)
        assert engine._link is not None
        shown = engine._link.running.beat
        for _ in range(3):
            clock.now += 0.15
            beat = read_beat(shown)
            await until(lambda: read_beat(shown) != beat)  # noqa: B023 - called at once
            reads = clock.reads
            await until(lambda: clock.reads > reads + 3)  # noqa: B023 - called at once
        await endless.aclose()  # type: ignore[attr-defined]
        assert engine.pid == before


async def test_an_answer_too_long_for_the_front_is_refused_and_harms_nobody(model_path: Path) -> None:
    async with serve(model_path) as engine:
        before = engine.pid
        with pytest.raises(WrongUse, match="too long"):
            await engine.detokenize([256] * 720_000)
        await answer(engine, ask("once"))
        assert engine.pid == before


async def test_is_reported_when_it_dies_again_and_again(model_path: Path, clock: Clock) -> None:
    """All within a minute: the clock stands still."""
    states: list[str] = []
    engine = LlamaEngine(LlamaConfig(model=model_path), on_state=lambda state, _: states.append(state))
    await engine.start()
    async with asyncio.timeout(GUARD):
        while "failed" not in states:
            if engine.pid:
                os.kill(engine.pid, signal.SIGKILL)
            await asyncio.sleep(0.02)
    with pytest.raises(EngineDied):
        await answer(engine, ask("once"))
    await engine.close()


async def test_does_not_restart_with_other_libraries(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(model_path) as engine:
        info = engine.info
        monkeypatch.setattr("cloister.enclave.llm.llama.front.library_digest", lambda _folder: "00" * 32)
        os.kill(engine.pid, signal.SIGKILL)
        await until(lambda: caplog.text.count("engine not restarted: NotTrusted") >= 2)
        assert not isinstance(await fate(engine, "once"), Event)
        assert (engine.info, engine.pid) == (info, 0)


async def test_does_not_restart_with_another_file(
    tmp_path: Path, model_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "swapped.gguf"
    path.write_bytes(model_path.read_bytes())  # noqa: ASYNC240
    async with serve(path) as engine:
        path.write_bytes(model_path.read_bytes() + b"\0" * 64)  # noqa: ASYNC240
        os.kill(engine.pid, signal.SIGKILL)
        await until(lambda: "engine not restarted: MalformedModel" in caplog.text)
        assert not engine.ready


THREAD = """
import asyncio, sys, time
from pathlib import Path
from cloister.enclave.llm.engine import GenerateRequest, Prompt, Sampling
from cloister.enclave.llm.llama import LlamaConfig, LlamaEngine, LoopSettings
from cloister.enclave.llm.llama.model import Model
async def main():
    config = LlamaConfig(Path(sys.argv[1]), mode="thread", hang_timeout=float(sys.argv[2]), loop=LoopSettings(slots=2))
    engine = LlamaEngine(config)
    await engine.start()
    def broken(*_):
        {fault}
    Model.decode = broken
    async for _ in engine.generate(GenerateRequest(Prompt(text="x"), Sampling(max_tokens=4))):
        pass
asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("fault", "patience", "code"),
    [("time.sleep(600)", "0.4", EXIT_HUNG), ("raise RuntimeError('secret words')", "600", EXIT_DIED)],
)
def test_in_thread_mode_the_process_ends_for_its_supervisor(
    model_path: Path, fault: str, patience: str, code: int
) -> None:
    command = [sys.executable, "-c", THREAD.replace("{fault}", fault), str(model_path), patience]
    done = subprocess.run(command, capture_output=True, timeout=GUARD, check=False)
    assert done.returncode == code
    assert b"secret" not in done.stdout + done.stderr


async def test_the_child_leaves_no_core_and_ends_with_its_parent(model_path: Path) -> None:
    script = (
        THREAD.replace('mode="thread", ', "")
        .replace("{fault}", "pass")
        .replace("    Model.decode = broken", "    print(engine.pid, flush=True); await asyncio.sleep(600)")
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(model_path), "600", stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    limits = Path(f"/proc/{pid}/limits").read_text()  # noqa: ASYNC240
    assert [line.split()[4:6] for line in limits.splitlines() if line.startswith("Max core")] == [["0", "0"]]
    os.kill(pid, signal.SIGSTOP)  # so that it cannot notice by itself
    parent.kill()
    await parent.wait()
    await until(lambda: is_over(pid))


def is_over(pid: int) -> bool:
    """Gone, or dead with nobody to reap it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def mutations(good: bytes) -> dict[str, bytes]:
    """The damage of `../shared/data/tools/mutate.py`, done to our own model."""
    n_tensors, n_kv = struct.unpack_from("<QQ", good, 8)
    header = good.find(b"token_embd.weight") - 8
    norm = good.find(b"blk.0.attn_norm.weight") + 22

    def after(key: bytes, offset: int) -> int:
        return good.find(key) + len(key) + offset

    def put(offset: int, form: str, value: int) -> bytes:
        changed = bytearray(good)
        struct.pack_into(form, changed, offset, value)
        return bytes(changed)

    cases = {
        "empty": b"",
        "magic": b"GGML" + good[4:],
        "version 99": put(4, "<I", 99),
        "version big endian": put(4, ">I", 3),
        "cut header": good[:20],
        "cut metadata": good[:5000],
        "cut tensor info": good[: header + 40],
        "cut data": good[: len(good) // 2],
        "cut last byte": good[:-1],
        "tensors huge": put(8, "<Q", 1 << 60),
        "tensors + 1": put(8, "<Q", n_tensors + 1),
        "tensors - 1": put(8, "<Q", n_tensors - 1),
        "metadata huge": put(16, "<Q", 1 << 60),
        "metadata - 1": put(16, "<Q", n_kv - 1),
        "key length huge": put(24, "<Q", 1 << 62),
        "array length huge": put(after(b"tokenizer.ggml.tokens", 8), "<Q", 1 << 61),
        "heads 0": put(after(b".attention.head_count", 4), "<I", 0),
        "heads 7": put(after(b".attention.head_count", 4), "<I", 7),
        "blocks huge": put(after(b".block_count", 4), "<I", 1 << 30),
        "width odd": put(after(b".embedding_length", 4), "<I", 1000),
        "context 0": put(after(b".context_length", 4), "<I", 0),
        "rope huge": put(after(b".rope.dimension_count", 4), "<I", 100000),
        "dimension huge": put(norm + 4, "<Q", 1 << 50),
        "dimensions 9": put(norm, "<I", 9),
        "type 99": put(norm + 12, "<I", 99),
        "offset past the end": put(norm + 16, "<Q", 1 << 40),
        "offset unaligned": put(norm + 16, "<Q", 33),
        "end token huge": put(after(b"tokenizer.ggml.eos_token_id", 4), "<I", 1 << 30),
        "tokenizer unknown": good.replace(b"gpt2", b"gptX", 1),
    }
    rng = random.Random(7)
    for number in range(6):
        flipped = bytearray(good)
        for _ in range(20):
            flipped[rng.randrange(24, header + 1000)] ^= 1 << rng.randrange(8)
        cases[f"flipped bits {number}"] = bytes(flipped)
    weights = bytearray(good)
    for _ in range(2000):
        weights[rng.randrange(header + 4000, len(weights))] = 0xFF
    cases["weights ff"] = bytes(weights)
    return cases


TRAINED = Path(__file__).parents[5] / "shared/data/weights/enclave-tiny-chat-q8_0.gguf"
needs_trained = pytest.mark.skipif(not TRAINED.exists(), reason=f"{TRAINED} is not on this machine")


@pytest.mark.parametrize("trained", [False, pytest.param(True, marks=needs_trained)], ids=["random", "trained"])
async def test_damaged_models_are_refused_or_served(tmp_path: Path, model_path: Path, trained: bool) -> None:
    outcomes: dict[str, str] = {}
    cases = mutations((TRAINED if trained else model_path).read_bytes())
    assert len(cases) == 36
    settings = LoopSettings(slots=2, context=256)
    turn = asyncio.Semaphore(3)

    async def load(name: str, content: bytes) -> None:
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        async with turn:
            engine = LlamaEngine(LlamaConfig(model=path, loop=settings, load_timeout=GUARD, hang_timeout=GUARD))
            try:
                await engine.start()
                await answer(engine, ask("once"))
                outcomes[name] = "served"
            except MalformedModel as error:
                assert error.message
                outcomes[name] = "refused"
            finally:
                await engine.close()

    await asyncio.gather(*(load(name, content) for name, content in cases.items()))
    assert list(outcomes.values()).count("refused") >= 20, outcomes


def says(words: str) -> str:
    """The program of an engine that says `words` (an expression) on its socket and then waits."""
    return f"import socket, struct, sys, time; socket.socket(fileno=int(sys.argv[3])).sendall({words}); time.sleep(600)"


def stand_in(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    """In place of the engine, a process that says `words`."""
    monkeypatch.setattr("cloister.enclave.llm.llama.process._START", says(words))


def noting(started: list[int]) -> Callable[..., Running]:
    def start(*how: Any) -> Running:
        running = spawn(*how)
        started.append(running.pid)
        return running

    return start


def said(message: str) -> str:
    return f"struct.pack('<I', {len(message)}) + {message.encode()!r}"


@pytest.mark.parametrize(
    "words",
    [
        "struct.pack('<I', 1 << 31)",
        "struct.pack('<I', 4) + b'nope'",
        "struct.pack('<I', 2) + b'[]'",
        "struct.pack('<I', 15) + b'{\"t\":\"unknown\"}'",
        "struct.pack('<I', 13) + b'{\"t\":\"ready\"}'",
        "struct.pack('<I', 200000) + b'[' * 200000",
        'struct.pack(\'<I\', 24) + b\'{"t":"events","e":[[1]]}\'',
        said('{"t":"progress","share":1' + "0" * 400 + "}"),
        said('{"t":"progress","share":NaN}'),
        said('{"t":"refused","another":true,"error":["use","no",""]}'),
        said('{"t":"refused","another":true,"error":["context",1,2,3]}'),
    ],
)
async def test_an_engine_that_talks_nonsense_is_refused(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    stand_in(monkeypatch, words)
    started: list[int] = []
    monkeypatch.setattr("cloister.enclave.llm.llama.front.spawn", noting(started))
    engine = LlamaEngine(LlamaConfig(model=model_path))
    with pytest.raises(MalformedModel):
        await engine.start()
    assert not any(Path(f"/proc/{pid}").exists() for pid in started)  # noqa: ASYNC240
    await engine.close()


@needs_trained
@pytest.mark.parametrize("path", sorted(TRAINED.parent.glob("*.gguf")), ids=lambda path: path.stem)
async def test_trained_models_of_others_are_served(path: Path) -> None:
    async with serve(path, slots=2) as engine:
        text = "Grüße, 世界! Once upon a time"
        assert (await engine.detokenize(await engine.tokenize(text))).decode().strip() == text
        first, second = await asyncio.gather(*(answer(engine, ask(text, max_tokens=24)) for _ in range(2)))
        assert first.text == second.text
        assert (first.done.completion_tokens, first.done.finish_reason) == (24, "length")


def with_fallen_rung(monkeypatch: pytest.MonkeyPatch, words: str) -> list[str]:
    """The first rung's engine runs `words` (a program) in place of ours. Returns which variants were tried."""
    tried: list[str] = []

    def start(mode: Literal["process", "thread"], model_fd: int, settings: LoopSettings) -> Running:
        tried.append(settings.variant)
        with monkeypatch.context() as patch:
            if settings.variant == "native":
                patch.setattr("cloister.enclave.llm.llama.process._START", words)
            return spawn(mode, model_fd, settings)

    monkeypatch.setattr("cloister.enclave.llm.llama.front.spawn", start)
    return tried


@pytest.mark.parametrize(
    "words",
    [
        "import os; os.kill(os.getpid(), 9)",
        says(said('{"t":"refused","another":true,"error":["model","no finite numbers",""]}')),
    ],
    ids=["dies", "fails its self-test"],
)
async def test_goes_down_the_ladder_and_stays_there(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, words: str
) -> None:
    tried = with_fallen_rung(monkeypatch, words)
    async with serve(model_path) as engine:
        assert engine.info.variant == "no-extra-buffers"
        os.kill(engine.pid, signal.SIGKILL)
        await answered(engine)
        assert tried == ["native", "no-extra-buffers", "no-extra-buffers"]
    assert "engine variant native: " in caplog.text


async def test_a_file_that_no_variant_could_read_is_tried_once(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = with_fallen_rung(monkeypatch, says(said('{"t":"refused","another":false,"error":["model","no",""]}')))
    engine = LlamaEngine(LlamaConfig(model=model_path))
    with pytest.raises(MalformedModel):
        await engine.start()
    await engine.close()
    assert tried == ["native"]
