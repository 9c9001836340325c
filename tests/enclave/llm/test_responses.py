import asyncio
import json
from dataclasses import replace
from typing import Any

import httpx2
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from tests.enclave.llm.conftest import INFO, MODEL, ScriptedEngine, client_of, eventually, says, sdk_of

from cloister.enclave.llm.api import Api
from cloister.enclave.llm.engine import Delta, Done, Started
from cloister.enclave.llm.fields import Fields
from cloister.enclave.llm.responses import parse_response
from cloister.enclave.llm.toolcalls import ToolChoice
from cloister.errors import ContextLengthExceeded, EngineDied, QueueFull

pytestmark = pytest.mark.anyio

ASK: dict[str, Any] = {"model": "default", "input": "Hi"}
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "The weather somewhere.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture
def tools(engine: ScriptedEngine) -> ScriptedEngine:
    """An engine whose model calls tools and thinks aloud."""
    engine.model = replace(INFO, model=replace(MODEL, calls="hermes", thinking="tagged"))
    return engine


def events_of(body: bytes) -> list[Any]:
    """Numbered from 0, each named as its own type says, and each as the SDK's models have it."""
    blocks = body.decode("ascii").split("\n\n")
    assert blocks.pop() == ""
    found = []
    for number, block in enumerate(blocks):
        head, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert head == f"event: {found[-1]['type']}"
        assert found[-1]["sequence_number"] == number
        EVENT.validate_python(found[-1])
    return found


async def test_an_answer_has_text_status_and_usage(sdk: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    engine.script = says("Hel", "lo", prompt=7, cached=5)
    answer = await sdk.responses.create(**ASK)
    assert answer.id.startswith("resp_")
    assert (answer.object, answer.status, answer.model) == ("response", "completed", "acme/toy")
    assert answer.output_text == "Hello"
    assert [item.type for item in answer.output] == ["message"]
    usage = answer.usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (7, 2, 9)
    assert usage.input_tokens_details.cached_tokens == 5
    assert usage.output_tokens_details.reasoning_tokens == 0


async def test_every_answer_is_as_the_sdk_has_it_and_stored_nowhere(
    http: httpx2.AsyncClient, tools: ScriptedEngine
) -> None:
    tools.script = says("<think>Hm</think>", "Yes. ", CALL)
    body = (await http.post("/v1/responses", json={**ASK, "tools": [WEATHER]})).json()
    answer = Response.model_validate(body)
    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call"]
    assert body["store"] is False
    assert body["tools"] == [WEATHER]
    assert len({item["id"] for item in body["output"]}) == 3


async def test_what_is_asked_reaches_the_engine(sdk: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    answer = await sdk.responses.create(
        model="acme/toy",
        instructions="Be kind.",
        input=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "input_text", "text": "One"}, {"type": "input_text", "text": "Two"}]},
            {
                "id": "msg_1",
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": "Three", "annotations": []}],
            },
            {"role": "user", "content": "Four"},
        ],
        max_output_tokens=20,
        temperature=0.5,
        top_p=0.9,
        store=True,
        metadata={"a": "b"},
        extra_body={"unknown": {"field": 1}},
    )
    request = engine.requests[0]
    assert request.prompt.messages == (
        {"role": "system", "content": "Be kind."},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One\nTwo"},
        {"role": "assistant", "content": "Three"},
        {"role": "user", "content": "Four"},
    )
    assert (request.sampling.max_tokens, request.sampling.temperature, request.sampling.top_p) == (20, 0.5, 0.9)
    assert (answer.instructions, answer.max_output_tokens, answer.temperature) == ("Be kind.", 20, 0.5)


async def test_a_stream_has_the_events_in_their_order(http: httpx2.AsyncClient) -> None:
    events = events_of((await http.post("/v1/responses", json={**ASK, "stream": True})).content)
    assert [event["type"] for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event["delta"] for event in events[4:6]] == ["Hel", "lo"]
    assert events[0]["response"]["output"] == []
    assert events[2]["item"]["content"] == []
    assert events[6]["text"] == "Hello"
    last = events[-1]["response"]
    assert last["output"] == [events[8]["item"]]
    assert (last["status"], last["usage"]["output_tokens"]) == ("completed", 2)
    assert len({event["item_id"] for event in events[3:8]}) == 1


