import asyncio
import ctypes
import mmap
import queue
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tests.enclave.llm.conftest import client_of
from tests.enclave.llm.llama.random_encoder import WIDTH, encoded, words, write_encoder
from tests.enclave.llm.llama.random_model import write_model
from tests.enclave.llm.llama.serving import ask, serve

from cloister.enclave.llm.api import ApiConfig, create_api
from cloister.enclave.llm.engine import Embedded
from cloister.enclave.llm.llama import LoopSettings, wire
from cloister.enclave.llm.llama.child import BEAT_SIZE, Service, _Desk, read_beat
from cloister.enclave.llm.llama.embedding import is_pooled, unit
from cloister.enclave.llm.llama.loop import DecodeLoop
from cloister.enclave.llm.llama.model import AbortedError, Model
from cloister.enclave.llm.llama.prepare import Preparer
from cloister.errors import ContextLengthExceeded, MalformedModel, WrongUse

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Mapping[str, Any]]:
    path = tmp_path_factory.mktemp("models") / "encoder.gguf"
    return path, write_encoder(path)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that continues texts by its make, and was taught to give embeddings: the last token's state."""
    path = tmp_path_factory.mktemp("models") / "decoder.gguf"
    return write_model(path, pooling=gguf.PoolingType.LAST, context=128)


def vector(embedded: Embedded) -> Any:
    return np.frombuffer(embedded.vector, "<f4")


@pytest.mark.parametrize(
    ("meta", "pooled"),
    [
        ({"x.pooling_type": "1"}, True),
        ({"x.pooling_type": "2", "x.attention.causal": "false"}, True),
        ({"x.pooling_type": "3"}, True),
        ({"x.pooling_type": "0"}, False),
        ({}, False),
        ({"y.pooling_type": "1"}, False),
    ],
)
def test_knows_what_a_model_is_made_for(meta: dict[str, str], pooled: bool) -> None:
    assert is_pooled(lambda key: meta.get(key, ""), "x") is pooled


@pytest.mark.parametrize("meta", [{"x.pooling_type": "4"}, {"x.pooling_type": "9"}, {"x.attention.causal": "false"}])
def test_refuses_a_model_that_is_for_neither(meta: dict[str, str]) -> None:
    with pytest.raises(MalformedModel, match="embeddings"):
        is_pooled(lambda key: meta.get(key, ""), "x")


@pytest.mark.parametrize("values", [[0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]])
def test_what_has_no_direction_is_no_embedding(values: list[float]) -> None:
    with pytest.raises(MalformedModel):
        unit(np.array(values, np.float32))


def test_refuses_an_encoder_without_a_pooling(library: Any, tmp_path: Path) -> None:
    write_encoder(tmp_path / "m.gguf", pooling=None)
    with pytest.raises(MalformedModel, match="embeddings"):
        Model(library, tmp_path / "m.gguf", LoopSettings())


@pytest.mark.parametrize("text", ["a", "hello world", "the same again and once more the same"])
async def test_computes_what_the_weights_say(encoder: tuple[Path, Mapping[str, Any]], text: str) -> None:
    path, weights = encoder
    async with serve(path) as engine:
        (found,) = await engine.embed([text])
    assert found.tokens == len(words(text))
    assert vector(found).shape == (WIDTH,)
    assert np.allclose(vector(found), encoded(weights, words(text)), atol=2e-3)
    assert abs(np.linalg.norm(vector(found)) - 1) < 1e-5


async def test_many_are_as_each_alone_and_in_their_order(encoder: tuple[Path, Mapping[str, Any]]) -> None:
    texts = ["one", "two", "one", "three is longer"]
    async with serve(encoder[0]) as engine:
        found = await engine.embed(texts)
        alone = [(await engine.embed([text]))[0] for text in texts]
        at_once = await asyncio.gather(*(engine.embed([text]) for text in texts))
        tokens = await engine.embed([words(text) for text in texts])
    assert found == alone == [one for (one,) in at_once] == tokens
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
async def test_says_what_it_is(encoder: tuple[Path, Mapping[str, Any]], decoder: Path, kind: str) -> None:
    async with serve(encoder[0] if kind == "encoder" else decoder) as engine:
        model = engine.info.model
    assert model.embedding == (WIDTH if kind == "encoder" else 64)
    assert (model.generates, model.has_chat_template) == (False, False)


async def test_a_decoder_with_a_pooling_gives_them_too(decoder: Path) -> None:
    async with serve(decoder) as engine:
        one, other, again = await engine.embed(["first", "second", "first"])
    assert one == again != other
    assert abs(np.linalg.norm(vector(one)) - 1) < 1e-5


async def test_a_text_that_is_too_long_is_refused_and_harms_nobody(encoder: tuple[Path, Mapping[str, Any]]) -> None:
    async with serve(encoder[0]) as engine:
        with pytest.raises(ContextLengthExceeded) as refused:
            await engine.embed(["a " * 63])
        assert (refused.value.limit, refused.value.prompt) == (64, 65)
        assert len(await engine.embed(["a " * 62])) == 1


async def test_refuses_tokens_that_are_none(encoder: tuple[Path, Mapping[str, Any]]) -> None:
    async with serve(encoder[0]) as engine:
        with pytest.raises(WrongUse, match="vocabulary"):
            await engine.embed([[10_000]])
        with pytest.raises(WrongUse, match="empty"):
            await engine.embed([[]])


