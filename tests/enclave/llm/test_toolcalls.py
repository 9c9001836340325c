import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.enclave.llm.reasoning import MOST_BLANKS
from cloister.enclave.llm.toolcalls import (
    AnswerReader,
    CallArguments,
    CallForm,
    CallStarted,
    Part,
    Reading,
    Reasoning,
    Text,
    Tool,
    call_form_of,
)

NAMES = frozenset({"weather", "clock"})
ARGUMENTS = '{"city": "Łódź {\\"[", "days": [1, {"x": "}"}]}'


def shown(parts: list[Part]) -> list[Any]:
    """What a client makes of them: neighbours joined, calls as (name, arguments)."""
    found: list[Any] = []
    for part in parts:
        match part:
            case Text(text):
                if found and isinstance(found[-1], str):
                    found[-1] += text
                else:
                    found.append(text)
            case Reasoning(text):
                if found and isinstance(found[-1], list):
                    found[-1][0] += text
                else:
                    found.append([text])
            case CallStarted(index, _, name):
                assert index == sum(isinstance(one, tuple) for one in found)
                found.append((name, ""))
            case CallArguments(index, text):
                name, arguments = found[-1]
                assert index == sum(isinstance(one, tuple) for one in found) - 1
                found[-1] = (name, arguments + text)
    return found


def read(reading: Reading, *pieces: str) -> list[Any]:
    reader = AnswerReader(reading)
    parts = [part for piece in pieces for part in reader.feed(piece)]
    found = shown([*parts, *reader.finish()])
    assert reader.called == any(isinstance(one, tuple) for one in found)
    return found


