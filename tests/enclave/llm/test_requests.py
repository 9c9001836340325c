from typing import Any

import pytest

from cloister.enclave.llm.engine import Prompt
from cloister.enclave.llm.envelope import Refused
from cloister.enclave.llm.fields import Fields
from cloister.enclave.llm.requests import parse_chat, parse_completion

HI = [{"role": "user", "content": "Hi"}]


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
        ("tools", [{"type": "function"}]),
        ("functions", [{}]),
        ("response_format", {"type": "json_object"}),
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
        {"prompt": "a", "best_of": 2},
        {"prompt": "a", "logprobs": True},
        {"prompt": "a", "response_format": {"type": "json_schema"}},
    ],
)
def test_completions_that_cannot_be_honoured_are_refused(fields: Any) -> None:
    with pytest.raises(Refused) as caught:
        parse_completion(Fields(fields))
    assert caught.value.param in {*fields, "prompt"}


def test_best_of_as_many_as_asked_is_no_choice() -> None:
    assert parse_completion(Fields({"prompt": "a", "n": 2, "best_of": 2})).n == 2
