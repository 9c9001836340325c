"""Tools, shapes and thoughts through OpenAI's chat route; its other behaviour is in test_openai."""

import json
from dataclasses import replace
from typing import Any

import httpx2
import openai
import pytest
from tests.enclave.llm.conftest import INFO, MODEL, ScriptedEngine, client_of, says, sdk_of
from tests.enclave.llm.schema_check import is_valid

from cloister.enclave.llm.api import ApiConfig, create_api
from cloister.enclave.llm.engine import Delta, Done, Started, TokenLogprob
from cloister.enclave.llm.llama import LlamaConfig, LlamaEngine, LoopSettings
from cloister.models.download import resolve

pytestmark = pytest.mark.anyio

HELLO: list[Any] = [{"role": "user", "content": "What time is it?"}]
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"zone": {"enum": ["UTC", "CET"]}, "hours": {"type": "integer", "minimum": 0, "maximum": 23}},
    "required": ["zone", "hours"],
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "clock", "description": "Tells the time.", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "dice"}},
]
CALLS = '<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call>\n<tool_call>\n{"name": "dice", "arguments": {}}\n</tool_call>'


@pytest.fixture
def hermes(engine: ScriptedEngine) -> ScriptedEngine:
    engine.model = replace(INFO, model=replace(MODEL, calls="hermes", thinking="tagged"))
    return engine


async def chunks_of(http: httpx2.AsyncClient, **fields: Any) -> list[Any]:
    response = await http.post("/v1/chat/completions", json={"messages": HELLO, "stream": True, **fields})
    assert response.status_code == 200
    blocks = response.content.decode("ascii").removesuffix("\n\n").split("\n\n")
    assert blocks.pop() == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


async def test_calls_come_whole(sdk: openai.AsyncOpenAI, hermes: ScriptedEngine) -> None:
    hermes.script = says(*CALLS)
    answer = await sdk.chat.completions.create(model="default", messages=HELLO, tools=TOOLS)
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    calls: Any = choice.message.tool_calls
    found = [(call.type, call.function.name, call.function.arguments) for call in calls]
    assert found == [("function", "clock", '{"zone": "UTC"}'), ("function", "dice", "{}")]
    assert len({call.id for call in calls}) == 2


@pytest.mark.parametrize("step", [1, 3, 1000])
async def test_calls_come_in_deltas(http: httpx2.AsyncClient, hermes: ScriptedEngine, step: int) -> None:
    hermes.script = says(*(CALLS[at : at + step] for at in range(0, len(CALLS), step)))
    chunks = await chunks_of(http, tools=TOOLS)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["tool_calls"]
    calls: list[Any] = []
    for chunk in chunks[1:-1]:
        delta = chunk["choices"][0]["delta"]
        assert set(delta) == {"tool_calls"}
        (call,) = delta["tool_calls"]
        if "id" in call:
            assert (call["index"], call["type"], call["function"]["arguments"]) == (len(calls), "function", "")
            calls.append([call["id"], call["function"]["name"], ""])
        else:
            assert set(call) == {"index", "function"}
            calls[call["index"]][2] += call["function"]["arguments"]
    assert [call[1:] for call in calls] == [["clock", '{"zone": "UTC"}'], ["dice", "{}"]]


async def test_the_official_client_puts_streamed_calls_together(
    sdk: openai.AsyncOpenAI, hermes: ScriptedEngine
) -> None:
    hermes.script = says(*("Let me see.\n" + CALLS))
    async with sdk.chat.completions.stream(model="default", messages=HELLO, tools=TOOLS) as stream:
        final = await stream.get_final_completion()
    message = final.choices[0].message
    assert message.content == "Let me see."
    assert [call.function.name for call in message.tool_calls or []] == ["clock", "dice"]


async def test_tools_and_grammar_reach_the_engine(http: httpx2.AsyncClient, hermes: ScriptedEngine) -> None:
    await http.post("/v1/chat/completions", json={"messages": HELLO, "tools": TOOLS})
    await http.post("/v1/chat/completions", json={"messages": HELLO, "tools": TOOLS, "tool_choice": "required"})
    await http.post("/v1/chat/completions", json={"messages": HELLO, "tools": TOOLS, "tool_choice": "none"})
    free, forced, none = hermes.requests
    assert [tool["function"]["name"] for tool in free.prompt.tools] == ["clock", "dice"]
    assert free.prompt.tools == forced.prompt.tools
    assert none.prompt.tools == ()
    assert (free.sampling.grammar, none.sampling.grammar) == (None, None)
    assert forced.sampling.grammar is not None


async def test_a_call_cut_off_ends_for_its_length(sdk: openai.AsyncOpenAI, hermes: ScriptedEngine) -> None:
    hermes.script = says(CALLS[:50], reason="length")
    answer = await sdk.chat.completions.create(model="default", messages=HELLO, tools=TOOLS)
    assert answer.choices[0].finish_reason == "length"


