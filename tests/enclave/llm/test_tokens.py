import asyncio
from typing import Any

import httpx2
import pytest
from tests.enclave.llm.conftest import ScriptedEngine, client_of, eventually

from cloister.enclave.llm.api import Api, ApiConfig, create_api
from cloister.enclave.llm.tokens import MAX_TEXT, MAX_WORDS

pytestmark = pytest.mark.anyio


async def test_tokenize_takes_llama_servers_fields(http: httpx2.AsyncClient, engine: ScriptedEngine) -> None:
    assert (await http.post("/tokenize", json={"content": "Hi"})).json() == {"tokens": [72, 105]}
    both = {"text": "Hi", "add_special": True, "parse_special": False}
    assert (await http.post("/tokenize", json=both)).json() == {"tokens": [1, 72, 105]}
    assert engine.tokenized == [("Hi", False, True), ("Hi", True, False)]


async def test_detokenize_never_fails_on_a_split_character(http: httpx2.AsyncClient) -> None:
    assert (await http.post("/detokenize", json={"tokens": [72, 0xC3, 0xA9]})).json() == {"content": "Hé"}
    assert (await http.post("/detokenize", json={"tokens": [72, 0xC3]})).json() == {"content": "H\ufffd"}
    assert (await http.post("/detokenize", json={"tokens": []})).json() == {"content": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "content"),
        ("/tokenize", {"content": 5}, "content"),
        ("/tokenize", {"content": "x", "add_special": 1}, "add_special"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
        ("/detokenize", {"tokens": [2**31]}, "tokens"),
    ],
)
async def test_wrong_bodies_are_400(http: httpx2.AsyncClient, path: str, body: Any, param: str) -> None:
    response = await http.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"content": "é" * (MAX_TEXT // 2) + "x"}),
        ("/detokenize", {"tokens": [7] * (MAX_WORDS + 1)}),
    ],
)
async def test_what_would_hold_up_everybody_is_413(
    http: httpx2.AsyncClient, engine: ScriptedEngine, path: str, body: Any
) -> None:
    response = await http.post(path, json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
    assert not engine.tokenized


@pytest.fixture
def held(engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """The tokenizer answers once this is set; who is inside then is in `running`."""
    free = asyncio.Event()

    async def wait() -> None:
        engine.running += 1
        engine.peak = max(engine.peak, engine.running)
        try:
            await free.wait()
        finally:
            engine.running -= 1

    async def tokenize(_text: str, **_how: bool) -> list[int]:
        await wait()
        return [1]

    async def detokenize(_tokens: Any) -> bytes:
        await wait()
        return b"x"

    monkeypatch.setattr(engine, "tokenize", tokenize)
    monkeypatch.setattr(engine, "detokenize", detokenize)
    return free


ASKS: tuple[tuple[str, Any], ...] = (("/tokenize", {"content": "x"}), ("/detokenize", {"tokens": [1]}))


async def test_few_texts_are_tokenized_at_once_and_the_others_wait(
    http: httpx2.AsyncClient, engine: ScriptedEngine, held: asyncio.Event
) -> None:
    tasks = [asyncio.create_task(http.post(path, json=body)) for path, body in ASKS * 4]
    await eventually(lambda: engine.running == 2)
    held.set()
    assert [(await task).status_code for task in tasks] == [200] * 8
    assert engine.peak == 2


@pytest.mark.parametrize(("path", "body"), ASKS)
async def test_beyond_those_that_may_wait_texts_are_refused(
    engine: ScriptedEngine, held: asyncio.Event, path: str, body: Any
) -> None:
    http = client_of(create_api(engine, ApiConfig(require_keys=False, max_waiting=1, wait_limit=0.01)))
    running = [asyncio.create_task(http.post(path, json=body)) for _ in range(2)]
    await eventually(lambda: engine.running == 2)
    late, refused = await asyncio.gather(*(http.post(path, json=body) for _ in range(2)))
    assert (late.status_code, late.json()["error"]["code"]) == (503, "queue_timeout")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert all("retry-after" in response.headers for response in (late, refused))
    held.set()
    assert [(await task).status_code for task in running] == [200] * 2


async def test_who_leaves_gives_the_turn_at_the_tokenizer_back(
    http: httpx2.AsyncClient, engine: ScriptedEngine, held: asyncio.Event
) -> None:
    leaving = [asyncio.create_task(http.post(path, json=body)) for path, body in ASKS]
    await eventually(lambda: engine.running == 2)
    for task in leaving:
        task.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    await eventually(lambda: engine.running == 0)
    held.set()
    assert (await http.post("/tokenize", json={"content": "x"})).status_code == 200


async def test_answers_do_not_keep_the_tokenizer_waiting(
    http: httpx2.AsyncClient, api: Api, engine: ScriptedEngine
) -> None:
    api.queue.max_waiting = 0
    api.queue.slots = engine.info.slots
    api.queue.admit("other", engine.info.slots)
    assert (await http.post("/tokenize", json={"content": "Hi"})).status_code == 200
