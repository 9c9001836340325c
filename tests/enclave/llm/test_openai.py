import asyncio
import hashlib
import json
import traceback
from typing import Any

import httpx2
import openai
import pytest
from tests.enclave.llm.conftest import INFO, ScriptedEngine, client_of, eventually, says, sdk_of

from cloister.enclave.llm.api import Api, ApiConfig, create_api
from cloister.enclave.llm.engine import Delta, Done, Prompt, Started, TokenLogprob
from cloister.enclave.llm.tenants import ApiKey, new_key
from cloister.errors import ContextLengthExceeded, EngineDied, MalformedModel

pytestmark = pytest.mark.anyio

HELLO: list[Any] = [{"role": "user", "content": "Hi"}]
CHAT = {"model": "default", "messages": HELLO}


def events_of(body: bytes) -> list[Any]:
    blocks = body.decode("ascii").split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert blocks.pop() == "data: [DONE]"
    return [json.loads(block[6:]) for block in blocks]


async def test_chat_answers_with_text_finish_reason_and_usage(sdk: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    engine.script = says("Hel", "lo", prompt=7, cached=5, reason="length")
    answer = await sdk.chat.completions.create(model="acme/toy", messages=HELLO)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == "acme/toy"
    assert answer.system_fingerprint is not None
    assert answer.system_fingerprint.startswith("fp_")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "Hello"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (7, 2, 9)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 5


async def test_fingerprint_follows_the_digests(http: httpx2.AsyncClient) -> None:
    answer = (await http.post("/v1/chat/completions", json=CHAT)).json()
    expected = hashlib.sha256(f"{INFO.sha256} {INFO.variant} {INFO.model.sha256}".encode()).hexdigest()[:10]
    assert answer["system_fingerprint"] == f"fp_{expected}"


async def test_streamed_chat_has_role_first_deltas_and_finish_reason_last(http: httpx2.AsyncClient) -> None:
    response = await http.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    chunks = events_of(response.content)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "Hel"},
        {"content": "lo"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["system_fingerprint"]) for chunk in chunks}) == 1
    assert not any("usage" in chunk for chunk in chunks)


