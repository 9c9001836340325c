import base64
import struct
from dataclasses import replace
from typing import Any

import httpx2
import openai
import pytest
from tests.enclave.llm.conftest import INFO, MODEL, ScriptedEngine

from cloister.enclave.llm.api import Api
from cloister.enclave.llm.embeddings import EmbeddingsAsk, parse_embeddings
from cloister.enclave.llm.engine import Embedded
from cloister.enclave.llm.envelope import Refused
from cloister.enclave.llm.fields import Fields
from cloister.errors import ContextLengthExceeded, MalformedModel

pytestmark = pytest.mark.anyio

PATH = "/v1/embeddings"


@pytest.fixture
def embedder(engine: ScriptedEngine) -> ScriptedEngine:
    model = replace(MODEL, generates=False, has_chat_template=False)
    engine.model = replace(INFO, model=model)
    return engine


@pytest.mark.parametrize(
    ("value", "inputs"),
    [("a", ("a",)), (["a", "b"], ("a", "b")), ([1, 2], ((1, 2),)), ([[1], [2, 3]], ((1,), (2, 3)))],
)
def test_takes_texts_and_tokens(value: Any, inputs: Any) -> None:
    assert parse_embeddings(Fields({"input": value})) == EmbeddingsAsk(None, inputs)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"input": []},
        {"input": ""},
        {"input": ["a", ""]},
        {"input": [[1], []]},
        {"input": 5},
        {"input": [None]},
        {"input": [{}]},
        {"input": ["a", [1]]},
        {"input": ["a", 1]},
        {"input": [1, "a"]},
        {"input": [-1]},
        {"input": [True]},
        {"input": [[1.5]]},
        {"input": ["a"] * 2049},
        {"input": "a", "encoding_format": "int8"},
        {"input": "a", "encoding_format": 1},
        {"input": "a", "dimensions": 0},
        {"input": "a", "dimensions": "2"},
        {"input": "a", "model": 1},
    ],
)
def test_refuses_what_is_none(fields: dict[str, Any]) -> None:
    with pytest.raises(Refused) as refused:
        parse_embeddings(Fields(fields))
    assert refused.value.status == 400


async def test_gives_one_for_each_text_in_their_order(http: httpx2.AsyncClient, embedder: ScriptedEngine) -> None:
    answer = (await http.post(PATH, json={"input": ["ab", "c"], "model": "default"})).json()
    assert answer == {
        "object": "list",
        "model": "acme/toy",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [2.0, 0.5]},
            {"object": "embedding", "index": 1, "embedding": [1.0, 0.5]},
        ],
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
    }


async def test_numbers_may_come_packed(http: httpx2.AsyncClient, embedder: ScriptedEngine) -> None:
    answer = (await http.post(PATH, json={"input": "ab", "encoding_format": "base64"})).json()
    assert struct.unpack("<2f", base64.b64decode(answer["data"][0]["embedding"])) == (2.0, 0.5)


async def test_openais_own_client_reads_them(sdk: openai.AsyncOpenAI, embedder: ScriptedEngine) -> None:
    answer = await sdk.embeddings.create(model="default", input=["ab", "c"])
    assert [entry.embedding for entry in answer.data] == [[2.0, 0.5], [1.0, 0.5]]


@pytest.mark.parametrize(("dimensions", "status"), [(2, 200), (1, 400), (3, 400)])
async def test_dimensions_are_the_models_or_refused(
    http: httpx2.AsyncClient, embedder: ScriptedEngine, dimensions: int, status: int
) -> None:
    answer = await http.post(PATH, json={"input": "a", "dimensions": dimensions})
    assert answer.status_code == status
    if status == 400:
        assert (answer.json()["error"]["param"], "2 dimensions" in answer.text) == ("dimensions", True)


async def test_a_model_that_continues_texts_gives_none(http: httpx2.AsyncClient, engine: ScriptedEngine) -> None:
    engine.model = replace(INFO, model=replace(MODEL, embedding=0))
    refused = await http.post(PATH, json={"input": "a"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported_model")
    assert "no embeddings" in refused.text


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", {"prompt": "a"}), ("/generate", {"query": "a"})])
async def test_a_model_that_gives_them_continues_none(
    http: httpx2.AsyncClient, embedder: ScriptedEngine, path: str, body: dict[str, Any]
) -> None:
    refused = await http.post(path, json={**body, "template": False})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported_model")
    assert embedder.requests == []


async def test_a_text_that_is_too_long_is_counted(http: httpx2.AsyncClient, embedder: ScriptedEngine) -> None:
    embedder.failure = ContextLengthExceeded(limit=8, prompt=9, requested=9)
    refused = await http.post(PATH, json={"input": "a"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input")
    assert refused.json()["error"]["code"] == "context_length_exceeded"


async def test_a_text_without_a_direction_is_the_models_failure(
    http: httpx2.AsyncClient, api: Api, embedder: ScriptedEngine
) -> None:
    embedder.failure = MalformedModel("no finite embedding")
    refused = await http.post(PATH, json={"input": "a"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (500, "model_failed")
    assert "template" not in refused.text
    assert api.queue.running == 0


async def test_takes_a_place_in_the_queue_and_is_counted(
    http: httpx2.AsyncClient, api: Api, embedder: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, embed = [], embedder.embed

    async def watched(inputs: Any) -> list[Embedded]:
        running.append(api.queue.running)
        return await embed(inputs)

    monkeypatch.setattr(embedder, "embed", watched)
    await http.post(PATH, json={"input": ["ab", "c"]})
    assert (running, api.queue.running, api.metrics.prompt_tokens) == ([1], 0, 3)
    api.queue.max_waiting = 0
    held = api.queue.admit("other", embedder.info.slots)
    assert (await http.post(PATH, json={"input": "a"})).status_code == 429
    for ticket in held:
        ticket.release()
    assert (await http.post(PATH, json={"input": "a"})).status_code == 200
