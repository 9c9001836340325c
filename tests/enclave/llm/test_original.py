import asyncio
import json
from base64 import b64encode, urlsafe_b64encode
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from tests.enclave.llm.conftest import ScriptedEngine, says

from cloister.enclave.llm.engine import Delta, Done, Prompt, Started

pytestmark = pytest.mark.anyio

TEXTS = ["Hé", "", 'l"\n', "日😀"]
FRAMES = (
    b'id: 1\nevent: data\ndata: "H\\u00e9"\n\n'
    b'id: 2\nevent: data\ndata: "l\\"\\n"\n\n'
    b'id: 3\nevent: data\ndata: "\\u65e5\\ud83d\\ude00"\n\n'
    b"id: 4\nevent: end\ndata: {}\n\n"
)


async def test_health_is_200_only_when_the_model_can_answer(http: httpx2.AsyncClient, engine: ScriptedEngine) -> None:
    assert (await http.get("/health")).status_code == 200
    engine.ready = False
    assert (await http.get("/health")).status_code == 503
    engine.loaded = False
    assert (await http.get("/health")).status_code == 503


async def test_generate_answers_the_query(http: httpx2.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = says("Hé", "llo")
    response = await http.post("/generate", json={"query": "Hi", "max_tokens": 9, "seed": 3})
    assert response.json() == {"response": "Héllo"}
    request = engine.requests[0]
    assert request.prompt == Prompt(messages=({"role": "user", "content": "Hi"},))
    assert (request.sampling.max_tokens, request.sampling.seed) == (9, 3)
    assert request.truncate_prompt
    assert request.scope is None


async def test_generate_leaves_the_template_off_when_asked_or_absent(
    http: httpx2.AsyncClient, engine: ScriptedEngine
) -> None:
    await http.post("/generate", json={"query": "Hi", "template": False})
    engine.without_template()
    await http.post("/generate", json={"query": "Hi"})
    assert [request.prompt for request in engine.requests] == [Prompt(text="Hi")] * 2
    assert engine.requests[0].sampling.max_tokens == 256


async def test_a_small_context_keeps_room_for_the_question(http: httpx2.AsyncClient, engine: ScriptedEngine) -> None:
    engine.model = replace(engine.model, model=replace(engine.model.model, context_length=128))
    await http.post("/generate", json={"query": "Hi"})
    await http.get("/generate", params={"prompt": "SGk="})
    assert [request.sampling.max_tokens for request in engine.requests] == [32, 32]


@pytest.mark.parametrize("body", [{}, {"query": ""}, {"query": None}, {"query": 5}, {"prompt": "x"}])
async def test_a_missing_query_is_400(http: httpx2.AsyncClient, body: Any) -> None:
    response = await http.post("/generate", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "query")


async def test_the_stream_has_the_originals_frames(http: httpx2.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = says(*TEXTS)
    by_query = await http.get("/generate", params={"prompt": b64encode("Grüß dich?".encode()).decode()})
    by_post = await http.post("/generate", json={"query": "Grüß dich?"}, headers={"accept": "text/event-stream"})
    for response in (by_query, by_post):
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.content == FRAMES
    assert [request.prompt.messages for request in engine.requests] == [
        ({"role": "user", "content": "Grüß dich?"},)
    ] * 2


async def test_an_empty_answer_is_just_an_end(http: httpx2.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = says()
    assert (await http.get("/generate?prompt=SGk=")).content == b"id: 1\nevent: end\ndata: {}\n\n"


@pytest.mark.parametrize("text", ["???>>>", "Hi", "ü", "日本語"])
async def test_every_spelling_of_base64_is_read(http: httpx2.AsyncClient, engine: ScriptedEngine, text: str) -> None:
    standard = b64encode(text.encode()).decode()
    spellings = [standard, standard.rstrip("="), urlsafe_b64encode(text.encode()).decode()]
    for spelling in spellings:
        assert (await http.get(f"/generate?prompt={spelling}")).status_code == 200
        assert (await http.get("/generate", params={"prompt": spelling})).status_code == 200
    assert {json.dumps(request.prompt.messages) for request in engine.requests} == {
        json.dumps([{"role": "user", "content": text}])
    }


@pytest.mark.parametrize(
    "query",
    [
        "",
        "?prompt=",
        "?prompt=%21%21",
        "?prompt=A",
        "?prompt=/w==",
        "?prompt=7aCA",
        "?prompt=SGk=&prompt=SGk=",
        "?x=1",
        f"?{'a=1&' * 50}prompt=SGk=",
    ],
)
async def test_bad_base64_bad_utf8_and_no_prompt_are_400(
    http: httpx2.AsyncClient, engine: ScriptedEngine, query: str
) -> None:
    response = await http.get(f"/generate{query}")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
    assert engine.requests == []


async def test_a_truncated_prompt_is_said(http: httpx2.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = [Started(4000, 0, truncated=123), Delta("ok", 1), Done("stop", 4000, 1, 0)]
    streamed = await http.get("/generate?prompt=SGk=")
    whole = await http.post("/generate", json={"query": "Hi"})
    assert streamed.content == (
        b'event: truncated\ndata: {"dropped_tokens":123}\n\n'
        b'id: 1\nevent: data\ndata: "ok"\n\n'
        b"id: 2\nevent: end\ndata: {}\n\n"
    )
    assert whole.json() == {"response": "ok", "dropped_tokens": 123}


async def test_leaving_stops_the_generation(http: httpx2.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = [Started(1, 0), Delta("a", 1), asyncio.Event()]
    async with http.stream("GET", "/generate?prompt=SGk=") as response:
        await anext(response.aiter_bytes())
        assert engine.running == 1
    assert engine.running == 0
