import asyncio
import json
from dataclasses import replace
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic import types
from pydantic import TypeAdapter
from tests.enclave.llm.conftest import INFO, MODEL, ScriptedEngine, client_of, eventually, says

from cloister.enclave.llm.anthropic import parse_messages
from cloister.enclave.llm.api import Api, ApiConfig, create_api
from cloister.enclave.llm.engine import Delta, Done, Started
from cloister.enclave.llm.fields import Fields
from cloister.enclave.llm.tenants import ApiKey, new_key
from cloister.enclave.llm.toolcalls import ToolChoice
from cloister.errors import ContextLengthExceeded, EngineDied, EngineLoading, QueueFull

pytestmark = pytest.mark.anyio

HELLO: list[Any] = [{"role": "user", "content": "Hi"}]
ASK: dict[str, Any] = {"model": "default", "max_tokens": 50, "messages": HELLO}
WEATHER: Any = {
    "name": "weather",
    "description": "The weather somewhere.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
EVENT: TypeAdapter[types.RawMessageStreamEvent] = TypeAdapter(types.RawMessageStreamEvent)


def sdk_of(api: Api, key: str = "none") -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(
        base_url="http://enclave.invalid", api_key=key, http_client=client_of(api), max_retries=0
    )


@pytest.fixture
def claude(api: Api) -> anthropic.AsyncAnthropic:
    return sdk_of(api)


@pytest.fixture
def tools(engine: ScriptedEngine) -> ScriptedEngine:
    """An engine whose model calls tools and thinks aloud."""
    engine.model = replace(INFO, model=replace(MODEL, calls="hermes", thinking="tagged"))
    return engine


def events_of(body: bytes) -> list[Any]:
    """Each named as its own type says, and each as the SDK's models have it."""
    blocks = body.decode("ascii").split("\n\n")
    assert blocks.pop() == ""
    found = []
    for block in blocks:
        head, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert head == f"event: {found[-1]['type']}"
        EVENT.validate_python(found[-1], strict=False)
    return found


async def test_a_message_has_text_stop_reason_and_usage(
    claude: anthropic.AsyncAnthropic, engine: ScriptedEngine
) -> None:
    engine.script = says("Hel", "lo", prompt=7, cached=5)
    answer = await claude.messages.create(**ASK)
    types.Message.model_validate(answer.model_dump(), strict=True)
    assert answer.id.startswith("msg_")
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", "acme/toy")
    assert [block.model_dump(exclude_none=True) for block in answer.content] == [{"type": "text", "text": "Hello"}]
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    usage = answer.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (2, 5, 2)
    assert (answer._request_id or "").startswith("req_")


async def test_what_is_asked_reaches_the_engine(claude: anthropic.AsyncAnthropic, engine: ScriptedEngine) -> None:
    await claude.messages.create(
        model="acme/toy",
        max_tokens=6,
        system=[
            {"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "B"},
        ],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "Two"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Three"}]},
            {"role": "user", "content": "Four"},
        ],
        metadata={"user_id": "nobody"},
        extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 40, "unknown": {"field": 1}},
    )
    request = engine.requests[0]
    assert request.prompt.messages == (
        {"role": "system", "content": "Be kind.\nB"},
        {"role": "user", "content": "One\nTwo"},
        {"role": "assistant", "content": "Three"},
        {"role": "user", "content": "Four"},
    )
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (6, 0.5, 0.9, 40)


