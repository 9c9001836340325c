import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.enclave.llm.conftest import eventually
from tests.enclave.llm.upstream.fake import (
    QUICK,
    FakeVllm,
    engine_for,
    says,
    served,
    tokens_of,
    write_folder,
)

from cloister.enclave.llm.engine import Delta, Done, Event, GenerateRequest, Prompt, Sampling, Started
from cloister.enclave.llm.upstream import UpstreamEngine, model_digest
from cloister.errors import EngineDied, EngineLoading, MalformedMessage, QueueFull, WrongUse

pytestmark = pytest.mark.anyio

HELLO: tuple[dict[str, str], ...] = ({"role": "user", "content": "Hello"},)


@asynccontextmanager
async def engine_of(fake: FakeVllm, **options: Any) -> AsyncIterator[UpstreamEngine]:
    async with served(fake) as upstream, engine_for(upstream.address, **options) as engine:
        yield engine


def ask(text: str = "Hello", scope: bytes | None = None, **sampling: Any) -> GenerateRequest:
    return GenerateRequest(Prompt(text=text), Sampling(**sampling), scope)


async def answer(engine: UpstreamEngine, request: GenerateRequest | None = None) -> list[Event]:
    return [event async for event in engine.generate(request or ask())]


async def test_an_answer_in_the_seams_events() -> None:
    async with engine_of(FakeVllm()) as engine:
        assert await answer(engine) == [Started(5, 0), Delta("Hel", 3), Delta("lo", 2), Done("stop", 5, 5, 0)]


async def test_says_what_it_is_and_claims_no_digest_of_weights(tmp_path: Path) -> None:
    async with engine_of(FakeVllm(), tokenizer=write_folder(tmp_path)) as engine:
        info = engine.info
        assert (info.variant, info.slots, info.model.name, info.model.context_length) == (
            "upstream",
            16,
            "acme/Toy-7B",
            512,
        )
        assert info.model.sha256 == model_digest("acme/Toy-7B")
        assert (info.model.has_chat_template, info.model.calls, info.model.embedding) == (True, "hermes", 0)
        assert engine.ready


async def test_without_a_folder_it_knows_no_conversations() -> None:
    async with engine_of(FakeVllm()) as engine:
        assert not engine.info.model.has_chat_template


@pytest.mark.parametrize("owner", ["vllm", "sglang"])
async def test_messages_are_rendered_in_here_and_go_as_tokens(tmp_path: Path, owner: str) -> None:
    fake = FakeVllm(owner=owner)
    async with engine_of(fake, tokenizer=write_folder(tmp_path)) as engine:
        await answer(engine, GenerateRequest(Prompt(messages=HELLO), Sampling()))
    assert fake.prompts() == ["<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"]
    assert {asked.path for asked in fake.asked} == {"/v1/models", "/v1/embeddings", "/tokenize", "/v1/completions"}


async def test_an_answer_may_fill_the_context_and_no_more() -> None:
    fake = FakeVllm(context=100)
    async with engine_of(fake, context=64) as engine:
        await answer(engine)
        await answer(engine, ask(max_tokens=3))
    assert [body["max_tokens"] for body in fake.completions] == [59, 3]


async def test_needs_to_know_the_context(tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match="how long"):
        async with engine_of(FakeVllm(context=None)):
            pass
    async with engine_of(FakeVllm(context=None), context=64) as engine:
        assert engine.info.model.context_length == 64


async def test_leaving_an_answer_ends_the_upstreams_work() -> None:
    fake = FakeVllm(pieces=("a", asyncio.Event(), "b"))
    async with engine_of(fake) as engine:
        events: Any = engine.generate(ask())
        assert [await anext(events), await anext(events)] == [Started(5, 0), Delta("a", 1)]
        assert fake.running == 1
        await events.aclose()
        await eventually(lambda: fake.left == 1 and fake.running == 0)
        assert engine.ready


@pytest.mark.parametrize("cut", [None, b"data: {\n\n", b'data: {"error": {"message": "CUDA", "code": 500}}\n\n'])
async def test_an_answer_that_breaks_off_is_none(cut: Any) -> None:
    async with engine_of(FakeVllm(pieces=("a", cut, "b")), limits=QUICK) as engine:
        with pytest.raises(EngineDied):
            await answer(engine)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, WrongUse),
        (401, WrongUse),
        (404, WrongUse),
        (422, WrongUse),
        (429, QueueFull),
        (500, EngineDied),
        (503, EngineLoading),
        (307, EngineDied),
    ],
)
async def test_a_refusal_has_a_type_and_quotes_nothing(status: int, error: type[Exception]) -> None:
    async with engine_of(FakeVllm(status=status)) as engine:
        with pytest.raises(error) as refused:
            await answer(engine)
        assert "refused:" not in str(refused.value)
        assert "72, 101" not in str(refused.value)