async def test_usage_comes_in_a_final_chunk_without_choices_only_when_asked(sdk: openai.AsyncOpenAI) -> None:
    stream = await sdk.chat.completions.create(
        model="default", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert [bool(chunk.choices) for chunk in chunks] == [True] * 4 + [False]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 9


@pytest.mark.parametrize("text", ["żółć 日本語 🜁", 'quote " back\\slash', "\x00\n\r\u0085\u2028", "</script>"])
async def test_any_text_survives_streamed_and_whole(sdk: openai.AsyncOpenAI, engine: ScriptedEngine, text: str) -> None:
    engine.script = says(*text)
    whole = await sdk.chat.completions.create(model="default", messages=HELLO)
    stream = await sdk.chat.completions.create(model="default", messages=HELLO, stream=True)
    assert whole.choices[0].message.content == text
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == text


async def test_sampling_fields_reach_the_engine(sdk: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    await sdk.chat.completions.create(
        model="default",
        messages=HELLO,
        max_tokens=5,
        max_completion_tokens=6,
        temperature=0.5,
        top_p=0.9,
        seed=-1,
        stop="END",
        presence_penalty=0.1,
        frequency_penalty=0.2,
        logit_bias={"15": -100},
        extra_body={"top_k": 40, "min_p": 0.05, "repeat_penalty": 1.1, "unknown": {"field": 1}},
    )
    sampling = engine.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (6, 0.5, 0.9, 40)
    assert (sampling.min_p, sampling.seed, sampling.stop) == (0.05, 2**32 - 1, ("END",))
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repeat_penalty) == (0.1, 0.2, 1.1)
    assert sampling.logit_bias == {15: -100.0}
    assert sampling.logprobs is None
    assert not sampling.ignore_eos


async def test_n_answers_are_kept_apart_and_seeded_apart(sdk: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    engine.scripts = [says("a", "b"), says("c"), says("d", "e", "f")]
    answer = await sdk.chat.completions.create(model="default", messages=HELLO, n=3, seed=41)
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [(0, "ab"), (1, "c"), (2, "def")]
    assert sorted(request.sampling.seed or 0 for request in engine.requests) == [41, 42, 43]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 6)


async def test_n_streams_interleave_and_each_ends(sdk: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    engine.scripts = [says("a", "b", "c"), says("x", reason="length")]
    texts: dict[int, str] = {0: "", 1: ""}
    ends: dict[int, str] = {}
    stream = await sdk.chat.completions.create(model="default", messages=HELLO, n=2, stream=True)
    async for chunk in stream:
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    assert texts == {0: "abc", 1: "x"}
    assert ends == {0: "stop", 1: "length"}


async def test_more_answers_than_slots_take_turns(sdk: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    answer = await sdk.chat.completions.create(model="default", messages=HELLO, n=8)
    assert [choice.message.content for choice in answer.choices] == ["Hello"] * 8
    assert engine.peak == INFO.slots


def logprob_script() -> list[Any]:
    hi = TokenLogprob(5, b"Hi", -0.5, (TokenLogprob(5, b"Hi", -0.5), TokenLogprob(6, b"Yo", float("-inf"))))
    first = TokenLogprob(7, b"\xf0\x9f", -1.0, (TokenLogprob(7, b"\xf0\x9f", -1.0),))
    second = TokenLogprob(8, b"\x98\x80", -2.0, (TokenLogprob(8, b"\x98\x80", -2.0),))
    deltas = [Delta("Hi", 1, (hi,)), Delta("", 1, (first,)), Delta("😀", 1, (second,))]
    return [Started(3, 0), *deltas, Done("stop", 3, 3, 0)]


async def test_chat_logprobs(sdk: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    engine.script = logprob_script()
    answer = await sdk.chat.completions.create(model="default", messages=HELLO, logprobs=True, top_logprobs=2)
    assert engine.requests[0].sampling.logprobs == 2
    assert answer.choices[0].logprobs is not None
    tokens = answer.choices[0].logprobs.content or []
    assert [token.token for token in tokens] == ["Hi", "bytes:\\xf0\\x9f", "bytes:\\x98\\x80"]
    assert [token.bytes for token in tokens] == [[72, 105], [0xF0, 0x9F], [0x98, 0x80]]
    assert [(top.token, top.logprob) for top in tokens[0].top_logprobs] == [("Hi", -0.5), ("Yo", -9999.0)]


async def test_streamed_chat_logprobs_lose_no_token(sdk: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    engine.script = logprob_script()
    stream = await sdk.chat.completions.create(model="default", messages=HELLO, logprobs=True, stream=True)
    seen: list[int] = []
    async for chunk in stream:
        if chunk.choices[0].logprobs:
            for token in chunk.choices[0].logprobs.content or []:
                seen += token.bytes or []
    assert bytes(seen).decode() == "Hi😀"
    assert engine.requests[0].sampling.logprobs == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_logprobs_have_character_offsets(
    http: httpx2.AsyncClient, engine: ScriptedEngine, stream: bool
) -> None:
    engine.script = logprob_script()
    response = await http.post("/v1/completions", json={"prompt": "x", "logprobs": 2, "stream": stream})
    parts = events_of(response.content) if stream else [response.json()]
    found = [part["choices"][0]["logprobs"] for part in parts if part["choices"][0]["logprobs"]]
    assert [offset for part in found for offset in part["text_offset"]] == [0, 2, 2]
    assert [token for part in found for token in part["tokens"]] == ["Hi", "bytes:\\xf0\\x9f", "bytes:\\x98\\x80"]
    assert found[0]["top_logprobs"][0] == {"Hi": -0.5, "Yo": -9999.0}
    assert [value for part in found for value in part["token_logprobs"]] == [-0.5, -1.0, -2.0]


async def test_completions_take_text_and_tokens_and_several(sdk: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    one = await sdk.completions.create(model="default", prompt="Once")
    tokens = await sdk.completions.create(model="default", prompt=[1, 2, 3], max_tokens=3)
    many = await sdk.completions.create(model="default", prompt=["a", "b"], n=2)
    assert one.choices[0].text == "Hello"
    assert one.id.startswith("cmpl-")
    assert one.object == "text_completion"
    assert tokens.choices[0].finish_reason == "stop"
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert many.usage is not None
    assert many.usage.prompt_tokens == 14
    prompts = [request.prompt for request in engine.requests]
    assert prompts[:2] == [Prompt(text="Once"), Prompt(tokens=(1, 2, 3))]
    assert prompts[2:] == [Prompt(text="a"), Prompt(text="a"), Prompt(text="b"), Prompt(text="b")]
    assert [engine.requests[0].sampling.max_tokens, engine.requests[1].sampling.max_tokens] == [16, 3]


async def test_streamed_completion(sdk: openai.AsyncOpenAI) -> None:
    stream = await sdk.completions.create(
        model="default", prompt="x", stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert [chunk.choices[0].text for chunk in chunks[:-1]] == ["Hel", "lo", ""]
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None


async def test_messages_reach_the_engine_as_the_template_reads_them(
    sdk: openai.AsyncOpenAI, engine: ScriptedEngine
) -> None:
    messages: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "name": "ann", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "tool_call_id": "t1", "content": "42"},
    ]
    await sdk.chat.completions.create(model="default", messages=messages)
    assert engine.requests[0].prompt.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "name": "ann", "content": "a\nb"},
        {"role": "assistant", "content": "", "tool_calls": []},
        {"role": "tool", "tool_call_id": "t1", "content": "42"},
    )


async def test_context_length_exceeded_tells_counts(sdk: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    engine.script = [ContextLengthExceeded(limit=4096, prompt=5000, requested=5100)]
    with pytest.raises(openai.BadRequestError) as caught:
        await sdk.chat.completions.create(model="default", messages=HELLO, stream=True)
    assert caught.value.code == "context_length_exceeded"
    assert isinstance(caught.value.body, dict)
    assert {name: caught.value.body[name] for name in ("limit", "prompt_tokens", "requested_tokens")} == {
        "limit": 4096,
        "prompt_tokens": 5000,
        "requested_tokens": 5100,
    }


async def test_typed_errors_of_the_sdk(engine: ScriptedEngine, sdk: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await sdk.chat.completions.create(model="gpt-4o", messages=HELLO)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        await sdk.chat.completions.create(model="default", messages=HELLO, temperature=9)
    assert (bad.value.code, bad.value.param) == ("invalid_value", "temperature")
    keyed = create_api(engine, ApiConfig(api_keys=(ApiKey("ann", new_key()[1]),)))
    with pytest.raises(openai.AuthenticationError) as unknown:
        await sdk_of(keyed, "ck-wrong").chat.completions.create(model="default", messages=HELLO)
    assert unknown.value.code == "invalid_api_key"
    engine.script = [asyncio.Event()]
    full = create_api(engine, ApiConfig(require_keys=False, max_waiting=0))
    busy = [
        asyncio.create_task(sdk_of(full).chat.completions.create(model="default", messages=HELLO)) for _ in range(4)
    ]
    await eventually(lambda: engine.running == 4)
    with pytest.raises(openai.RateLimitError) as crowded:
        await sdk_of(full).chat.completions.create(model="default", messages=HELLO)
    assert crowded.value.code == "queue_full"
    assert crowded.value.response.headers["retry-after"] == "1"
    for task in busy:
        task.cancel()
    await asyncio.gather(*busy, return_exceptions=True)
    await eventually(lambda: engine.running == 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_dead_engine_before_the_first_token_is_503(
    sdk: openai.AsyncOpenAI, engine: ScriptedEngine, stream: bool
) -> None:
    engine.script = [Started(7, 0), EngineDied("killed")]
    with pytest.raises(openai.InternalServerError) as caught:
        await sdk.chat.completions.create(model="default", messages=HELLO, stream=stream)
    assert (caught.value.status_code, caught.value.code) == (503, "engine_died")
    assert "retry-after" in caught.value.response.headers


async def test_a_chat_template_that_fails_is_told_without_its_words(
    http: httpx2.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.script = [MalformedModel("template said: CANARY")]
    response = await http.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "chat_template_failed"
    assert "CANARY" not in response.text


async def test_a_model_that_fails_while_it_answers_is_500(http: httpx2.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = [Started(7, 0), MalformedModel("no finite numbers")]
    response = await http.post("/v1/chat/completions", json=CHAT)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "model_failed")


async def test_a_model_without_template_refuses_chat(http: httpx2.AsyncClient, engine: ScriptedEngine) -> None:
    engine.without_template()
    response = await http.post("/v1/chat/completions", json=CHAT)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "no_chat_template")


BUG: list[Any] = [Started(7, 0), Delta("Half", 1), ValueError("CANARY")]
DIES: list[list[Any]] = [
    [Started(7, 0), Delta("Half", 1), EngineDied("killed")],
    BUG,
    [Started(7, 0), Delta("Half", 1)],
]


@pytest.mark.parametrize("script", DIES, ids=["died", "bug", "no-end"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/generate"])
async def test_a_stream_that_breaks_tells_so_and_never_ends_cleanly(
    http: httpx2.AsyncClient, engine: ScriptedEngine, api: Api, script: list[Any], path: str
) -> None:
    engine.script = script
    body = {**CHAT, "prompt": "x", "query": "x", "stream": True}
    seen = b""
    with pytest.raises(httpx2.RemoteProtocolError) as caught:
        async with http.stream("POST", path, json=body, headers={"accept": "text/event-stream"}) as response:
            async for chunk in response.aiter_bytes():
                seen += chunk
    assert isinstance(caught.value.__cause__, EngineDied)
    assert "CANARY" not in "".join(traceback.format_exception(caught.value.__cause__))
    last = seen.decode().removesuffix("\n\n").rsplit("\n\n", 1)[1]
    assert last.startswith("event: error\ndata: " if path == "/generate" else "data: ")
    assert set(json.loads(last.partition("data: ")[2])) == {"error"}
    assert b"[DONE]" not in seen
    assert b"event: end" not in seen
    assert b"CANARY" not in seen
    assert api.metrics.broken == 1


@pytest.mark.parametrize("script", DIES, ids=["died", "bug", "no-end"])
async def test_a_whole_answer_that_breaks_is_an_error(
    http: httpx2.AsyncClient, engine: ScriptedEngine, script: list[Any]
) -> None:
    engine.script = script
    response = await http.post("/v1/chat/completions", json=CHAT)
    expected = "internal_error" if script is BUG else "engine_died"
    assert response.json()["error"]["code"] == expected
    assert response.status_code == (500 if script is BUG else 503)
    assert "Half" not in response.text


async def test_the_sdk_sees_a_broken_stream_as_an_error(sdk: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    engine.script = DIES[0]
    stream = await sdk.chat.completions.create(model="default", messages=HELLO, stream=True)
    seen = ""
    with pytest.raises(openai.APIError):
        async for chunk in stream:
            seen += chunk.choices[0].delta.content or ""
    assert seen == "Half"


async def test_one_broken_answer_of_several_stops_all(http: httpx2.AsyncClient, engine: ScriptedEngine) -> None:
    engine.scripts = [[Started(7, 0), asyncio.Event()], [Started(7, 0), EngineDied("killed")]]
    response = await http.post("/v1/chat/completions", json={**CHAT, "n": 2})
    assert response.status_code == 503
    assert engine.running == 0


async def test_closing_the_stream_closes_the_engine_iterator(
    sdk: openai.AsyncOpenAI, engine: ScriptedEngine, api: Api
) -> None:
    engine.script = [Started(7, 0), Delta("Hel", 1), asyncio.Event()]
    stream = await sdk.chat.completions.create(model="default", messages=HELLO, stream=True, n=3)
    await anext(stream)
    assert engine.running == 3
    await stream.close()
    assert engine.running == 0
    assert (api.queue.running, api.metrics.cancelled) == (0, 1)


@pytest.mark.parametrize("n", [1, 3])
async def test_leaving_before_the_answer_cancels_it(
    api: Api, engine: ScriptedEngine, http: httpx2.AsyncClient, n: int
) -> None:
    engine.script = [Started(7, 0), asyncio.Event()]
    waiting = asyncio.create_task(http.post("/v1/chat/completions", json={**CHAT, "n": n}))
    await eventually(lambda: engine.running == n)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert (engine.running, api.queue.running) == (0, 0)


async def test_leaving_the_queue_frees_the_place_and_harms_nobody(
    api: Api, engine: ScriptedEngine, http: httpx2.AsyncClient
) -> None:
    gate = asyncio.Event()
    engine.script = [Started(7, 0), gate, Delta("ok", 1), Done("stop", 7, 1, 0)]
    running = [asyncio.create_task(http.post("/v1/chat/completions", json=CHAT)) for _ in range(INFO.slots)]
    await eventually(lambda: engine.running == INFO.slots)
    leaver = asyncio.create_task(http.post("/v1/chat/completions", json=CHAT))
    stayer = asyncio.create_task(http.post("/v1/chat/completions", json=CHAT))
    await eventually(lambda: api.queue.waiting == 2)
    leaver.cancel()
    await eventually(lambda: api.queue.waiting == 1)
    gate.set()
    answers = await asyncio.gather(*running, stayer)
    assert [answer.status_code for answer in answers] == [200] * 5
    assert len(engine.requests) == 5
    assert (api.queue.running, api.queue.waiting) == (0, 0)


async def test_a_request_that_gives_way_to_another_tenants_is_told_so(engine: ScriptedEngine) -> None:
    gate = asyncio.Event()
    engine.script = [Started(7, 0), gate, Delta("ok", 1), Done("stop", 7, 1, 0)]
    keys = {name: new_key() for name in ("ann", "bob")}
    api = create_api(engine, ApiConfig(api_keys=tuple(ApiKey(n, k[1]) for n, k in keys.items()), max_waiting=2))
    ann, bob = (client_of(api, authorization=f"Bearer {keys[name][0]}") for name in keys)
    anns = [asyncio.create_task(ann.post("/v1/chat/completions", json=CHAT)) for _ in range(INFO.slots + 2)]
    await eventually(lambda: api.queue.waiting == 2)
    other = asyncio.create_task(bob.post("/v1/chat/completions", json=CHAT))
    done, _ = await asyncio.wait(anns, return_when=asyncio.FIRST_COMPLETED)
    refused = done.pop().result()
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) >= 1
    gate.set()
    assert (await other).status_code == 200
    assert sorted([(await task).status_code for task in anns]) == [200] * (INFO.slots + 1) + [429]


async def test_waiting_has_a_limit(engine: ScriptedEngine) -> None:
    engine.script = [Started(7, 0), asyncio.Event()]
    api = create_api(engine, ApiConfig(require_keys=False, wait_limit=0.01))
    http = client_of(api)
    running = [asyncio.create_task(http.post("/v1/chat/completions", json=CHAT)) for _ in range(INFO.slots)]
    await eventually(lambda: engine.running == INFO.slots)
    response = await http.post("/v1/chat/completions", json=CHAT)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_timeout")
    assert int(response.headers["retry-after"]) >= 1
    assert api.queue.waiting == 0
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


def test_the_sync_sdk_over_a_real_server(loopback: str, engine: ScriptedEngine, api: Api) -> None:
    with openai.OpenAI(base_url=f"{loopback}/v1", api_key="none", max_retries=0) as sdk:
        assert sdk.chat.completions.create(model="default", messages=HELLO).choices[0].message.content == "Hello"
        stream = sdk.chat.completions.create(model="default", messages=HELLO, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "Hello"
        with pytest.raises(openai.NotFoundError):
            sdk.chat.completions.create(model="other", messages=HELLO)
        engine.script = DIES[0]
        broken = sdk.chat.completions.create(model="default", messages=HELLO, stream=True)
        with pytest.raises(openai.APIError):
            list(broken)
        engine.script = [Started(7, 0), Delta("a", 1), asyncio.Event()]
        endless = sdk.chat.completions.create(model="default", messages=HELLO, stream=True)
        next(iter(endless))
        endless.close()
        asyncio.run(eventually(lambda: engine.running == 0))
    assert api.queue.running == 0