async def test_n_answers_count_their_calls_apart(http: httpx2.AsyncClient, hermes: ScriptedEngine) -> None:
    hermes.scripts = [says(*CALLS), says("No."), says(*CALLS)]
    chunks = await chunks_of(http, tools=TOOLS, n=3)
    ends = {
        c["choices"][0]["index"]: c["choices"][0]["finish_reason"] for c in chunks if c["choices"][0]["finish_reason"]
    }
    assert ends == {0: "tool_calls", 1: "stop", 2: "tool_calls"}
    calls = [c["choices"][0] for c in chunks if "tool_calls" in c["choices"][0]["delta"]]
    for index in (0, 2):
        mine = [c["delta"]["tool_calls"][0] for c in calls if c["index"] == index]
        assert [call["index"] for call in mine if "id" in call] == [0, 1]


async def test_thoughts_are_told_from_the_answer(
    sdk: openai.AsyncOpenAI, http: httpx2.AsyncClient, hermes: ScriptedEngine
) -> None:
    hermes.script = says(*"<think>\nHm.\n</think>\n\nNoon.")
    answer = await sdk.chat.completions.create(model="default", messages=HELLO)
    message: Any = answer.choices[0].message
    assert (message.content, message.reasoning_content, message.tool_calls) == ("Noon.", "Hm.", None)
    deltas = [chunk["choices"][0]["delta"] for chunk in await chunks_of(http)]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm."
    assert "".join(delta.get("content", "") for delta in deltas) == "Noon."
    assert [set(delta) for delta in deltas[-3:]] == [{"content"}, {"content"}, set()]


async def test_every_tokens_logprob_is_told_once(http: httpx2.AsyncClient, hermes: ScriptedEngine) -> None:
    text = "Ah.\n" + CALLS
    deltas = [Delta(c, 1, (TokenLogprob(at, c.encode(), -float(at)),)) for at, c in enumerate(text)]
    hermes.script = [Started(5, 0), *deltas, Done("stop", 5, len(deltas), 0)]
    chunks = await chunks_of(http, tools=TOOLS, logprobs=True)
    logprobs = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    found = [token["logprob"] for one in logprobs if one for token in one["content"]]
    assert found == [-float(at) for at in range(len(text))]


async def refused(http: httpx2.AsyncClient, **fields: Any) -> tuple[int, str | None, str]:
    response = await http.post("/v1/chat/completions", json={"messages": HELLO, **fields})
    error = response.json()["error"]
    return response.status_code, error["param"], error["code"]


async def test_what_cannot_be_honoured_is_refused_before_the_engine_sees_it(
    http: httpx2.AsyncClient, engine: ScriptedEngine
) -> None:
    bad: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}
    assert await refused(http, tools=TOOLS) == (400, "tools", "unsupported_parameter")
    assert await refused(http, response_format=bad) == (400, "response_format", "unsupported_schema")
    assert await refused(http, grammar="root ::= root") == (400, "grammar", "invalid_grammar")
    assert engine.requests == []


async def test_unknown_fields_are_ignored(http: httpx2.AsyncClient, engine: ScriptedEngine) -> None:
    tool = {**TOOLS[0], "cache_control": {"x": 1}}
    fields = {
        "tools": [tool],
        "tool_choice": "required",
        "stream_options": {"include_obfuscation": True, "x": 1},
        "y": 2,
    }
    response = await http.post("/v1/chat/completions", json={"messages": HELLO, **fields})
    assert response.status_code == 200


async def test_a_real_model_is_made_to_call_and_to_keep_to_a_schema() -> None:
    """The embedded model knows no tools, and has never seen JSON."""
    engine = LlamaEngine(LlamaConfig(model=resolve("tiny").path, loop=LoopSettings(slots=2)))
    await engine.start()
    try:
        api = create_api(engine, ApiConfig(require_keys=False))
        sdk = sdk_of(api)
        forced: Any = {
            "model": "default",
            "messages": HELLO,
            "tools": TOOLS,
            "tool_choice": "required",
            "max_tokens": 400,
        }
        named = {
            **forced,
            "tool_choice": {"type": "function", "function": {"name": "clock"}},
            "parallel_tool_calls": False,
        }
        whole = await sdk.chat.completions.create(**named)
        calls: Any = whole.choices[0].message.tool_calls
        (call,) = calls
        assert (whole.choices[0].finish_reason, whole.choices[0].message.content) == ("tool_calls", None)
        assert call.function.name == "clock"
        assert is_valid(json.loads(call.function.arguments), PARAMETERS)
        chunks = await chunks_of(client_of(api), **{**named, "model": "default"})
        pieces = [call for c in chunks[1:-1] for call in c["choices"][0]["delta"]["tool_calls"]]
        assert pieces[0]["function"]["name"] == "clock"
        assert is_valid(json.loads("".join(piece["function"]["arguments"] for piece in pieces)), PARAMETERS)
        shape: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS}}
        bound = await sdk.chat.completions.create(model="default", messages=HELLO, response_format=shape)
        assert is_valid(json.loads(bound.choices[0].message.content or ""), PARAMETERS)
        past: Any = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]}]
        past += [{"role": "tool", "tool_call_id": call.id, "content": "noon"}]
        after = await sdk.chat.completions.create(model="default", messages=past, max_tokens=5)
        assert after.choices[0].finish_reason in ("stop", "length")
    finally:
        await engine.close()