async def test_a_model_that_continues_texts_gives_none(model_path: Path) -> None:
    async with serve(model_path) as engine:
        with pytest.raises(WrongUse, match="no embeddings"):
            await engine.embed(["a"])
        assert [event async for event in engine.generate(ask("x", max_tokens=2))]


def test_nothing_of_a_text_stays_in_the_cache(library: Any, decoder: Path) -> None:
    model = Model(library, decoder, LoopSettings())
    loop = DecodeLoop(library, model, slots=1)

    def used() -> bool:
        return any(any(ctypes.string_at(region.address, region.size)) for region in model._cache)

    assert model._cache
    assert not used()
    loop.embed(model.tokenize("a secret"))
    assert used()
    assert loop.rest(forget=False)
    assert not used()
    model.close()


def test_a_text_that_was_given_up_changes_nothing_of_the_next(
    library: Any, decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(library, decoder, LoopSettings())
    decode, text = Model.decode, model.tokenize("the next text")
    expected = model.embed(text)

    def given_up(self: Model, items: Any) -> None:
        decode(self, items)
        raise AbortedError

    with monkeypatch.context() as patch:
        patch.setattr(Model, "decode", given_up)
        with pytest.raises(AbortedError):
            model.embed(model.tokenize("one whose client is gone"))
    assert np.array_equal(model.embed(text), expected)
    model.close()


def test_a_long_computation_gives_signs_of_life_for_a_while_only() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, mmap.mmap(-1, BEAT_SIZE) as beat:
        service = Service(theirs, -1, beat, LoopSettings())

        def beats_on(count: int) -> bool:
            end, before = time.monotonic() + 60, read_beat(beat)
            while time.monotonic() < end and read_beat(beat) < before + count:
                if not any(thread.name == "engine-beat" for thread in threading.enumerate()):
                    return False
            return True

        with service.alive_for(60.0, every=0.001):
            assert beats_on(3)
        assert not beats_on(1)
        with service.alive_for(0.01, every=0.001):
            assert not beats_on(100_000)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("harm", ["aborted", "not finite"])
def test_a_computation_that_came_to_nothing_leaves_the_next_one_as_it_was(
    library: Any,
    encoder: tuple[Path, Mapping[str, Any]],
    decoder: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    harm: str,
) -> None:
    model = Model(library, encoder[0] if kind == "encoder" else decoder, LoopSettings())
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    decode = Model.decode
    ends: list[str] = []

    def cancelled_meanwhile(self: Model, items: Any) -> None:
        if harm == "aborted" and not ends:
            desk._receive({"t": "cancel", "id": 2})
        try:
            decode(self, items)
        except AbortedError:
            ends.append("aborted")
            raise

    def no_direction(values: Any) -> Any:
        if harm == "not finite" and not ends:
            ends.append("not finite")
            return unit(values * np.float32(np.nan))
        return unit(values)

    ours, theirs = socket.socketpair()
    with ours, theirs, mmap.mmap(-1, BEAT_SIZE) as beat:
        desk = _Desk(
            Service(theirs, -1, beat, LoopSettings()),
            DecodeLoop(library, model, slots=1),
            Preparer(model),
            model,
            inbox,
        )
        for number, text in ((1, "the same"), (2, "another one"), (3, "the same")):
            desk._receive({"t": "embed", "id": number, "text": text})
        desk._orders.put(None)
        desk.prepare()
        inbox.get()()
        monkeypatch.setattr(Model, "decode", cancelled_meanwhile)
        monkeypatch.setattr("cloister.enclave.llm.llama.model.unit", no_direction)
        while (work := inbox.get()) is not None:
            work()
        answers = {message["id"]: message for message in wire.FrameReader(wire.MAX_EVENT).feed(ours.recv(1 << 20))}
    model.close()
    assert ends == [harm]
    assert answers[1]["value"] == answers[3]["value"]
    if harm == "aborted":
        assert 2 not in answers
    else:
        assert answers[2]["error"][0] == "model"


async def test_who_leaves_says_so_once_and_who_was_answered_does_not(
    encoder: tuple[Path, Mapping[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve(encoder[0]) as engine:
        link = engine._link
        assert link is not None
        sent: list[dict[str, Any]] = []
        send = link.send

        def noting(message: dict[str, Any]) -> None:
            sent.append(message)
            send(message)

        monkeypatch.setattr(link, "send", noting)
        expected = await engine.embed(["stays"])
        leaving = asyncio.create_task(engine.embed(["leaves", "never asked"]))
        await asyncio.sleep(0)
        assert len(sent) == 2
        leaving.cancel()
        await asyncio.wait([leaving])
        assert leaving.cancelled()
        assert await engine.embed(["stays"]) == expected
        assert [message["t"] for message in sent] == ["embed", "embed", "cancel", "embed"]
        assert sent[2]["id"] == sent[1]["id"]
        assert link.replies == {}


async def test_through_the_api(encoder: tuple[Path, Mapping[str, Any]]) -> None:
    async with serve(encoder[0]) as engine:
        http = client_of(create_api(engine, ApiConfig(require_keys=False)))
        answer = (await http.post("/v1/embeddings", json={"input": ["hello", "world"]})).json()
        assert np.allclose(answer["data"][0]["embedding"], encoded(encoder[1], words("hello")), atol=2e-3)
        assert answer["usage"]["prompt_tokens"] == len(words("hello")) + len(words("world"))
        refused = await http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
        assert refused.status_code == 400
        assert (await http.post("/v1/completions", json={"prompt": "a"})).status_code == 400
        assert (await http.get("/health")).status_code == 200
