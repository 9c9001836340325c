from typing import Any

import pytest

from cloister.enclave.llm.engine import Prompt
from cloister.enclave.llm.envelope import Refused
from cloister.enclave.llm.fields import Fields
from cloister.enclave.llm.requests import parse_chat, parse_completion
from cloister.enclave.llm.structured import Shape
from cloister.enclave.llm.toolcalls import Tool, ToolChoice

HI = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "clock"}}


def chat(**fields: Any) -> Any:
    return parse_chat(Fields({"messages": HI, **fields}))


def refusal(**fields: Any) -> tuple[str, str | None]:
    with pytest.raises(Refused) as caught:
        chat(**fields)
    assert caught.value.status == 400
    return caught.value.code, caught.value.param


def test_defaults_are_openais() -> None:
    ask = chat()
    assert (ask.model, ask.n, ask.stream, ask.include_usage) == (None, 1, False, False)
    sampling = ask.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (None, 1.0, 1.0, None)
    assert (sampling.stop, sampling.logprobs, dict(sampling.logit_bias)) == ((), None, {})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", HI * 4097),
        ("n", 0),
        ("n", 9),
        ("n", 1.5),
        ("n", True),
        ("max_tokens", 0),
        ("max_tokens", "5"),
        ("max_completion_tokens", -1),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", True),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", float("inf")),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repeat_penalty", 0),
        ("seed", 1.0),
        ("seed", 2**64),
        ("stop", ""),
        ("stop", ["a"] * 17),
        ("stop", ["x" * 1025]),
        ("stop", 5),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"9999999999": 1}),
        ("logit_bias", {"٣": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"1": "x"}),
        ("logit_bias", [1]),
        ("logit_bias", {str(token): 0 for token in range(1025)}),
        ("logprobs", 2),
        ("top_logprobs", 21),
        ("top_logprobs", 2),
        ("stream", "yes"),
        ("stream_options", True),
        ("model", 5),
        ("messages", []),
        ("messages", None),
        ("tools", {}),
        ("tools", [TOOL] * 129),
        ("tools", [TOOL, TOOL]),
        ("tool_choice", "required"),
        ("tool_choice", "sometimes"),
        ("tool_choice", 5),
        ("tool_choice", {"type": "function", "function": {"name": "clock"}}),
        ("parallel_tool_calls", "no"),
        ("functions", [{}]),
        ("response_format", "json"),
        ("response_format", {"type": "xml"}),
        ("grammar", 5),
        ("grammar", ""),
        ("grammar", "x" * (64 << 10) + "x"),
        ("modalities", ["text", "audio"]),
    ],
)
def test_wrong_values_are_refused_by_name(field: str, value: Any) -> None:
    assert refusal(**{field: value})[1] == field


def test_sixteen_stops_and_a_lone_string_are_taken() -> None:
    assert chat(stop=["s"] * 16).sampling.stop == ("s",) * 16
    assert chat(stop="END").sampling.stop == ("END",)
    assert chat(stop=None).sampling.stop == ()


def test_null_means_absent() -> None:
    assert chat(n=None, seed=None, temperature=None, stream=None, tools=None, stop=None) == chat()


def test_max_completion_tokens_wins_over_its_old_name() -> None:
    assert chat(max_tokens=5).sampling.max_tokens == 5
    assert chat(max_completion_tokens=6).sampling.max_tokens == 6
    assert chat(max_tokens=5, max_completion_tokens=6).sampling.max_tokens == 6


def test_tools_that_must_not_be_called_are_no_hindrance() -> None:
    assert chat(tools=[{"type": "function"}], tool_choice="none") == chat()
    assert chat(tools=[], response_format={"type": "text"}) == chat()


def test_tools_are_read_with_all_that_they_say() -> None:
    schema = {"type": "object", "properties": {"zone": {"type": "string"}}}
    function = {"name": "clock", "description": "Tells the time.", "parameters": schema, "strict": True}
    ask = chat(tools=[{"type": "function", "function": function}], parallel_tool_calls=False)
    assert ask.tools == (Tool("clock", "Tells the time.", schema),)
    assert ask.choice == ToolChoice("auto", "", parallel=False)
    assert chat(tools=[TOOL], tool_choice="required").choice == ToolChoice("required")
    named = {"type": "function", "function": {"name": "clock"}}
    assert chat(tools=[TOOL], tool_choice=named).choice == ToolChoice("named", "clock", parallel=False)


@pytest.mark.parametrize(
    ("tool", "param"),
    [
        (5, "tools[0]"),
        ({}, "tools[0].type"),
        ({"type": "retrieval"}, "tools[0].type"),
        ({"type": "function"}, "tools[0].function.name"),
        ({"type": "function", "function": {"name": "a b"}}, "tools[0].function.name"),
        ({"type": "function", "function": {"name": "x" * 129}}, "tools[0].function.name"),
        ({"type": "function", "function": {"name": "a", "parameters": []}}, "tools[0].function.parameters"),
        (
            {"type": "function", "function": {"name": "a", "parameters": {"x": "y" * 70_000}}},
            "tools[0].function.parameters",
        ),
    ],
)
def test_wrong_tools_are_refused_where_they_are_wrong(tool: Any, param: str) -> None:
    assert refusal(tools=[tool])[1] == param


