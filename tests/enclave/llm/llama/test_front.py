import asyncio
import hashlib
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, cast

import pytest
from tests.enclave.llm.llama.random_model import START, write_model
from tests.enclave.llm.llama.serving import answer, ask, serve

from cloister.enclave.llm.engine import GenerateRequest, Prompt, Sampling, Started
from cloister.enclave.llm.llama import LlamaConfig, LlamaEngine, wire
from cloister.enclave.llm.llama.front import _Link
from cloister.enclave.llm.llama.process import Running
from cloister.errors import ContextLengthExceeded, EngineLoading, MalformedModel, WrongUse

pytestmark = pytest.mark.anyio
Mode = Literal["process", "thread"]
MODES = pytest.mark.parametrize("mode", ["process", "thread"])
ALICE, BOB = b"a" * 32, b"b" * 32


def chat(*messages: tuple[str, str], max_tokens: int | None = 8, truncate: bool = False) -> GenerateRequest:
    said = tuple({"role": role, "content": content} for role, content in messages)
    sampling = Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return GenerateRequest(Prompt(messages=said), sampling, truncate_prompt=truncate)


@MODES
async def test_serves_and_describes_its_model(model_path: Path, mode: Mode) -> None:
    async with serve(model_path, mode=mode) as engine:
        info = engine.info
        assert (info.variant, info.slots, engine.ready) == ("native", 16, True)
        assert (info.model.name, info.model.architecture, info.model.context_length) == ("random", "llama", 512)
        assert info.model.has_chat_template
        assert info.model.sha256 == hashlib.sha256(model_path.read_bytes()).hexdigest()  # noqa: ASYNC240
        found = await answer(engine, ask("once"))
        assert found.started == Started(4, 0, 0)
        assert found.done.completion_tokens == 16 == sum(d.tokens for d in found.deltas)


@MODES
async def test_sixteen_streams_finish_together(model_path: Path, mode: Mode) -> None:
    async with serve(model_path, mode=mode) as engine:
        found = await asyncio.gather(*(answer(engine, ask(f"prompt {n}", max_tokens=40)) for n in range(16)))
        assert [a.done.completion_tokens for a in found] == [40] * 16


async def test_both_modes_say_the_same(model_path: Path) -> None:
    texts = []
    for mode in ("process", "thread"):
        async with serve(model_path, mode=mode) as engine:
            texts.append((await answer(engine, ask("once upon a time", max_tokens=64))).text)
    assert texts[0] == texts[1]


@MODES
async def test_closing_an_answer_frees_its_slot_at_once(slow_path: Path, mode: Mode) -> None:
    """Left alone, the first answer would go on for 16,000 tokens before the second could begin."""
    async with serve(slow_path, mode=mode, slots=1, threads=1) as engine:
        endless = engine.generate(ask("once", max_tokens=None))
        await anext(endless)
        await anext(endless)
        await endless.aclose()  # type: ignore[attr-defined]
        assert (await answer(engine, ask("next", max_tokens=1))).done.completion_tokens == 1
        assert (await engine.stats())["tokens_generated"] < 16000


async def test_cancelling_the_task_inside_a_long_prompt_frees_the_slot(slow_path: Path) -> None:
    async with serve(slow_path, slots=1, threads=1) as engine:
        task = asyncio.create_task(answer(engine, ask("y" * 16000)))
        while not (await engine.stats())["prefill_chunks"]:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0.001)
        task.cancel()
        await answer(engine, ask("next", max_tokens=1))
        assert (await engine.stats())["prompt_tokens_evaluated"] < 16000


async def test_two_scopes_share_nothing_and_one_shares_its_own(model_path: Path) -> None:
    prompt = "w" * 400
    async with serve(model_path) as engine:

        async def evaluated(scope: bytes | None) -> tuple[int, int]:
            before = (await engine.stats())["prompt_tokens_evaluated"]
            found = await answer(engine, ask(prompt, scope=scope, max_tokens=2))
            return (await engine.stats())["prompt_tokens_evaluated"] - before, found.done.cached_tokens

        for scope in (ALICE, BOB, None, None):
            assert await evaluated(scope) == (400, 0)
        assert await evaluated(ALICE) == (1, 399)


async def test_renders_messages_with_the_models_template(model_path: Path) -> None:
    async with serve(model_path) as engine:
        found = await answer(engine, chat(("user", "hello")))
        expected = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
        assert found.started.prompt_tokens == len(await engine.tokenize(expected, parse_special=True))


async def test_a_model_without_template_takes_plain_prompts_only(tmp_path: Path) -> None:
    async with serve(write_model(tmp_path / "plain.gguf", template=None)) as engine:
        assert not engine.info.model.has_chat_template
        with pytest.raises(WrongUse, match="no chat template"):
            await answer(engine, chat(("user", "hello")))
        await answer(engine, ask("hello"))


@MODES
async def test_a_template_without_end_fails_its_request_and_no_other(tmp_path: Path, mode: Mode) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    async with serve(write_model(tmp_path / "endless.gguf", template=endless), mode=mode) as engine:
        other = asyncio.create_task(answer(engine, ask("once", max_tokens=300)))
        with pytest.raises(MalformedModel, match="too long"):
            await answer(engine, chat(("user", "hello")))
        assert (await other).done.completion_tokens == 300


async def test_refuses_what_does_not_fit_with_counts(model_path: Path) -> None:
    async with serve(model_path) as engine:
        with pytest.raises(ContextLengthExceeded) as caught:
            await answer(engine, ask("x" * 500, max_tokens=20))
        assert (caught.value.limit, caught.value.prompt, caught.value.requested) == (512, 500, 520)
        assert (await answer(engine, ask("x" * 500, max_tokens=12))).done.finish_reason == "length"