async def test_a_stream_has_anthropics_events_in_their_order(http: httpx2.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = says("Hel", "lo", prompt=7, cached=5)
    events = events_of((await http.post("/v1/messages", json={**ASK, "stream": True})).content)
    assert [event["type"] for event in events] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    start = events[0]["message"]
    assert (start["content"], start["stop_reason"], start["usage"]["input_tokens"]) == ([], None, 2)
    assert [event["delta"]["text"] for event in events[2:4]] == ["Hel", "lo"]
    assert events[5]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[5]["usage"]["output_tokens"] == 2


async def test_the_sdk_streams_text_and_ends_with_the_whole_message(claude: anthropic.AsyncAnthropic) -> None:
    async with claude.messages.stream(**ASK) as stream:
        texts = [text async for text in stream.text_stream]
        final = await stream.get_final_message()
    assert texts == ["Hel", "lo"]
    assert (final.content[0].text, final.stop_reason) == ("Hello", "end_turn")  # type: ignore[union-attr]
    assert final.usage.output_tokens == 2


@pytest.mark.parametrize("text", ["żółć 日本語 🜁", 'quote " back\\slash', "\x00\n\r\u0085\u2028", "</script>"])
async def test_any_text_survives(claude: anthropic.AsyncAnthropic, engine: ScriptedEngine, text: str) -> None:
    engine.script = says(*text)
    whole = await claude.messages.create(**ASK)
    async with claude.messages.stream(**ASK) as stream:
        streamed = await stream.get_final_text()
    assert whole.content[0].text == streamed == text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("texts", "stops", "text", "found"),
    [
        (["One EN", "D two", "never"], ["END"], "One ", "END"),
        (["abc"], ["c", "b"], "a", "b"),
        (["abc"], ["a", "ab"], "", "ab"),
        (["One EN", "d"], ["END"], "One ENd", None),
        (["One EN"], ["END"], "One EN", None),
    ],
)
async def test_a_stop_sequence_ends_the_answer_and_is_named(
    claude: anthropic.AsyncAnthropic,
    engine: ScriptedEngine,
    *,
    stream: bool,
    texts: list[str],
    stops: list[str],
    text: str,
    found: str | None,
) -> None:
    engine.script = says(*texts)
    if stream:
        async with claude.messages.stream(**ASK, stop_sequences=stops) as events:
            answer: Any = await events.get_final_message()
    else:
        answer = await claude.messages.create(**ASK, stop_sequences=stops)
    assert "".join(block.text for block in answer.content) == text
    expected = ("end_turn", None) if found is None else ("stop_sequence", found)
    assert (answer.stop_reason, answer.stop_sequence) == expected
    assert engine.running == 0


async def test_the_engine_stops_at_a_stop_sequence(claude: anthropic.AsyncAnthropic, engine: ScriptedEngine) -> None:
    engine.script = [Started(3, 1), Delta("a|", 4), asyncio.Event()]  # it would never end
    answer = await claude.messages.create(**ASK, stop_sequences=["|"])
    usage = answer.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (2, 1, 4)
    assert (engine.running, engine.closed) == (0, 1)


@pytest.mark.parametrize(("limit", "reason"), [(2, "max_tokens"), (50, "model_context_window_exceeded")])
async def test_an_answer_cut_off_says_by_what(
    claude: anthropic.AsyncAnthropic, engine: ScriptedEngine, limit: int, reason: str
) -> None:
    engine.script = says("Hel", "lo", reason="length")
    answer = await claude.messages.create(model="default", max_tokens=limit, messages=HELLO)
    assert answer.stop_reason == reason


async def test_a_limit_beyond_the_context_ends_with_the_context(
    claude: anthropic.AsyncAnthropic, engine: ScriptedEngine
) -> None:
    engine.script = says("Hel", "lo", reason="length")
    answer = await claude.messages.create(model="default", max_tokens=8192, messages=HELLO)
    assert engine.requests[0].sampling.max_tokens is None
    assert answer.stop_reason == "model_context_window_exceeded"


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_of_tools_are_blocks(
    claude: anthropic.AsyncAnthropic, tools: ScriptedEngine, *, stream: bool
) -> None:
    tools.script = says("Let me see.\n", *CALL)
    if stream:
        async with claude.messages.stream(**ASK, tools=[WEATHER]) as events:
            answer: Any = await events.get_final_message()
    else:
        answer = await claude.messages.create(**ASK, tools=[WEATHER])
    text, call = answer.content
    assert text.text == "Let me see."
    assert (call.type, call.name, call.input) == ("tool_use", "weather", {"city": "Rome"})
    assert call.id
    assert answer.stop_reason == "tool_use"
    offered = tools.requests[0].prompt.tools[0]
    assert offered["function"]["name"] == "weather"
    assert offered["function"]["parameters"] == WEATHER["input_schema"]


async def test_a_call_cut_off_is_left_out_of_a_whole_answer(
    claude: anthropic.AsyncAnthropic, tools: ScriptedEngine
) -> None:
    tools.script = says(CALL[:52], reason="length")
    answer = await claude.messages.create(model="default", max_tokens=1, messages=HELLO, tools=[WEATHER])
    assert (answer.content, answer.stop_reason) == ([], "max_tokens")


