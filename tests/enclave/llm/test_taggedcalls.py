"""Calls between tags: what models of each family write (in the form of their chat templates), and what broken ones do."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.enclave.llm.test_toolcalls import read

from cloister.enclave.llm.llama.templates import ChatTemplate
from cloister.enclave.llm.taggedcalls import FORMS, Kinds, kinds_of
from cloister.enclave.llm.toolcalls import AnswerReader, CallForm, CallStarted, Part, Reading, Text, call_form_of

NAMES = frozenset({"weather", "clock"})
KINDS: dict[str, Kinds] = {
    "weather": {"city": frozenset({"string"}), "days": frozenset({"integer"}), "at": frozenset({"string", "null"})}
}
TAGGED: list[CallForm] = ["mistral-args", "deepseek", "qwen-xml", "glm-xml"]

ARGUMENTS = '{"city": "Łódź {\\"[", "days": [1, {"x": "}"}]}'
CALL = ("weather", ARGUMENTS)
BEGIN, SEP, END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
ROW, ROW_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CLOCK = f"{BEGIN}clock{SEP}{{}}{END}"


def qwen(name: str, **values: str) -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


def glm(name: str, **values: str) -> str:
    inner = "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in values.items())
    return f"<tool_call>{name}\n{inner}</tool_call>"


CASES: list[tuple[CallForm, str, list[Any]]] = [
    ("mistral-args", f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}", [CALL]),
    ("mistral-args", f"[TOOL_CALLS]weather[CALL_ID]a1b2c3d4e[ARGS]{ARGUMENTS}", [CALL]),
    (
        "mistral-args",
        f"I look.\n[TOOL_CALLS]weather[ARGS]{ARGUMENTS}[TOOL_CALLS]clock[ARGS] {{}}",
        ["I look.", CALL, ("clock", "{}")],
    ),
    ("mistral-args", '[TOOL_CALLS]clock[ARGS]{"a": 1', [("clock", '{"a": 1')]),
    ("mistral-args", "[TOOL_CALLS]clock[ARGS]", ["[TOOL_CALLS]clock[ARGS]"]),
    ("mistral-args", "[TOOL_CALLS]rm[ARGS]{}", ["[TOOL_CALLS]rm[ARGS]{}"]),
    ("mistral-args", "[TOOL_CALLS]clock[ARGS]now", ["[TOOL_CALLS]clock[ARGS]now"]),
    ("mistral-args", '[TOOL_CALLS][{"name": "clock"}]', ['[TOOL_CALLS][{"name": "clock"}]']),
    ("mistral-args", "[TOOL_CALLS][TOOL_CALLS]clock[ARGS]{}", ["[TOOL_CALLS]", ("clock", "{}")]),
    (
        "mistral-args",
        f"[TOOL_CALLS]clock[CALL_ID]{'x' * 99}[ARGS]{{}}",
        [f"[TOOL_CALLS]clock[CALL_ID]{'x' * 99}[ARGS]{{}}"],
    ),
    ("mistral-args", '[{"name": "clock", "arguments": {}}]', ['[{"name": "clock", "arguments": {}}]']),
    ("deepseek", f"{ROW}{BEGIN}weather{SEP}{ARGUMENTS}{END}{ROW_END}", [CALL]),
    ("deepseek", f"I look.\n\n{ROW}{CLOCK}\n{CLOCK}{ROW_END}", ["I look.", ("clock", "{}"), ("clock", "{}")]),
    ("deepseek", f"{ROW}{BEGIN}function{SEP}weather\n```json\n{ARGUMENTS}\n```{END}\n{ROW_END}", [CALL]),
    ("deepseek", f"{ROW}{CLOCK}{ROW_END} So.", [("clock", "{}"), " So."]),
    ("deepseek", f"{ROW}{CLOCK}", [("clock", "{}")]),
    ("deepseek", f"{ROW}{CLOCK} So.", [("clock", "{}"), " So."]),
    ("deepseek", f"{ROW}{ROW_END}", [f"{ROW}{ROW_END}"]),
    ("deepseek", f"{ROW}{BEGIN}rm{SEP}{{}}{END}", [f"{ROW}{BEGIN}rm{SEP}{{}}{END}"]),
    ("deepseek", f"{ROW}{BEGIN}function{SEP}clock\n{{}}{END}", [f"{ROW}{BEGIN}function{SEP}clock\n{{}}{END}"]),
    ("deepseek", f"{ROW}{ROW}{CLOCK}", [ROW, ("clock", "{}")]),
    ("qwen-xml", qwen("weather", city="Łódź", days="3"), [("weather", '{"city": "Łódź", "days": 3}')]),
    ("qwen-xml", f"I look.\n{qwen('clock')}\n{qwen('clock')}\n", ["I look.", ("clock", "{}"), ("clock", "{}")]),
    (
        "qwen-xml",
        '<tool_call><function=weather><parameter=city>\n\n 5 <b>"\n\n</parameter></function></tool_call> So.',
        [("weather", '{"city": "\\n 5 <b>\\"\\n"}'), " So."],
    ),
    ("qwen-xml", qwen("weather", city="5", at="null"), [("weather", '{"city": "5", "at": null}')]),
    ("qwen-xml", qwen("clock", a="True", b="[1, 2]", c="{oops"), [("clock", '{"a": true, "b": [1, 2], "c": "{oops"}')]),
    ("qwen-xml", qwen("clock", a="NaN", b="1e999", c='"q"'), [("clock", '{"a": "NaN", "b": 1e999, "c": "\\"q\\""}')]),
    (
        "qwen-xml",
        "<tool_call><function=clock><parameter=a>1</parameter><parameter=a>2</parameter></function></tool_call>",
        [("clock", '{"a": 1}')],
    ),
    ("qwen-xml", "<tool_call>\n<function=weather>\n<parameter=city>\nLon", [("weather", "{")]),
    ("qwen-xml", qwen("rm", path="/"), [qwen("rm", path="/")]),
    ("qwen-xml", "<tool_call><tool_call><function=clock></function></tool_call>", ["<tool_call>", ("clock", "{}")]),
    (
        "qwen-xml",
        '<tool_call>{"name": "clock", "arguments": {}}</tool_call>',
        ['<tool_call>{"name": "clock", "arguments": {}}</tool_call>'],
    ),
    ("qwen-xml", "a <tool_call> b <function=clock>", ["a <tool_call> b <function=clock>"]),
    ("glm-xml", glm("weather", city="Łódź", days="3"), [("weather", '{"city": "Łódź", "days": 3}')]),
    ("glm-xml", f"\nI look.\n{glm('clock')}\n{glm('clock')}", ["\nI look.", ("clock", "{}"), ("clock", "{}")]),
    ("glm-xml", "<tool_call>clock</tool_call>", [("clock", "{}")]),
    (
        "glm-xml",
        "<tool_call>weather<arg_key>city</arg_key><arg_value>\n5</arg_value></tool_call>",
        [("weather", '{"city": "\\n5"}')],
    ),
    ("glm-xml", "<tool_call>clock is what I would call", ["<tool_call>clock is what I would call"]),
    ("glm-xml", "<tool_call>clock\nis what I would call", ["<tool_call>clock\nis what I would call"]),
    ("glm-xml", "<tool_call>clock<arg_key>a</arg_key><arg_value>1", [("clock", "{")]),
    ("glm-xml", glm("rm", path="/"), [glm("rm", path="/")]),
]


@pytest.mark.parametrize(("form", "text", "expected"), CASES)
def test_calls_are_found_wherever_the_text_is_cut(form: CallForm, text: str, expected: list[Any]) -> None:
    reading = Reading(form, NAMES, kinds=KINDS)
    assert read(reading, text) == expected
    assert read(reading, *text) == expected
    for cut in range(len(text) + 1):
        assert read(reading, text[:cut], text[cut:]) == expected


MARKS = [
    BEGIN,
    SEP,
    END,
    ROW,
    ROW_END,
    "[TOOL_CALLS]",
    "[ARGS]",
    "[CALL_ID]",
    "<tool_call>",
    "</tool_call>",
    "<function=",
]
WORDS = [*MARKS, "<arg_key>", "function", "```json", "weath", "\n", " ", "{", "}", "<", "a", "ł"]


@given(st.sampled_from(TAGGED), st.lists(st.sampled_from(WORDS), max_size=14))
def test_text_without_calls_comes_out_as_it_went_in(form: CallForm, pieces: list[str]) -> None:
    assert "".join(read(Reading(form, NAMES), *pieces)) == "".join(pieces)


@given(
    st.sampled_from(TAGGED),
    st.lists(st.sampled_from([*WORDS, "clock", "clock>", "1", '"', "</function>"]), max_size=20),
)
def test_whatever_comes_the_parts_do_not_depend_on_where_it_was_cut(form: CallForm, pieces: list[str]) -> None:
    text = "".join(pieces)
    reading = Reading(form, NAMES)
    assert read(reading, *text) == read(reading, *pieces) == read(reading, text)


def test_a_calls_name_is_told_before_its_arguments_have_come() -> None:
    for form, head in (("qwen-xml", "<tool_call>\n<function=clock>"), ("mistral-args", "[TOOL_CALLS]clock[ARGS]{")):
        reader = AnswerReader(Reading(form, NAMES))  # type: ignore[arg-type]
        (started, *_) = reader.feed(head)
        assert isinstance(started, CallStarted)
        assert started.name == "clock"


def test_arguments_between_tags_are_passed_on_one_by_one() -> None:
    reader = AnswerReader(Reading("glm-xml", NAMES))
    first: list[Part] = reader.feed("<tool_call>clock\n<arg_key>a</arg_key><arg_value>1</arg_value>")
    then = reader.feed("<arg_key>b</arg_key><arg_value>2</arg_value></tool_call>")
    assert ["".join(getattr(part, "text", "") for part in parts) for parts in (first, then)] == ['{"a": 1', ', "b": 2}']


def test_text_is_not_held_back_longer_than_a_call_may_follow_from_it() -> None:
    assert AnswerReader(Reading("qwen-xml", NAMES)).feed("<tool_call>\n<function=rm") == [
        Text("<tool_call>\n<function=rm")
    ]
    assert AnswerReader(Reading("deepseek", NAMES)).feed(f"{ROW}{BEGIN}rm") == [Text(f"{ROW}{BEGIN}rm")]


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("qwen-xml", "<tool_call>" * 20_000),
        ("qwen-xml", "<tool_call><function=clock><parameter=a>" + "</parameter" * 20_000),
        ("glm-xml", "<tool_call>clock\n<arg_key>" + "x" * 200_000),
        ("mistral-args", "[TOOL_CALLS]clock[CALL_ID]" * 8_000),
        ("mistral-args", "[TOOL_CALLS]clock[ARGS]" + "{" * 200_000),
        ("deepseek", ROW * 10_000),
        ("deepseek", ROW + CLOCK * 4_000),
        ("qwen-xml", qwen("clock", a="[" * 100_000)),
    ],
)
def test_a_hostile_answer_takes_time_in_proportion_to_its_length(form: CallForm, text: str) -> None:
    began = time.process_time()
    read_all = AnswerReader(Reading(form, NAMES))
    read_all.feed(text)
    read_all.finish()
    assert time.process_time() - began < 5


def test_calls_beyond_the_most_are_dropped_with_all_that_belongs_to_them() -> None:
    assert read(Reading("deepseek", NAMES, most=1), f"{ROW}{CLOCK}{CLOCK}{ROW_END}") == [("clock", "{}")]
    assert read(Reading("qwen-xml", NAMES, most=1), qwen("clock") + qwen("weather", city="x")) == [("clock", "{}")]


def test_mistrals_identifiers_have_nine_characters() -> None:
    (started, *_) = AnswerReader(Reading("mistral-args", NAMES)).feed("[TOOL_CALLS]clock[ARGS]{}")
    assert isinstance(started, CallStarted)
    assert len(started.id) == 9


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "perhaps": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "unit": {"$ref": "#/$defs/Unit"},
        "several": {"type": ["integer", "string"]},
        "fixed": {"const": 1},
        "any": {},
        "half": {"anyOf": [{"type": "string"}, {"not": {}}]},
        "loop": {"$ref": "#/properties/loop"},
        "gone": {"$ref": "#/nowhere/at/all"},
        "wrong": 5,
    },
    "$defs": {"Unit": {"enum": ["1", "2"]}},
}


def test_what_a_parameter_may_be_follows_from_its_schema() -> None:
    assert kinds_of(SCHEMA) == {
        "text": {"string"},
        "perhaps": {"string", "null"},
        "unit": {"string"},
        "several": {"integer", "string"},
        "fixed": {"integer", "number"},
    }
    assert kinds_of({}) == kinds_of({"properties": []}) == {}


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("text", "5", "5"),
        ("text", "None", "None"),
        ("perhaps", "null", None),
        ("perhaps", "None", None),
        ("perhaps", "nullable", "nullable"),
        ("unit", "1", "1"),
        ("several", "5", 5),
        ("several", "5.5", "5.5"),
        ("any", "5", 5),
        ("any", '{"a": [1]}', {"a": [1]}),
        ("any", "five", "five"),
        ("fixed", "one", "one"),
    ],
)
def test_a_value_without_quotes_is_what_its_schema_says(key: str, text: str, value: Any) -> None:
    for form, written in (("qwen-xml", qwen("clock", **{key: text})), ("glm-xml", glm("clock", **{key: text}))):
        reading = Reading(form, NAMES, kinds={"clock": kinds_of(SCHEMA)})  # type: ignore[arg-type]
        ((_, arguments),) = read(reading, written)
        assert json.loads(arguments) == {key: value}


# Templates in the words of this test, each in the form that its family's published one has.

LISTED = "{% if tools %}You may use: {% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}"
TEMPLATES: dict[CallForm, str] = {
    "mistral-args": LISTED
    + """{% for m in messages %}{% for tool in m.tool_calls or [] %}{% set arguments = tool['function']['arguments'] %}
{%- if arguments is not string %}{% set arguments = arguments|tojson|safe %}{% endif %}
{{- '[TOOL_CALLS]' + tool['function']['name'] + '[ARGS]' + arguments }}{% endfor %}{% endfor %}""",
    "deepseek": LISTED
    + """{% for m in messages %}{% if m['tool_calls'] is defined %}{{ '<｜tool▁calls▁begin｜>' }}
{%- for tool in m['tool_calls'] %}{{ '<｜tool▁call▁begin｜>' + tool['function']['name'] + '<｜tool▁sep｜>' + tool['function']['arguments'] + '<｜tool▁call▁end｜>' }}
{%- endfor %}{{ '<｜tool▁calls▁end｜>' }}{% endif %}{% endfor %}""",
    "qwen-xml": LISTED
    + """{% for m in messages %}{% for call in m.tool_calls or [] %}{{ '\\n<tool_call>\\n<function=' + call.function.name + '>\\n' }}
{%- for name, value in call.function.arguments|items %}{{ '<parameter=' + name + '>\\n' }}
{{- value | tojson if value is mapping or (value is sequence and value is not string) else value | string }}{{ '\\n</parameter>\\n' }}
{%- endfor %}{{ '</function>\\n</tool_call>' }}{% endfor %}{% endfor %}""",
    "glm-xml": LISTED
    + """{% for m in messages %}{% for call in m.tool_calls or [] %}{{ '\\n<tool_call>' + call.function.name }}
{% set _args = call.function.arguments or {} %}{% for k, v in _args.items() %}
<arg_key>{{ k }}</arg_key>
<arg_value>{{ v | tojson if v is not string else v }}</arg_value>
{% endfor %}</tool_call>{% endfor %}{% endfor %}""",
}
GIVEN = {"city": "Łódź\n5", "days": 3, "sure": True, "where": {"x": [1.5, None]}, "note": '<b> & "quotes"'}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "note": {"type": "string"}}}


@pytest.mark.parametrize("form", TAGGED)
def test_what_a_template_writes_of_a_past_call_is_read_as_that_call(form: CallForm) -> None:
    source = TEMPLATES[form]
    assert call_form_of(source) == form
    calls = [{"type": "function", "function": {"name": "weather", "arguments": json.dumps(GIVEN)}}] * 2
    template = ChatTemplate(source, control=(), bos="", eos="")
    text = "".join(text for text, _ in template.render([{"role": "assistant", "tool_calls": calls}], deadline=60))
    found = read(Reading(form, NAMES, kinds={"weather": kinds_of(PARAMETERS)}), *text)
    assert [(name, json.loads(arguments)) for name, arguments in found] == [("weather", GIVEN)] * 2


def test_every_form_is_tried_here() -> None:
    assert set(TAGGED) == set(FORMS) == TEMPLATES.keys()