async def test_a_streamed_call_has_its_own_events(http: httpx2.AsyncClient, tools: ScriptedEngine) -> None:
    tools.script = says("<think>Hm</think>", *CALL)
    body = {**ASK, "tools": [WEATHER], "stream": True}
    events = events_of((await http.post("/v1/responses", json=body)).content)
    pieces = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert len(pieces) > 1
    assert json.loads("".join(pieces)) == {"city": "Rome"}
    done = next(event for event in events if event["type"] == "response.function_call_arguments.done")
    assert done["arguments"] == "".join(pieces)
    item = events[-1]["response"]["output"][-1]
    assert (item["type"], item["name"], item["status"]) == ("function_call", "weather", "completed")
    assert any(event["type"] == "response.reasoning_text.delta" for event in events)
    assert events[-1]["response"]["usage"]["output_tokens_details"]["reasoning_tokens"] == 1


async def test_the_sdk_streams_and_ends_with_the_whole_answer(sdk: openai.AsyncOpenAI, tools: ScriptedEngine) -> None:
    tools.script = says("Yes. ", *CALL)
    async with sdk.responses.stream(**ASK, tools=[WEATHER]) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert final.output_text == "Yes."
    assert final.output[1].type == "function_call"


@pytest.mark.parametrize("text", ["żółć 日本語 🜁", 'quote " back\\slash', "\x00\n\r\u0085\u2028", "</script>"])
async def test_any_text_survives(sdk: openai.AsyncOpenAI, engine: ScriptedEngine, text: str) -> None:
    engine.script = says(*text)
    whole = await sdk.responses.create(**ASK)
    stream = await sdk.responses.create(**ASK, stream=True)
    streamed = [event.delta async for event in stream if event.type == "response.output_text.delta"]
    assert whole.output_text == "".join(streamed) == text


async def test_an_answer_cut_off_is_incomplete(sdk: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    engine.script = says("Hel", reason="length")
    answer = await sdk.responses.create(**ASK)
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[0].status == "incomplete"
    events = [event async for event in await sdk.responses.create(**ASK, stream=True)]
    assert events[-1].type == "response.incomplete"


async def test_past_calls_and_their_outputs_become_messages(sdk: openai.AsyncOpenAI, tools: ScriptedEngine) -> None:
    call: Any = {"type": "function_call", "name": "weather", "arguments": '{"city":"Rome"}'}
    items: Any = [
        {"role": "user", "content": "Weather?"},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {**call, "call_id": "call_1"},
        {**call, "call_id": "call_2"},
        {"type": "function_call_output", "call_id": "call_1", "output": "Rain"},
        {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "Sun"}]},
    ]
    await sdk.responses.create(model="default", input=items, tools=[WEATHER])
    function = {"name": "weather", "arguments": '{"city":"Rome"}'}
    calls = [{"id": f"call_{number}", "type": "function", "function": function} for number in (1, 2)]
    assert tools.requests[0].prompt.messages == (
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "Rain"},
        {"role": "tool", "tool_call_id": "call_2", "content": "Sun"},
    )


@pytest.mark.parametrize(
    ("choice", "offered", "bound"),
    [
        ("auto", 1, False),
        ("none", 0, False),
        ("required", 1, True),
        ({"type": "function", "name": "weather"}, 1, True),
    ],
)
async def test_tool_choice_binds_the_answer(
    sdk: openai.AsyncOpenAI, tools: ScriptedEngine, choice: Any, offered: int, *, bound: bool
) -> None:
    answer = await sdk.responses.create(**ASK, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False)
    request = tools.requests[0]
    assert (len(request.prompt.tools), request.sampling.grammar is not None) == (offered, bound)
    told = answer.tool_choice
    assert (told if isinstance(told, str) else told.model_dump(exclude_none=True)) == choice
    assert answer.parallel_tool_calls is False


@pytest.mark.parametrize(
    ("form", "bound"),
    [
        ({"type": "text"}, False),
        ({"type": "json_object"}, True),
        ({"type": "json_schema", "name": "a", "schema": {"type": "object", "properties": {}}}, True),
    ],
)
async def test_a_format_binds_the_answer(
    sdk: openai.AsyncOpenAI, engine: ScriptedEngine, form: Any, *, bound: bool
) -> None:
    answer = await sdk.responses.create(**ASK, text={"format": form})
    assert (engine.requests[0].sampling.grammar is not None) is bound
    assert answer.text is not None
    assert answer.text.format is not None
    assert answer.text.format.type == form["type"]