async def test_past_calls_and_their_results_become_messages(
    claude: anthropic.AsyncAnthropic, tools: ScriptedEngine
) -> None:
    image: Any = {"type": "text", "text": "and?"}
    await claude.messages.create(
        model="default",
        max_tokens=8,
        tools=[WEATHER],
        messages=[
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": ""},
                    {"type": "text", "text": "Wait."},
                    {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Rome"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "Rain"}]},
                    {"type": "tool_result", "tool_use_id": "call_2", "content": "gone", "is_error": True},
                    image,
                ],
            },
        ],
    )
    function = {"name": "weather", "arguments": {"city": "Rome"}}
    assert tools.requests[0].prompt.messages == (
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "Wait.",
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "Rain"},
        {"role": "tool", "tool_call_id": "call_2", "content": "Error: gone"},
        {"role": "user", "content": "and?"},
    )


@pytest.mark.parametrize(
    ("choice", "offered", "bound"),
    [
        ({"type": "auto"}, 1, False),
        ({"type": "none"}, 0, False),
        ({"type": "any", "disable_parallel_tool_use": True}, 1, True),
        ({"type": "tool", "name": "weather"}, 1, True),
    ],
)
async def test_tool_choice_binds_the_answer(
    claude: anthropic.AsyncAnthropic, tools: ScriptedEngine, choice: Any, offered: int, *, bound: bool
) -> None:
    await claude.messages.create(**ASK, tools=[WEATHER], tool_choice=choice)
    request = tools.requests[0]
    assert (len(request.prompt.tools), request.sampling.grammar is not None) == (offered, bound)


async def test_a_schema_binds_the_answer(http: httpx2.AsyncClient, engine: ScriptedEngine) -> None:
    form = {"format": {"type": "json_schema", "schema": {"type": "object", "properties": {}}}}
    assert (await http.post("/v1/messages", json={**ASK, "output_config": form})).status_code == 200
    assert engine.requests[0].sampling.grammar is not None


@pytest.mark.parametrize("stream", [False, True])
async def test_thoughts_are_told_only_where_asked_for(
    claude: anthropic.AsyncAnthropic, tools: ScriptedEngine, *, stream: bool
) -> None:
    tools.script = says("<think>Hm", " so</think>\n", "Yes.")
    for thinking, kinds in (
        ({"type": "disabled"}, ["text"]),
        ({"type": "enabled", "budget_tokens": 1024}, ["thinking", "text"]),
    ):
        ask: Any = {**ASK, "thinking": thinking}
        if stream:
            async with claude.messages.stream(**ask) as events:
                answer: Any = await events.get_final_message()
        else:
            answer = await claude.messages.create(**ask)
        assert [block.type for block in answer.content] == kinds
        assert answer.content[-1].text == "Yes."
    assert answer.content[0].thinking == "Hm so"


async def test_prompts_are_counted_and_nothing_is_generated(
    claude: anthropic.AsyncAnthropic, engine: ScriptedEngine, api: Api
) -> None:
    engine.script = [Started(42, 0), asyncio.Event()]  # it would never end
    counted = await claude.messages.count_tokens(model="default", messages=HELLO, system="Be kind.")
    assert counted.input_tokens == 42
    assert engine.requests[0].prompt.messages == ({"role": "system", "content": "Be kind."}, HELLO[0])
    assert (engine.running, api.queue.running) == (0, 0)


async def test_prompts_longer_than_the_context_are_counted_too(
    claude: anthropic.AsyncAnthropic, engine: ScriptedEngine
) -> None:
    engine.script = [ContextLengthExceeded(limit=4096, prompt=5000, requested=5001)]
    assert (await claude.messages.count_tokens(model="default", messages=HELLO)).input_tokens == 5000
    assert engine.requests[0].count_prompt


IMAGE = {"type": "image", "source": {"type": "url", "url": "https://stranger.invalid/CANARY"}}
INLINE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "CANARY"}}