CALL = ("weather", ARGUMENTS)
CLOCK = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
CASES: list[tuple[CallForm, str, list[Any]]] = [
    ("hermes", f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>', [CALL]),
    ("hermes", f'<tool_call>{{"arguments": {ARGUMENTS}, "name": "weather"}}</tool_call>', [CALL]),
    (
        "hermes",
        f'Let me see.\n\n<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>\n{CLOCK}\n',
        ["Let me see.", CALL, ("clock", "{}")],
    ),
    ("hermes", '<tool_call>\n{"name": "clock"}\n</tool_call> So.', [("clock", "{}"), " So."]),
    ("hermes", '<tool_call>{"name": "clock", "arguments": "{\\"a\\": 1}"}</tool_call>', [("clock", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "clock", "arguments": {"a": 1', [("clock", '{"a": 1')]),
    (
        "hermes",
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        ['<tool_call>{"name": "rm", "arguments": {}}</tool_call>'],
    ),
    ("hermes", "a <tool_call> b", ["a <tool_call> b"]),
    ("hermes", "1 < 2 <tool", ["1 < 2 <tool"]),
    ("hermes", '{"name": "clock", "arguments": {}}', ['{"name": "clock", "arguments": {}}']),
    ("hermes", " \n", [" \n"]),
    ("hermes", "", []),
    ("llama3", f'{{"name": "weather", "parameters": {ARGUMENTS}}}', [CALL]),
    ("llama3", f'<|python_tag|>{{"type": "function", "name": "weather", "parameters": {ARGUMENTS}}}', [CALL]),
    (
        "llama3",
        '{"name": "clock", "parameters": {}}; {"name": "clock", "parameters": {"b": 2}}',
        [("clock", "{}"), ("clock", '{"b": 2}')],
    ),
    ("llama3", '{"name": "Bob", "parameters": {}}', ['{"name": "Bob", "parameters": {}}']),
    ("llama3", '{"answer": {"name": "clock"}}', ['{"answer": {"name": "clock"}}']),
    ("llama3", '{"name": "clock", "age": 3}', ['{"name": "clock", "age": 3}']),
    ("llama3", "It is {five}.", ["It is {five}."]),
    ("llama3", " {", [" {"]),
    (
        "mistral",
        f'[TOOL_CALLS][{{"name": "weather", "arguments": {ARGUMENTS}}}, {{"name": "clock", "arguments": {{}}, "id": "abc"}}]',
        [CALL, ("clock", "{}")],
    ),
    ("mistral", '[{"name": "clock", "arguments": {}}]', [("clock", "{}")]),
    ("mistral", 'Well. [TOOL_CALLS] [{"name": "clock", "arguments": {}}]', ["Well.", ("clock", "{}")]),
    ("mistral", "[TO be or not]", ["[TO be or not]"]),
    ("mistral", "[1, 2]", ["[1, 2]"]),
    ("generic", f'[{{"name": "weather", "arguments": {ARGUMENTS}}}]', [CALL]),
    ("generic", '[{"name": "clock", "arguments": {}}, {"name": "clock", "arguments": {}}]', [("clock", "{}")] * 2),
    ("generic", "Hello [there]", ["Hello [there]"]),
]


@pytest.mark.parametrize(("form", "text", "expected"), CASES)
def test_calls_are_found_wherever_the_text_is_cut(form: CallForm, text: str, expected: list[Any]) -> None:
    reading = Reading(form, NAMES)
    assert read(reading, text) == expected
    assert read(reading, *text) == expected
    for cut in range(len(text) + 1):
        assert read(reading, text[:cut], text[cut:]) == expected


@given(st.data())
def test_text_without_calls_comes_out_as_it_went_in(data: st.DataObject) -> None:
    forms: list[CallForm] = ["hermes", "llama3", "mistral", "generic"]
    form = data.draw(st.sampled_from(forms))
    words = st.sampled_from(
        ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "{", "}", "[", "]", '"name"', ":", " ", "a"]
    )
    pieces = data.draw(st.lists(words, max_size=12))
    assert "".join(read(Reading(form, NAMES), *pieces)) == "".join(pieces)


def test_arguments_are_passed_on_as_they_come() -> None:
    reader = AnswerReader(Reading("hermes", NAMES))
    assert reader.feed('<tool_call>{"name": "weather", ') == []
    assert not reader.called
    started, first = reader.feed('"arguments": {"ci')
    assert isinstance(started, CallStarted)
    assert (started.index, started.name) == (0, "weather")
    assert first == CallArguments(0, '{"ci')
    assert reader.feed('ty": "x"}') == [CallArguments(0, 'ty": "x"}')]
    assert reader.feed("}\n</tool_call>") == reader.finish() == []
    assert reader.called


def test_text_is_not_held_back_when_no_call_can_follow_from_it() -> None:
    assert AnswerReader(Reading("hermes", NAMES)).feed("Hello, ") == [Text("Hello,")]
    assert AnswerReader(Reading("llama3", NAMES)).feed('{"answer": 1') == [Text('{"answer": 1')]


def test_ids_are_fresh_and_of_the_forms_kind() -> None:
    def ids(form: CallForm) -> list[str]:
        parts = AnswerReader(Reading(form, NAMES)).feed('[TOOL_CALLS][{"name": "clock", "arguments": {}}]' * 2)
        return [part.id for part in parts if isinstance(part, CallStarted)]

    assert all(len(one) == 9 and one.isalnum() for one in ids("mistral"))
    assert ids("mistral") != ids("mistral")
    parts = AnswerReader(Reading("generic", NAMES)).feed('[{"name": "clock", "arguments": {}}]')
    assert isinstance(parts[0], CallStarted)
    assert parts[0].id.startswith("call_")
    assert len(parts[0].id) == 29


def test_calls_beyond_the_most_are_dropped() -> None:
    two = '[{"name": "clock", "arguments": {}}, {"name": "weather", "arguments": {"a": 1}}]'
    assert read(Reading("generic", NAMES, most=1), two) == [("clock", "{}")]


def test_thoughts_come_before_calls() -> None:
    text = '<think>\nWhich <tool_call>?\n</think>\n\n<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
    reading = Reading("hermes", NAMES, "tagged")
    for cut in range(len(text)):
        assert read(reading, text[:cut], text[cut:]) == [["Which <tool_call>?"], ("clock", "{}")]


def test_without_names_or_form_all_is_text() -> None:
    text = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
    for reading in (Reading(), Reading("hermes"), Reading("", NAMES)):
        assert reading.plain
        assert read(reading, text) == [text]


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (None, ""),
        ("{{ messages[0].content }}", ""),
        ("{% if tools %}<tools>{{ tools | tojson }}</tools> answer with <tool_call>{% endif %}", "hermes"),
        ("{% if tools %}<tool_call><function=name>{% endif %}", "qwen-xml"),
        ("{% if tools %}<tool_call>{name}<arg_key>{% endif %}", "glm-xml"),
        ("{% if tools %}<｜tool▁calls▁begin｜>{% endif %}", "deepseek"),
        ("{{ '<｜tool▁calls▁begin｜>' }}", ""),
        ("{% if tools %}{{ '<|python_tag|>' }}{% endif %}", "llama3"),
        (
            "{{ '<|start_header_id|>' }}{% if tools %}" + '{"name": function name, "parameters": x}' + "{% endif %}",
            "llama3",
        ),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]", "mistral"),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]name[ARGS]", "mistral-args"),
        ("{% if tools %}{{ tools }}{% endif %}", ""),
    ],
)
def test_the_form_follows_from_the_templates_source(template: str | None, form: str) -> None:
    assert call_form_of(template) == form


def test_a_tool_is_told_to_templates_as_openai_writes_it() -> None:
    tool = Tool("clock", "Tells the time.", {"type": "object"})
    assert json.loads(json.dumps(tool.as_openai())) == {
        "type": "function",
        "function": {"name": "clock", "description": "Tells the time.", "parameters": {"type": "object"}},
    }


@pytest.mark.parametrize("form", ["hermes", "llama3"])
def test_what_is_long_and_still_no_call_is_text(form: CallForm) -> None:
    """Reading on would cost more with every character."""
    opens = "<tool_call>" if form == "hermes" else ""
    text = opens + '{"parameters": {"a": "' + "b" * 70_000
    reader = AnswerReader(Reading(form, NAMES))
    parts = reader.feed(text)
    assert sum(len(part.text) for part in parts if isinstance(part, Text)) > 65_000
    assert all(isinstance(part, Text) for part in [*parts, *reader.finish()])


FORMS: list[CallForm] = ["hermes", "llama3", "mistral", "generic", "qwen-xml"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("begin", ["", "a"])
def test_of_many_blanks_only_the_last_are_held_back(form: CallForm, begin: str) -> None:
    """Each further character would cost more than the one before."""
    reader = AnswerReader(Reading(form, NAMES))
    text = begin + " \n" * 5000
    held = len(text) - sum(len(part.text) for part in reader.feed(text) if isinstance(part, Text))
    assert held == MOST_BLANKS
    assert reader.finish() == [Text(text[-MOST_BLANKS:])]


@pytest.mark.parametrize("blanks", [MOST_BLANKS, MOST_BLANKS + 5])
def test_a_call_after_many_blanks_is_one_wherever_the_text_is_cut(blanks: int) -> None:
    text = " " * blanks + CLOCK
    expected = [*filter(None, [" " * (blanks - MOST_BLANKS)]), ("clock", "{}")]
    assert read(Reading("hermes", NAMES), text) == read(Reading("hermes", NAMES), *text) == expected


def test_what_follows_a_marker_and_begins_no_call_for_long_is_text() -> None:
    text = "[TOOL_CALLS]" + "[" * 5000
    parts = AnswerReader(Reading("mistral", NAMES)).feed(text)
    assert parts == [Text(text[:-1])]  # the last may begin a marker


def test_calls_far_apart_are_no_row() -> None:
    one = '{"name": "clock", "arguments": {}}'
    near, far = (f"[TOOL_CALLS][{one}{',' * count}{one}]" for count in (2000, 5000))
    assert read(Reading("mistral", NAMES), near) == [("clock", "{}")] * 2
    found = read(Reading("mistral", NAMES), far)
    assert found[0] == ("clock", "{}")
    assert found[1].endswith(f",{one}]")


def test_a_long_name_after_the_arguments_is_not_kept() -> None:
    text = '<tool_call>{"name": "clock", "arguments": {}, "' + "b" * 5000
    started, arguments, *rest = AnswerReader(Reading("hermes", NAMES)).feed(text)
    assert isinstance(started, CallStarted)
    assert arguments == CallArguments(0, "{}")
    assert [type(part) for part in rest] == [Text]


def test_what_else_a_call_says_after_its_arguments_may_be_long() -> None:
    text = '<tool_call>{"name": "clock", "arguments": {}, "id": "' + "b" * 5000 + '"}</tool_call>'
    assert read(Reading("hermes", NAMES), text) == [("clock", "{}")]
