"""The engine is killed, hangs, or is fed a damaged model: the front lives on."""

import asyncio
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.enclave.llm.llama.serving import Answer, answer, ask, serve

from cloister.enclave.llm.engine import Event
from cloister.enclave.llm.llama import LlamaConfig, LlamaEngine, LoopSettings
from cloister.enclave.llm.llama.process import EXIT_DIED, EXIT_HUNG, Running, spawn
from cloister.errors import CloisterError, EngineDied, EngineLoading, MalformedModel, WrongUse

pytestmark = pytest.mark.anyio


async def answered_within(engine: LlamaEngine, seconds: float) -> Answer:
    """Ask until the engine is back."""
    until = time.monotonic() + seconds
    while True:
        try:
            return await answer(engine, ask("once"))
        except (EngineLoading, EngineDied):
            assert time.monotonic() < until
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
        for _ in range(1000):
            if (await engine.stats())["decode_steps"] > 3:
                break
            await asyncio.sleep(0.01)
        first = engine.pid
        os.kill(first, sign)
        ends = await asyncio.gather(*streams)
        assert [type(end) for end in ends] == [EngineDied] * 8
        assert (await answered_within(engine, 10)).done.completion_tokens == 16
        assert engine.pid != first


async def test_a_stopped_engine_counts_as_hung(model_path: Path) -> None:
    async with serve(model_path, hang_timeout=0.5) as engine:
        os.kill(engine.pid, signal.SIGSTOP)
        assert isinstance(await fate(engine, "once"), EngineDied)
        await answered_within(engine, 10)


async def test_an_idle_engine_is_not_taken_for_hung(model_path: Path) -> None:
    async with serve(model_path, hang_timeout=0.2) as engine:
        before = engine.pid
        await asyncio.sleep(0.8)
        await answer(engine, ask("once"))
        assert engine.pid == before


async def test_a_long_line_of_prompts_is_not_taken_for_a_hang(model_path: Path) -> None:
    async with serve(model_path, hang_timeout=0.4) as engine:
        before = engine.pid
        lines = await asyncio.gather(*(engine.tokenize("th " * 100_000) for _ in range(12)))
        assert {len(line) for line in lines} == {200_000}
        assert engine.pid == before


async def test_an_answer_too_long_for_the_front_is_refused_and_harms_nobody(model_path: Path) -> None:
    async with serve(model_path) as engine:
        before = engine.pid
        with pytest.raises(WrongUse, match="too long"):
            await engine.detokenize([256] * 720_000)
        await answer(engine, ask("once"))
        assert engine.pid == before


async def test_is_reported_when_it_dies_again_and_again(model_path: Path) -> None:
    states: list[str] = []
    engine = LlamaEngine(LlamaConfig(model=model_path), on_state=lambda state, _: states.append(state))
    await engine.start()
    while "failed" not in states:
        if engine.pid:
            os.kill(engine.pid, signal.SIGKILL)
        await asyncio.sleep(0.02)
    with pytest.raises(EngineDied):
        await answer(engine, ask("once"))
    await engine.close()


async def test_does_not_restart_with_other_libraries(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serve(model_path) as engine:
        info = engine.info
        monkeypatch.setattr("cloister.enclave.llm.llama.front.library_digest", lambda _folder: "00" * 32)
        os.kill(engine.pid, signal.SIGKILL)
        until = time.monotonic() + 2
        while time.monotonic() < until:
            assert not isinstance(await fate(engine, "once"), Event)
            await asyncio.sleep(0.1)
        assert (engine.info, engine.pid) == (info, 0)


async def test_does_not_restart_with_another_file(tmp_path: Path, model_path: Path) -> None:
    path = tmp_path / "swapped.gguf"
    path.write_bytes(model_path.read_bytes())  # noqa: ASYNC240
    async with serve(path) as engine:
        path.write_bytes(model_path.read_bytes() + b"\0" * 64)  # noqa: ASYNC240
        os.kill(engine.pid, signal.SIGKILL)
        await asyncio.sleep(0.5)
        assert not engine.ready


THREAD = """
import asyncio, sys, time
from pathlib import Path
from cloister.enclave.llm.engine import GenerateRequest, Prompt, Sampling
from cloister.enclave.llm.llama import LlamaConfig, LlamaEngine, LoopSettings
from cloister.enclave.llm.llama.model import Model
async def main():
    config = LlamaConfig(Path(sys.argv[1]), mode="thread", hang_timeout=0.4, loop=LoopSettings(slots=2))
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
    ("fault", "code"), [("time.sleep(60)", EXIT_HUNG), ("raise RuntimeError('secret words')", EXIT_DIED)]
)
def test_in_thread_mode_the_process_ends_for_its_supervisor(model_path: Path, fault: str, code: int) -> None:
    script = THREAD.replace("{fault}", fault)
    done = subprocess.run([sys.executable, "-c", script, str(model_path)], capture_output=True, timeout=60, check=False)
    assert done.returncode == code
    assert b"secret" not in done.stdout + done.stderr


async def test_the_child_leaves_no_core_and_ends_with_its_parent(model_path: Path) -> None:
    script = (
        THREAD.replace('mode="thread", ', "")
        .replace("{fault}", "pass")
        .replace("    Model.decode = broken", "    print(engine.pid, flush=True); await asyncio.sleep(60)")
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(model_path), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    limits = Path(f"/proc/{pid}/limits").read_text()  # noqa: ASYNC240
    assert [line.split()[4:6] for line in limits.splitlines() if line.startswith("Max core")] == [["0", "0"]]
    parent.kill()
    await parent.wait()
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():  # noqa: ASYNC240
            return
        await asyncio.sleep(0.05)
    state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]  # noqa: ASYNC240
    assert state == "Z"  # nobody reaps it here


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


async def test_damaged_models_are_refused_or_served(tmp_path: Path, model_path: Path) -> None:
    outcomes: dict[str, str] = {}
    cases = mutations(model_path.read_bytes())  # noqa: ASYNC240
    assert len(cases) == 36
    settings = LoopSettings(slots=2, context=256)
    turn = asyncio.Semaphore(3)

    async def load(name: str, content: bytes) -> None:
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        async with turn:
            engine = LlamaEngine(LlamaConfig(model=path, loop=settings, load_timeout=20, hang_timeout=20))
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


def stand_in(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    """In place of the engine, a process that says `words` (an expression) on its socket and then waits."""
    code = f"import socket, struct, sys, time; socket.socket(fileno=int(sys.argv[3])).sendall({words}); time.sleep(60)"
    monkeypatch.setattr("cloister.enclave.llm.llama.process._START", code)


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
