import json
from dataclasses import replace
from typing import Any

import pytest
from tests.enclave.llm.conftest import MODEL
from tests.enclave.llm.schema_check import is_valid, random_text

from cloister.enclave.llm.engine import ModelInfo
from cloister.enclave.llm.envelope import Refused
from cloister.enclave.llm.grammar import Grammar
from cloister.enclave.llm.reasoning import Thinking
from cloister.enclave.llm.structured import Plan, Shape, bind_text, plan_answer
from cloister.enclave.llm.toolcalls import (
    CALL_FORMS,
    AnswerReader,
    CallArguments,
    CallForm,
    CallStarted,
    Reading,
    Text,
    Tool,
    ToolChoice,
)

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"zone": {"enum": ["a", "b\"'"]}}, "required": ["zone"]}
TOOLS = (Tool("clock", "Tells the time.", SCHEMA), Tool("dice"), Tool("note", "", {"type": "object"}))
SCHEMAS = {"clock": SCHEMA, "dice": {"type": "object", "maxProperties": 0}, "note": {"type": "object"}}
JSON = Shape("response_format", {"type": "null"})
OWN = Shape("grammar", grammar='root ::= "yes" | "no"')
FORMS = CALL_FORMS


def model(calls: CallForm = "", thinking: Thinking = "") -> ModelInfo:
    return replace(MODEL, calls=calls, thinking=thinking)


def calls_of(plan: Plan, seed: int) -> tuple[str, list[tuple[str, Any]]]:
    """What the plan's reader finds in some text that its grammar takes: the text said, and the calls."""
    assert plan.grammar is not None
    reader = AnswerReader(plan.reading)
    parts = [*reader.feed(random_text(Grammar(plan.grammar), seed)), *reader.finish()]
    names = [part.name for part in parts if isinstance(part, CallStarted)]
    arguments = [""] * len(names)
    for part in parts:
        if isinstance(part, CallArguments):
            arguments[part.index] += part.text
    said = "".join(part.text for part in parts if isinstance(part, Text))
    return said, [(name, json.loads(text)) for name, text in zip(names, arguments, strict=True)]


@pytest.mark.parametrize("thinking", ["", "tagged", "opened"])
@pytest.mark.parametrize("form", FORMS)
def test_a_forced_answer_is_calls_and_nothing_else(form: CallForm, thinking: Thinking) -> None:
    plan = plan_answer(model(form, thinking), TOOLS, ToolChoice("required"))
    found = [calls_of(plan, seed) for seed in range(40)]
    assert {said for said, _ in found} == {""}
    calls = [call for _, several in found for call in several]
    assert {name for name, _ in calls} == {"clock", "dice", "note"}
    assert all(is_valid(arguments, SCHEMAS[name]) for name, arguments in calls)
    assert all(several for _, several in found)
    assert (max(len(several) for _, several in found) > 1) == (form != "llama3")


@pytest.mark.parametrize("form", FORMS)
def test_a_named_tool_is_the_only_one_called(form: CallForm) -> None:
    plan = plan_answer(model(form), TOOLS, ToolChoice("named", "clock", parallel=False))
    for seed in range(20):
        said, calls = calls_of(plan, seed)
        assert (said, [name for name, _ in calls]) == ("", ["clock"])
    assert len(plan.tools) == (3 if form else 0), "a template that knows tools is told of all"


def test_a_template_that_knows_no_tools_is_told_so_unless_a_call_is_forced() -> None:
    with pytest.raises(Refused) as caught:
        plan_answer(model(), TOOLS, ToolChoice())
    assert (caught.value.status, caught.value.param) == (400, "tools")
    assert plan_answer(model(), TOOLS, ToolChoice("none")) == plan_answer(model(), (), ToolChoice()) == Plan()


def test_left_to_itself_a_model_is_free_and_its_calls_are_read() -> None:
    plan = plan_answer(model("hermes", "tagged"), TOOLS, ToolChoice())
    assert plan.grammar is None
    assert plan.reading == Reading("hermes", frozenset(SCHEMAS), "tagged", 16)
    assert [tool["function"]["name"] for tool in plan.tools] == ["clock", "dice", "note"]
    assert plan_answer(model("hermes"), TOOLS, ToolChoice(parallel=False)).reading.most == 1


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("", "generic")])
def test_beside_a_schema_a_model_may_call_or_answer(form: CallForm) -> None:
    plan = plan_answer(model(form), TOOLS, ToolChoice(), JSON)
    found = [calls_of(plan, seed) for seed in range(60)]
    assert {bool(calls) for _, calls in found} == {True, False}
    assert {said for said, calls in found if not calls} == {"null"}


@pytest.mark.parametrize("form", ["qwen-xml", "glm-xml"])
def test_calls_without_quotes_are_read_by_their_schemas_unless_a_grammar_makes_json_of_them(form: CallForm) -> None:
    plan = plan_answer(model(form), TOOLS, ToolChoice())
    assert (plan.reading.form, plan.reading.kinds["clock"]) == (form, {"zone": frozenset({"string"})})
    assert plan_answer(model(form), TOOLS, ToolChoice("required")).reading.form == "hermes"
    assert plan_answer(model(form), TOOLS, ToolChoice(), JSON).reading.form == "hermes"


@pytest.mark.parametrize("thinking", ["", "tagged", "opened"])
def test_a_schema_binds_the_whole_answer(thinking: Thinking) -> None:
    plan = plan_answer(model("", thinking), (), ToolChoice(), JSON)
    assert [calls_of(plan, seed) for seed in range(3)] == [("null", [])] * 3


def test_a_grammar_is_taken_as_it_is() -> None:
    plan = plan_answer(model("hermes", "opened"), TOOLS, ToolChoice("none"), OWN)
    assert (plan.grammar, plan.reading, plan.tools) == (OWN.grammar, Reading(), ())
    assert bind_text(OWN) == OWN.grammar
    with pytest.raises(Refused) as caught:
        plan_answer(model("hermes"), TOOLS, ToolChoice(), OWN)
    assert caught.value.param == "grammar"


def test_what_cannot_be_bound_is_refused_by_name() -> None:
    bad = (Tool("x", "", {"type": "object", "properties": {"a": {"not": {}}}}),)
    cases: list[tuple[str, Any]] = [
        ("tools", lambda: plan_answer(model(), bad, ToolChoice("required"))),
        ("tools", lambda: plan_answer(model(), (Tool("x", "", {"$ref": "#"}),), ToolChoice("required"))),
        ("response_format", lambda: bind_text(Shape("response_format", {"not": {}}))),
        ("grammar", lambda: bind_text(Shape("grammar", grammar="root ::= root"))),
    ]
    for param, plan in cases:
        with pytest.raises(Refused) as caught:
            plan()
        assert (caught.value.status, caught.value.param) == (400, param)
    assert plan_answer(model("hermes"), bad, ToolChoice()).grammar is None, "what need not be bound may say anything"
