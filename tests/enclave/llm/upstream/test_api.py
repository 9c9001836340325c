"""The whole API in front of an upstream: what clients see, and what of their requests arrives there."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.enclave.llm.conftest import client_of, eventually
from tests.enclave.llm.upstream.fake import QUICK, FakeVllm, engine_for, events, served, write_folder

from cloister.enclave.llm.api import Api, ApiConfig, create_api
from cloister.enclave.llm.grammar import Grammar
from cloister.enclave.llm.tenants import ApiKey, new_key

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "What time is it?"}]}
CLOCK: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "clock",
        "parameters": {"type": "object", "properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"]},
    },
}
CALL = '<tool_call>\n{"name": "clock", "arguments": {"zone":"UTC"}}\n</tool_call>'
ALICE, BOB = new_key(), new_key()
KEYS = (ApiKey("alice", ALICE[1]), ApiKey("bob", BOB[1]))


@asynccontextmanager
async def api_over(
    fake: FakeVllm, folder: Path, *, keys: tuple[ApiKey, ...] = (), **options: Any
) -> AsyncIterator[Api]:
    async with (
        served(fake) as upstream,
        engine_for(upstream.address, tokenizer=write_folder(folder), **options) as engine,
    ):
        yield create_api(engine, ApiConfig(api_keys=keys, require_keys=bool(keys), restart_wait=0))


async def post(fake: FakeVllm, folder: Path, path: str, **fields: Any) -> httpx2.Response:
    async with api_over(fake, folder) as api:
        return await client_of(api).post(path, json=fields)


async def test_a_conversation(tmp_path: Path) -> None:
    answer = (await post(FakeVllm(), tmp_path, CHAT, **HELLO)).json()
    assert answer["choices"][0]["message"]["content"] == "Hello"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["model"] == "acme/Toy-7B"


async def test_a_streamed_one_with_its_usage(tmp_path: Path) -> None:
    fake = FakeVllm()
    streamed = await post(fake, tmp_path, CHAT, stream=True, stream_options={"include_usage": True}, **HELLO)
    *chunks, last = events(streamed.content)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "Hello"
    prompt = len(fake.completions[0]["prompt"])
    assert (last["choices"], last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == ([], prompt, 5)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "Once"}),
        ("/v1/responses", {"input": "Hello"}),
        ("/v1/messages", {**HELLO, "max_tokens": 9}),
        ("/generate", {"query": "Hello"}),
    ],
)
async def test_every_route_answers(tmp_path: Path, path: str, fields: dict[str, Any]) -> None:
    answer = await post(FakeVllm(), tmp_path, path, **fields)
    assert answer.status_code == 200
    assert "Hello" in answer.text


async def test_a_forced_call_is_bound_by_a_grammar_and_read(tmp_path: Path) -> None:
    fake = FakeVllm(pieces=(CALL[:20], CALL[20:]))
    answer = (await post(fake, tmp_path, CHAT, tools=[CLOCK], tool_choice="required", **HELLO)).json()
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("clock", {"zone": "UTC"})
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    grammar = Grammar(fake.completions[0]["structured_outputs"]["grammar"])
    assert grammar.after(grammar.start, CALL.encode()) is not None
    assert grammar.after(grammar.start, b"It is noon.") is None
    assert '"name": "clock"' in fake.prompts()[0]


async def test_a_schema_is_bound_by_a_grammar(tmp_path: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    fake = FakeVllm(pieces=('{"ok":true}',))
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = (await post(fake, tmp_path, CHAT, response_format=shape, **HELLO)).json()
    assert json.loads(answer["choices"][0]["message"]["content"]) == {"ok": True}
    assert "structured_outputs" in fake.completions[0]
    assert "response_format" not in fake.completions[0]


async def test_an_upstream_that_keeps_to_no_grammar_is_an_error_and_no_answer(tmp_path: Path) -> None:
    shape = {"type": "json_object"}
    answer = await post(FakeVllm(pieces=("Sure! Here",)), tmp_path, CHAT, response_format=shape, **HELLO)
    assert answer.status_code == 503
    assert "Sure" not in answer.text


async def test_a_hostile_grammar_never_arrives(tmp_path: Path) -> None:
    fake = FakeVllm()
    answer = await post(fake, tmp_path, CHAT, grammar='root ::= "a"{1,99999999}', **HELLO)
    assert answer.status_code == 400
    assert fake.completions == []


async def test_nothing_of_a_request_arrives_but_what_was_understood(tmp_path: Path) -> None:
    fake = FakeVllm()
    fields = {
        **HELLO,
        "cache_salt": "mine",
        "kv_transfer_params": {"do_remote_prefill": True},
        "vllm_xargs": {"x": 1},
        "prompt_logprobs": 1,
        "echo": True,
        "user": "u-123",
        "priority": -5,
        "chat_template": "{{ 1 }}",
        "extra_body": {"lora": "x"},
        "model": "default",
    }
    async with api_over(fake, tmp_path, keys=KEYS) as api:
        headers = {"authorization": f"Bearer {ALICE[0]}", "x-api-key": "k", "cookie": "c=1", "x-request-id": "r-9"}
        assert (await client_of(api, **headers).post(CHAT, json=fields)).status_code == 200
    body = fake.completions[0]
    assert body["model"] == "acme/Toy-7B"
    assert body["cache_salt"] != "mine"
    assert not (fields.keys() - {"messages", "model", "cache_salt"}) & body.keys()
    for asked in fake.asked:
        assert set(asked.headers) <= {"host", "accept-encoding", "connection", "content-type", "content-length"}
        assert ALICE[0] not in json.dumps(asked.body)


async def test_a_remote_image_never_arrives(tmp_path: Path) -> None:
    fake = FakeVllm()
    image = {"type": "image_url", "image_url": {"url": "https://example.org/x.png"}}
    answer = await post(fake, tmp_path, CHAT, messages=[{"role": "user", "content": [image]}])
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "remote_url_refused")
    assert fake.completions == []


async def test_two_principals_share_no_cache_with_one_secret_and_one_none_with_two(tmp_path: Path) -> None:
    fake = FakeVllm()
    long: dict[str, Any] = {"messages": [{"role": "user", "content": "x" * 100}]}

    async def cached(key: str, secret: bytes | None) -> int:
        headers = {"authorization": f"Bearer {key}"}
        if secret is not None:
            headers["cloister-cache-secret"] = base64.urlsafe_b64encode(secret).decode()
        answer = await client_of(api, **headers).post(CHAT, json={**long, "cache_salt": "same"})
        return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    one, two = b"1" * 32, b"2" * 32
    async with api_over(fake, tmp_path, keys=KEYS) as api:
        assert await cached(ALICE[0], one) == 0
        assert await cached(ALICE[0], one) > 90
        assert await cached(BOB[0], one) == 0
        assert await cached(ALICE[0], two) == 0
        assert [await cached(ALICE[0], None), await cached(ALICE[0], None)] == [0, 0]
    assert len({body["cache_salt"] for body in fake.completions}) == 5


async def test_a_client_that_leaves_ends_the_upstreams_work(tmp_path: Path) -> None:
    fake = FakeVllm(pieces=("a", asyncio.Event(), "b"))
    async with api_over(fake, tmp_path) as api:
        async with client_of(api).stream("POST", CHAT, json={**HELLO, "stream": True}) as response:
            assert b"a" in await anext(response.aiter_raw())
            assert fake.running == 1
        await eventually(lambda: fake.left == 1 and fake.running == 0)
        assert (api.metrics.cancelled, api.queue.running) == (1, 0)


async def test_an_upstream_killed_in_the_midst_is_told_in_the_stream(tmp_path: Path) -> None:
    fake = FakeVllm(pieces=("a", None))
    async with api_over(fake, tmp_path, limits=QUICK) as api:
        got = b""
        with pytest.raises(httpx2.RemoteProtocolError):
            async with client_of(api).stream("POST", CHAT, json={**HELLO, "stream": True}) as response:
                async for piece in response.aiter_raw():
                    got += piece
        assert b'"code":"engine_died"' in got
        assert b"[DONE]" not in got
        whole = await client_of(api).post(CHAT, json=HELLO)
        assert (whole.status_code, whole.json()["error"]["code"]) == (503, "engine_died")


async def test_answers_wait_for_their_turn_here_and_not_there(tmp_path: Path) -> None:
    hold = asyncio.Event()
    fake = FakeVllm(pieces=(hold, "a"))
    async with api_over(fake, tmp_path, slots=2) as api:
        asking = [asyncio.ensure_future(client_of(api).post(CHAT, json=HELLO)) for _ in range(5)]
        await eventually(lambda: fake.running == 2)
        assert (api.queue.running, api.queue.waiting) == (2, 3)
        hold.set()
        assert [answer.status_code for answer in await asyncio.gather(*asking)] == [200] * 5
        assert api.metrics.prompt_tokens == 5 * len(fake.completions[0]["prompt"])


async def test_a_prompt_that_is_too_long_is_refused_with_counts(tmp_path: Path) -> None:
    fake = FakeVllm(context=64)
    answer = await post(fake, tmp_path, "/v1/completions", prompt="x" * 100)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert answer.json()["error"]["prompt_tokens"] == 100
    assert fake.completions == []


async def test_counts_tokens_without_an_answer(tmp_path: Path) -> None:
    fake = FakeVllm()
    async with api_over(fake, tmp_path) as api:
        counted = await client_of(api).post("/v1/messages/count_tokens", json=HELLO)
        assert fake.completions == []
        await client_of(api).post(CHAT, json=HELLO)
    assert counted.json() == {"input_tokens": len(fake.completions[0]["prompt"])}


async def test_embeddings(tmp_path: Path) -> None:
    answer = (await post(FakeVllm(width=4), tmp_path, "/v1/embeddings", input=["a", "b"])).json()
    assert [len(entry["embedding"]) for entry in answer["data"]] == [4, 4]
    assert answer["usage"] == {"prompt_tokens": 2, "total_tokens": 2}


async def test_no_embeddings_of_a_model_that_gives_none(tmp_path: Path) -> None:
    answer = await post(FakeVllm(), tmp_path, "/v1/embeddings", input="a")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_model")