@pytest.mark.parametrize(
    ("response_format", "param"),
    [
        ({}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "response_format.json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"schema": 5}}, "response_format.json_schema.schema"),
        ({"type": "grammar"}, "response_format.grammar"),
    ],
)
def test_shapes_that_say_nothing_are_refused(response_format: Any, param: str) -> None:
    assert refusal(response_format=response_format)[1] == param


def test_shapes_of_every_kind() -> None:
    schema = {"type": "null"}
    wrapped = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    assert chat(response_format=wrapped).shape == Shape("response_format", schema)
    assert chat(response_format={"type": "json_object"}).shape == Shape("response_format", {"type": "object"})
    assert chat(grammar='root ::= "a"').shape == Shape("grammar", grammar='root ::= "a"')
    own = {"type": "grammar", "grammar": 'root ::= "a"'}
    assert chat(response_format=own).shape == Shape("response_format.grammar", grammar='root ::= "a"')
    assert refusal(grammar='root ::= "a"', response_format={"type": "json_object"})[1] == "grammar"


def test_a_completion_is_bound_like_a_chat() -> None:
    bound = parse_completion(Fields({"prompt": "a", "grammar": 'root ::= "a"'}))
    assert bound.sampling.grammar == 'root ::= "a"'
    with pytest.raises(Refused) as caught:
        parse_completion(Fields({"prompt": "a", "grammar": "root ::= root"}))
    assert (caught.value.code, caught.value.param) == ("invalid_grammar", "grammar")


def test_past_calls_are_kept_as_they_were_made() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": '{"a": 1}'}, "index": 0}
    messages = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages += [{"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "noon"}]}]
    found = chat(messages=messages).prompts[0].messages
    called = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": '{"a": 1}'}}
    assert found[1] == {"role": "assistant", "content": "", "tool_calls": [called]}
    assert found[2] == {"role": "tool", "tool_call_id": "c1", "content": "noon"}


@pytest.mark.parametrize(
    ("call", "param"),
    [
        (5, "messages[0].tool_calls[0]"),
        ({}, "messages[0].tool_calls[0].function.name"),
        ({"function": {"name": "a", "arguments": 5}}, "messages[0].tool_calls[0].function.arguments"),
    ],
)
def test_wrong_past_calls_are_refused_where_they_are_wrong(call: Any, param: str) -> None:
    assert refusal(messages=[{"role": "assistant", "tool_calls": [call]}])[1] == param


def test_obfuscation_is_accepted_and_needs_no_doing() -> None:
    assert chat(stream_options={"include_obfuscation": False}) == chat(stream_options={"include_obfuscation": True})
    assert refusal(stream_options={"include_obfuscation": 1})[1] == "stream_options.include_obfuscation"


def test_seeds_count_up_and_wrap() -> None:
    ask = chat(seed=2**32 - 1, n=3)
    assert [request.sampling.seed for request in ask.requests(b"s" * 32)] == [2**32 - 1, 0, 1]
    assert [request.scope for request in ask.requests(b"s" * 32)] == [b"s" * 32] * 3
    assert [request.sampling.seed for request in chat(n=2).requests(None)] == [None, None]


@pytest.mark.parametrize(
    ("message", "code", "param"),
    [
        ("x", "invalid_type", "messages[0]"),
        ({"content": "x"}, "invalid_value", "messages[0].role"),
        ({"role": "function", "content": "x"}, "invalid_value", "messages[0].role"),
        ({"role": "user"}, "missing_required_parameter", "messages[0].content"),
        ({"role": "user", "content": 5}, "invalid_type", "messages[0].content"),
        ({"role": "user", "content": ["x"]}, "invalid_type", "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "missing_required_parameter", "messages[0].content[0].text"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "unsupported_content", "messages[0].content[0]"),
        ({"role": "user", "content": [{}]}, "unsupported_content", "messages[0].content[0]"),
    ],
)
def test_wrong_messages_are_refused_where_they_are_wrong(message: Any, code: str, param: str) -> None:
    assert refusal(messages=[message]) == (code, param)


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("https://attacker.invalid/x.png", "remote_url_refused"),
        ("file:///etc/passwd", "remote_url_refused"),
        ("//attacker.invalid/x", "remote_url_refused"),
        (None, "remote_url_refused"),
        ("data:image/png;base64,AAAA", "unsupported_content"),
    ],
)
def test_images_are_refused_and_remote_ones_by_name(url: Any, code: str) -> None:
    for image in ({"url": url}, url):
        part = {"type": "image_url", "image_url": image}
        assert refusal(messages=[{"role": "user", "content": [part]}])[0] == code


def test_an_assistants_refusal_part_is_its_text() -> None:
    message = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    assert chat(messages=[message]).prompts[0].messages[0]["content"] == "No."


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("x", (Prompt(text="x"),)),
        ("", (Prompt(text=""),)),
        ([5, 6], (Prompt(tokens=(5, 6)),)),
        (["a", [7]], (Prompt(text="a"), Prompt(tokens=(7,)))),
    ],
)
def test_prompts_of_every_kind(prompt: Any, expected: Any) -> None:
    assert parse_completion(Fields({"prompt": prompt})).prompts == expected


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [1, "a"]},
        {"prompt": [None]},
        {"prompt": [True]},
        {"prompt": ["a"] * 17},
        {"prompt": ["a"] * 9, "n": 2},
        {"prompt": "a", "echo": True},
        {"prompt": "a", "suffix": "b"},
        {"prompt": "a", "suffix": {}},
        {"prompt": "a", "best_of": 2},
        {"prompt": "a", "logprobs": True},
        {"prompt": "a", "response_format": {"type": "json_schema"}},
    ],
)
def test_completions_that_cannot_be_honoured_are_refused(fields: Any) -> None:
    with pytest.raises(Refused) as caught:
        parse_completion(Fields(fields))
    assert (caught.value.param or "").partition(".")[0] in {*fields, "prompt"}


def test_best_of_as_many_as_asked_is_no_choice() -> None:
    assert parse_completion(Fields({"prompt": "a", "n": 2, "best_of": 2})).n == 2