def part(**fields: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": [fields]}]}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"previous_response_id": "CANARY"}, "previous_response_id"),
        ({"conversation": "CANARY"}, "conversation"),
        ({"prompt": {"id": "CANARY"}}, "prompt"),
        ({"background": True}, "background"),
        ({"include": ["message.output_text.logprobs"]}, "top_logprobs"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning"}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "CANARY"}]}, "input[0].type"),
        ({"input": [{"type": "CANARY"}]}, "input[0].type"),
        ({"input": [{"role": "CANARY", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        (part(type="input_image", image_url="https://stranger.invalid/CANARY"), "input[0].content[0]"),
        (part(type="input_image", image_url="data:CANARY"), "input[0].content[0]"),
        (part(type="input_text"), "input[0].content[0].text"),
        ({"input": [{"type": "function_call", "name": "CANARY"}]}, "input[0].call_id"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "CANARY"}}, "tool_choice"),
        ({"text": {"format": {"type": "CANARY"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"temperature": 3}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
async def test_refusals_name_the_field_and_never_its_value(
    sdk: openai.AsyncOpenAI, engine: ScriptedEngine, change: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await sdk.responses.create(**ASK, extra_body=change)
    assert caught.value.param == param
    assert "CANARY" not in caught.value.response.text
    assert engine.requests == []


async def test_remote_addresses_are_refused_as_such(sdk: openai.AsyncOpenAI) -> None:
    for url, code in (("https://stranger.invalid/", "remote_url_refused"), ("data:", "unsupported_content")):
        with pytest.raises(openai.BadRequestError) as caught:
            await sdk.responses.create(**ASK, extra_body=part(type="input_image", image_url=url))
        assert caught.value.code == code


@pytest.mark.parametrize(
    ("failure", "raised", "code"),
    [
        (
            ContextLengthExceeded(limit=4096, prompt=5000, requested=5100),
            openai.BadRequestError,
            "context_length_exceeded",
        ),
        (QueueFull("full", retry_after=3), openai.RateLimitError, "queue_full"),
        (EngineDied("died"), openai.InternalServerError, "engine_died"),
    ],
)
async def test_errors_are_raised_as_the_sdk_has_them(
    sdk: openai.AsyncOpenAI, engine: ScriptedEngine, failure: Exception, raised: Any, code: str
) -> None:
    engine.script = [failure]
    with pytest.raises(raised) as caught:
        await sdk.responses.create(**ASK)
    assert caught.value.code == code


async def test_a_model_without_a_template_says_where_to_go(sdk: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    engine.without_template()
    with pytest.raises(openai.BadRequestError, match="/v1/completions"):
        await sdk.responses.create(**ASK)


async def test_an_error_within_a_stream_is_an_event_and_no_end(api: Api, engine: ScriptedEngine) -> None:
    engine.script = [Started(1, 0), Delta("Hel", 1), EngineDied("killed")]
    seen = []
    with pytest.raises(openai.APIConnectionError):
        async for event in await sdk_of(api).responses.create(**ASK, stream=True):
            seen.append(event)  # noqa: PERF401 - they are kept although it fails
    assert seen[-1].type == "error"
    assert (seen[-1].code, seen[-1].sequence_number) == ("engine_died", len(seen) - 1)
    assert not any(event.type == "response.completed" for event in seen)
    assert api.metrics.broken == 1


async def test_a_client_that_leaves_stops_the_engine(api: Api, engine: ScriptedEngine) -> None:
    engine.script = [Started(1, 0), Delta("Hel", 1), asyncio.Event(), Done("stop", 1, 1, 0)]
    async with client_of(api).stream("POST", "/v1/responses", json={**ASK, "stream": True}) as response:
        assert await anext(response.aiter_raw())
    await eventually(lambda: engine.running == 0)
    await eventually(lambda: api.metrics.cancelled == 1)


def test_a_function_that_is_named_is_called_exactly_once() -> None:
    named = {"type": "function", "name": "weather"}
    ask, told = parse_response(Fields({**ASK, "tools": [WEATHER], "tool_choice": named}))
    assert ask.choice == ToolChoice("named", "weather", parallel=False)
    assert told.parallel