async def test_cuts_the_oldest_part_of_a_prompt_when_told_to(model_path: Path) -> None:
    async with serve(model_path) as engine:
        found = await answer(engine, ask("x" * 600 + "is last", max_tokens=12, truncate_prompt=True))
        assert found.started == Started(500, 0, 107)
        expected = await answer(engine, ask("x" * 493 + "is last", max_tokens=12))
        assert found.text == expected.text
        with pytest.raises(ContextLengthExceeded):
            await answer(engine, ask("x", max_tokens=600, truncate_prompt=True))


async def test_cuts_old_messages_but_not_the_system_message(model_path: Path) -> None:
    async with serve(model_path) as engine:
        turns = [("user" if n % 2 == 0 else "assistant", f"{n} " + "y" * 100) for n in range(9)]
        found = await answer(engine, chat(("system", "be kind"), *turns, truncate=True))
        expected = await answer(engine, chat(("system", "be kind"), *turns[-4:]))
        assert found.started.truncated > 0
        assert (found.text, found.started.prompt_tokens) == (expected.text, expected.started.prompt_tokens)
        one = await answer(engine, chat(("system", "be kind"), ("user", "z" * 900), truncate=True))
        assert one.started.prompt_tokens == 504


async def test_refuses_empty_prompts_foreign_tokens_and_what_is_no_json(model_path: Path) -> None:
    async with serve(model_path) as engine:
        for prompt in (Prompt(text=""), Prompt(tokens=()), Prompt(tokens=(999999,)), Prompt(tokens=(-1,))):
            with pytest.raises(WrongUse):
                await answer(engine, GenerateRequest(prompt, Sampling(max_tokens=1)))
        nested: object = "x"
        for _ in range(5000):
            nested = [nested]
        for value in (nested, b"bytes", float("nan")):
            with pytest.raises(WrongUse):
                await answer(
                    engine, GenerateRequest(Prompt(messages=({"role": "user", "content": value},)), Sampling())
                )
        assert (await answer(engine, ask("still here"))).done.completion_tokens == 16


async def test_tokens_and_text_map_to_each_other(model_path: Path) -> None:
    async with serve(model_path) as engine:
        text = "naïve € 你好 <|im_start|>"
        plain = await engine.tokenize(text)
        assert START not in plain
        assert await engine.detokenize(plain) == text.encode()
        meant = await engine.tokenize(text, parse_special=True)
        assert meant[-1] == START
        assert await engine.detokenize(meant) == text.encode()
        with pytest.raises(WrongUse):
            await engine.detokenize([10**6])
        assert await engine.tokenize("lone \ud800 surrogate")


async def test_gives_logprobs_when_asked(model_path: Path) -> None:
    async with serve(model_path) as engine:
        found = await answer(engine, ask("once", logprobs=3))
        entries = [entry for delta in found.deltas for entry in delta.logprobs]
        assert len(entries) == 16
        assert all(len(entry.top) == 3 and entry.token == entry.top[0].token for entry in entries)
        with pytest.raises(WrongUse):
            await answer(engine, ask("once", logprobs=21))


async def test_stops_at_a_stop_string(model_path: Path) -> None:
    async with serve(model_path) as engine:
        whole = (await answer(engine, ask("once", max_tokens=40))).text
        stop = whole[10:12]
        found = await answer(engine, ask("once", max_tokens=40, stop=(stop,)))
        assert found.text == whole[: whole.index(stop)]
        assert found.done.finish_reason == "stop"


async def test_is_loading_before_it_is_ready(model_path: Path) -> None:
    engine = LlamaEngine(LlamaConfig(model=model_path))
    with pytest.raises(EngineLoading):
        _ = engine.info
    with pytest.raises(EngineLoading):
        await answer(engine, ask("once"))
    await engine.start()
    await answer(engine, ask("once"))
    await engine.close()


async def test_engine_keeps_its_priority_when_the_front_is_niced(model_path: Path) -> None:
    """The supervisor thread exists before the front lowers itself; what it starts inherits from it."""
    engine = LlamaEngine(LlamaConfig(model=model_path))
    before = os.getpriority(os.PRIO_PROCESS, 0)

    def nice() -> None:
        os.setpriority(os.PRIO_PROCESS, 0, before + 5)

    await asyncio.to_thread(nice)  # a thread stands for the front: a test cannot raise its own priority again
    await engine.start()
    assert os.getpriority(os.PRIO_PROCESS, engine.pid) == before
    await engine.close()


async def test_refuses_a_file_with_another_digest_than_named(model_path: Path) -> None:
    engine = LlamaEngine(LlamaConfig(model=model_path, sha256="0" * 64))
    with pytest.raises(MalformedModel, match="no longer the one"):
        await engine.start()
    await engine.close()


async def test_a_missing_file_is_a_wrong_use(tmp_path: Path) -> None:
    engine = LlamaEngine(LlamaConfig(model=tmp_path / "none.gguf"))
    with pytest.raises(WrongUse):
        await engine.start()
    await engine.close()


async def test_what_is_asked_at_the_same_moment_reaches_the_engine_together() -> None:
    """It takes every core at once: whoever comes second would have to be opened beside it."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)  # noqa: FBT003
    link = await _Link.open(cast("Running", SimpleNamespace(connection=ours)), lambda _share: None)
    with theirs:
        link.send({"t": "stats", "id": 1})
        await asyncio.sleep(0)
        link.send({"t": "stats", "id": 2})
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(20):
            data = await loop.sock_recv(theirs, 4096)
        messages = list(wire.FrameReader(wire.MAX_REQUEST).feed(data))
        assert [message["id"] for message in messages] == [1, 2]
        link.close()