async def test_is_not_ready_while_the_upstream_is_away_and_again_when_it_is_back() -> None:
    fake = FakeVllm()
    async with served(fake) as upstream, engine_for(upstream.address) as engine:
        await upstream.stop()
        await eventually(lambda: not engine.ready)
        with pytest.raises(EngineDied, match="away"):
            await answer(engine)
        async with served(fake, upstream.address.port):
            await eventually(lambda: engine.ready)
            assert (await answer(engine))[-1] == Done("stop", 5, 5, 0)


async def test_one_that_comes_back_with_another_model_stays_out() -> None:
    fake = FakeVllm()
    async with served(fake) as upstream, engine_for(upstream.address) as engine:
        fake.name = "acme/Other"
        await eventually(lambda: not engine.ready)
        fake.name = "acme/Toy-7B"
        await eventually(lambda: engine.ready)


async def test_a_kill_in_the_midst_is_told_at_once_and_makes_it_unready() -> None:
    fake = FakeVllm(pieces=("a", asyncio.Event()))
    async with served(fake) as upstream, engine_for(upstream.address, poll=60.0) as engine:
        events: Any = engine.generate(ask())
        assert [await anext(events), await anext(events)] == [Started(5, 0), Delta("a", 1)]
        await upstream.stop()
        with pytest.raises(EngineDied):
            await anext(events)
        await eventually(lambda: not engine.ready)


async def test_waits_for_an_upstream_that_starts_later() -> None:
    async with says() as free:
        port = free.port
    starting = asyncio.ensure_future(engine_for(free, load_timeout=60.0).__aenter__())
    await asyncio.sleep(0)
    async with served(FakeVllm(), port):
        engine = await starting
        assert engine.ready
        await engine.close()


async def test_gives_up_one_that_never_answers() -> None:
    async with says() as free:
        pass
    with pytest.raises(EngineDied, match="does not answer"):
        async with engine_for(free, load_timeout=0.0):
            pass


async def test_only_its_own_cache_is_reused() -> None:
    fake, prompt = FakeVllm(), "x" * 64
    async with engine_of(fake) as engine:

        async def cached(scope: bytes | None) -> int:
            (*_, done) = await answer(engine, ask(prompt, scope))
            assert isinstance(done, Done)
            return done.cached_tokens

        assert [await cached(b"a" * 32), await cached(b"a" * 32)] == [0, 48]
        assert [await cached(b"b" * 32), await cached(None), await cached(None)] == [0, 0, 0]
    assert len({body["cache_salt"] for body in fake.completions}) == 4


@pytest.mark.parametrize("owner", ["vllm", "sglang"])
async def test_tokens_and_texts(owner: str) -> None:
    async with engine_of(FakeVllm(owner=owner)) as engine:
        assert await engine.tokenize("hé") == list("hé".encode())
        assert await engine.detokenize([104, 105]) == b"hi"


async def test_markers_stay_text_where_they_are_to(tmp_path: Path) -> None:
    async with engine_of(FakeVllm(), tokenizer=write_folder(tmp_path)) as engine:
        assert await engine.tokenize("a<|im_end|>", parse_special=True) == tokens_of("a<|im_end|>")
        assert await engine.tokenize("a<|im_end|>") == list(b"a<|im_end|>")


async def test_embeddings_are_of_length_one_and_in_order() -> None:
    async with engine_of(FakeVllm(width=3)) as engine:
        assert engine.info.model.embedding == 3
        found = await engine.embed(["a", "bb", "a"])
        vectors = [struct.unpack("<3f", one.vector) for one in found]
        assert vectors[0] == vectors[2] != vectors[1]
        assert all(abs(sum(x * x for x in vector) - 1) < 1e-6 for vector in vectors)
        assert sum(one.tokens for one in found) == 4
        assert (await engine.embed([[97]]))[0].vector == found[0].vector


async def test_many_texts_go_in_several_requests() -> None:
    fake = FakeVllm(width=2)
    async with engine_of(fake) as engine:
        found = await engine.embed([str(at) for at in range(150)])
        assert len(found) == 150
        assert found[149].vector == (await engine.embed(["149"]))[0].vector
    assert max(len(asked.body["input"]) for asked in fake.asked if asked.path == "/v1/embeddings") <= 64


@pytest.mark.parametrize("numbers", [[], [0.0, 0.0], [float("inf"), 1.0], ["1", 2], [True, False], [10**400, 1], None])
async def test_an_embedding_that_is_no_direction_is_refused(numbers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeVllm(width=2)
    async with engine_of(fake) as engine:
        wrong = {"data": [{"index": 0, "embedding": numbers}], "usage": {"prompt_tokens": 1}}
        monkeypatch.setattr(fake, "_embeddings", lambda _body: wrong)
        with pytest.raises((EngineDied, MalformedMessage)):
            await engine.embed(["a"])
