import asyncio
from typing import Any

import httpx2
import pytest
from tests.enclave.llm.conftest import ScriptedEngine, client_of, eventually

from cloister.enclave.llm.api import Api, ApiConfig, create_api
from cloister.enclave.llm.engine import Delta, Done, Started
from cloister.enclave.llm.tenants import ApiKey, new_key

pytestmark = pytest.mark.anyio


def served(engine: ScriptedEngine, max_held: int) -> tuple[Api, dict[str, httpx2.AsyncClient]]:
    keys = {name: new_key() for name in ("ann", "bob")}
    api = create_api(engine, ApiConfig(api_keys=tuple(ApiKey(n, k[1]) for n, k in keys.items()), max_held=max_held))
    return api, {name: client_of(api, authorization=f"Bearer {key[0]}") for name, key in keys.items()}


def ask(http: httpx2.AsyncClient, path: str = "/v1/chat/completions", size: int = 1000) -> "asyncio.Task[Any]":
    body = {"max_tokens": 5, "messages": [{"role": "user", "content": "x" * size}]}
    return asyncio.create_task(http.post(path, json=body))


@pytest.mark.parametrize(
    ("path", "code"), [("/v1/chat/completions", "queue_full"), ("/v1/messages", "rate_limit_error")]
)
async def test_long_requests_are_held_up_to_a_sum_and_each_tenants_first_beyond_it(
    engine: ScriptedEngine, path: str, code: str
) -> None:
    gate = asyncio.Event()
    engine.script = [Started(7, 0), gate, Delta("ok", 1), Done("stop", 7, 1, 0)]
    api, clients = served(engine, max_held=3000)
    held = [ask(clients["ann"], path), ask(clients["ann"], path)]
    await eventually(lambda: engine.running == 2)
    refused = await asyncio.wait_for(ask(clients["ann"], path), 5)
    error = refused.json()["error"]
    assert (refused.status_code, error.get("code") or error["type"]) == (429, code)
    assert int(refused.headers["retry-after"]) >= 1
    held.append(ask(clients["bob"], path))
    await eventually(lambda: engine.running == 3)
    gate.set()
    assert [(await task).status_code for task in held] == [200] * 3
    assert (await ask(clients["ann"], path, size=5000)).status_code == 200
    assert api.queue.running == 0


async def test_what_a_client_that_leaves_had_asked_is_held_no_longer(engine: ScriptedEngine) -> None:
    api, clients = served(engine, max_held=1500)
    engine.script = [Started(7, 0), asyncio.Event()]
    left = ask(clients["ann"])
    await eventually(lambda: engine.running == 1)
    left.cancel()
    await eventually(lambda: engine.running == 0)
    assert not api._service._held


@pytest.mark.parametrize("text", ["x" * 1000, [1] * 250])
async def test_what_is_to_be_embedded_counts_too(engine: ScriptedEngine, text: Any) -> None:
    gate = asyncio.Event()
    engine.script = [Started(7, 0), gate, Done("stop", 7, 0, 0)]
    api, clients = served(engine, max_held=1999)
    held = ask(clients["ann"])
    await eventually(lambda: engine.running == 1)
    body = {"model": "default", "input": text}
    assert (await clients["ann"].post("/v1/embeddings", json=body)).status_code == 429
    assert (await clients["bob"].post("/v1/embeddings", json=body)).status_code == 200
    gate.set()
    assert (await held).status_code == 200
    assert not api._service._held