def said(*content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}]}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": HELLO * 4097}, "messages"),
        (said(*[{"type": "tool_result", "tool_use_id": "CANARY", "content": "x"}] * 4097), "messages"),
        ({"messages": "CANARY"}, "messages"),
        ({"messages": [{"role": "CANARY", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "CANARY"}]}, "messages"),
        (said(IMAGE), "messages[0].content[0]"),
        (said(INLINE), "messages[0].content[0]"),
        (said({"type": "text"}), "messages[0].content[0].text"),
        (said({"type": "tool_result", "content": "CANARY"}), "messages[0].content[0].tool_use_id"),
        ({"system": [{"type": "CANARY"}]}, "system[0]"),
        ({"temperature": 1.5}, "temperature"),
        ({"stop_sequences": ["CANARY", ""]}, "stop_sequences"),
        ({"tools": [{"type": "web_search_20250305", "name": "CANARY"}]}, "tools[0].type"),
        ({"tools": [{"name": "CANARY two"}]}, "tools[0].name"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [WEATHER]}, "tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "CANARY"}}, "tool_choice.name"),
        ({"output_config": {"format": {"type": "CANARY"}}}, "output_config.format"),
    ],
)
async def test_refusals_name_the_field_and_never_its_value(
    claude: anthropic.AsyncAnthropic, engine: ScriptedEngine, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        await claude.messages.create(**ASK, extra_body=change)
    body: Any = caught.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert f"'{named}'" in body["error"]["message"]
    assert "CANARY" not in caught.value.response.text
    assert engine.requests == []


async def test_no_remote_address_is_fetched(http: httpx2.AsyncClient) -> None:
    answer = await http.post("/v1/messages", json={**ASK, **said(IMAGE)})
    assert "fetches no remote address" in answer.json()["error"]["message"]
    assert (
        "reads text only" in (await http.post("/v1/messages", json={**ASK, **said(INLINE)})).json()["error"]["message"]
    )


@pytest.mark.parametrize(
    ("failure", "raised", "kind"),
    [
        (
            ContextLengthExceeded(limit=4096, prompt=5000, requested=5100),
            anthropic.BadRequestError,
            "invalid_request_error",
        ),
        (QueueFull("full", retry_after=3), anthropic.RateLimitError, "rate_limit_error"),
        (EngineLoading("loading", progress=0.5), anthropic.InternalServerError, "overloaded_error"),
        (EngineDied("died"), anthropic.InternalServerError, "overloaded_error"),
        (ValueError("CANARY"), anthropic.InternalServerError, "api_error"),
    ],
)
async def test_errors_are_raised_as_the_sdk_has_them(
    claude: anthropic.AsyncAnthropic, engine: ScriptedEngine, failure: Exception, raised: Any, kind: str
) -> None:
    engine.script = [failure]
    with pytest.raises(raised) as caught:
        await claude.messages.create(**ASK)
    body: Any = caught.value.body
    types.ErrorResponse.model_validate(body)
    assert body["error"]["type"] == kind
    assert body["request_id"] == caught.value.request_id
    assert "CANARY" not in caught.value.response.text
    assert caught.value.response.status_code == {"overloaded_error": 529}.get(kind, caught.value.response.status_code)


async def test_keys_are_read_from_x_api_key(engine: ScriptedEngine) -> None:
    plain, digest = new_key()
    api = create_api(engine, ApiConfig(api_keys=(ApiKey("ann", digest),)))
    assert (await sdk_of(api, plain).messages.create(**ASK)).content
    with pytest.raises(anthropic.AuthenticationError):
        await sdk_of(api, "ck-wrong").messages.create(**ASK)


async def test_other_models_are_not_found(claude: anthropic.AsyncAnthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        await claude.messages.create(model="claude-nothing", max_tokens=5, messages=HELLO)


async def test_a_model_without_a_template_says_where_to_go(
    claude: anthropic.AsyncAnthropic, engine: ScriptedEngine
) -> None:
    engine.without_template()
    with pytest.raises(anthropic.BadRequestError, match="/v1/completions"):
        await claude.messages.create(**ASK)


async def test_an_error_within_a_stream_is_an_event_and_no_end(api: Api, engine: ScriptedEngine) -> None:
    engine.script = [Started(1, 0), Delta("Hel", 1), EngineDied("killed")]
    with pytest.raises(anthropic.APIStatusError) as caught:
        async with sdk_of(api).messages.stream(**ASK) as stream:
            await stream.get_final_message()
    assert "overloaded_error" in str(caught.value)
    assert api.metrics.broken == 1


async def test_a_client_that_leaves_stops_the_engine(api: Api, engine: ScriptedEngine) -> None:
    engine.script = [Started(1, 0), Delta("Hel", 1), asyncio.Event(), Done("stop", 1, 1, 0)]
    async with sdk_of(api).messages.stream(**ASK) as stream:
        assert await anext(stream.text_stream) == "Hel"
    await eventually(lambda: engine.running == 0)
    await eventually(lambda: api.metrics.cancelled == 1)


def test_a_tool_that_is_named_is_called_exactly_once() -> None:
    def choice(**wanted: Any) -> ToolChoice:
        return parse_messages(Fields({**ASK, "tools": [WEATHER], "tool_choice": wanted}))[0].choice

    assert choice(type="tool", name="weather") == ToolChoice("named", "weather", parallel=False)
    assert choice(type="any") == ToolChoice("required", parallel=True)
