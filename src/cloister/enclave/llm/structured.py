"""Answers of a demanded shape: what a client asks for (a schema, a grammar, a call of a tool) becomes one grammar."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cloister.enclave.llm.engine import ModelInfo
from cloister.enclave.llm.fields import Fields, refuse
from cloister.enclave.llm.grammar import Grammar
from cloister.enclave.llm.patterns import literal
from cloister.enclave.llm.reasoning import Thinking
from cloister.enclave.llm.schemas import JSON_OBJECT, SchemaWriter
from cloister.enclave.llm.taggedcalls import kinds_of
from cloister.enclave.llm.toolcalls import PLAIN, CallForm, Reading, Tool, ToolChoice
from cloister.errors import WrongUse

__all__ = ["ANY", "Plan", "Shape", "bind_text", "parse_shape", "plan_answer"]

MAX_GRAMMAR = 64 << 10
"""Characters of a client's own grammar."""
MAX_CALLS = 16
"""Calls that one answer may make."""
_UNQUOTED: Collection[CallForm] = ("qwen-xml", "glm-xml")
NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class Shape:
    """What an answer must look like: JSON of `schema`, or what the GBNF text `grammar` says; neither: anything.

    `field` is the request's field that asked for it.
    """

    field: str = ""
    schema: Mapping[str, Any] | None = None
    grammar: str | None = None


ANY = Shape()


@dataclass(frozen=True, slots=True)
class Plan:
    """How to ask the engine, and how to read its answer: for `Prompt.tools`, `Sampling.grammar`, `AnswerReader`."""

    tools: tuple[Mapping[str, Any], ...] = ()
    grammar: str | None = None
    reading: Reading = PLAIN


def parse_shape(fields: Fields) -> Shape:
    """From `response_format` (text, json_object, json_schema, grammar) or `grammar`. Raises `Refused` (400)."""
    own = fields.text("grammar")
    wanted = fields.object("response_format")
    kind = wanted.text("type")
    if kind is None and fields.has("response_format"):
        refuse("response_format.type", "'response_format.type' is missing.", "missing_required_parameter")
    if own is not None:
        if kind not in (None, "text"):
            refuse("grammar", "'grammar' and 'response_format' cannot both be set.")
        return _own_grammar("grammar", own)
    if kind in (None, "text"):
        return ANY
    if kind == "json_object":
        return Shape("response_format", wanted.object("schema").values if wanted.has("schema") else JSON_OBJECT)
    if kind == "json_schema":
        return Shape("response_format", _schema(wanted.object("json_schema")))
    if kind != "grammar":
        message = "'response_format.type' must be text, json_object, json_schema or grammar."
        refuse("response_format", message, "unsupported_parameter")
    return _own_grammar("response_format.grammar", wanted.text("grammar"))


def _schema(fields: Fields) -> Mapping[str, Any]:
    if not fields.has("schema"):
        name = fields.name("schema")
        refuse(name, f"'{name}' is missing.", "missing_required_parameter")
    return fields.object("schema").values


def _own_grammar(field: str, text: str | None) -> Shape:
    if not text:
        refuse(field, f"'{field}' is missing or empty.", "missing_required_parameter")
    if len(text) > MAX_GRAMMAR:
        refuse(field, f"'{field}' may hold {MAX_GRAMMAR} characters at most.")
    return Shape(field, grammar=text)


def plan_answer(model: ModelInfo, tools: Sequence[Tool], choice: ToolChoice, shape: Shape = ANY) -> Plan:
    """What must go to `model` so that its answer is as asked for.

    A forced call, a schema and a grammar bind the answer: it is valid unless it ended for its length. A forced call
    goes before `shape`. Left to itself (auto), a model that is bound to a schema may call a tool in its stead.

    Raises: Refused (400): a grammar that is wrong or too large, a schema that no grammar can say, tools for a model
    whose template knows none, unless a call is forced.
    """
    offered = () if choice.mode == "none" else tuple(tools)
    if not offered:
        return Plan((), *_shaped(shape, model.thinking))
    if choice.forced:
        return _forced(model, offered, choice)
    form = model.calls
    if not form:
        message = (
            "This model's chat template knows no tools, or writes calls in a form that is not known here. A "
            "'tool_choice' of 'required', or a named one, forces a call all the same; 'none' leaves tools out."
        )
        refuse("tools", message, "unsupported_parameter")
    if shape.grammar is not None:
        refuse(
            shape.field, f"'{shape.field}' leaves no room for 'tools': set 'tool_choice' to 'none', or force a call."
        )
    grammar = None
    if shape.schema is not None:
        form = _bound(form)
        writer = SchemaWriter()
        answer, calls = writer.add(shape.schema, shape.field), _calls(writer, offered, form, choice)
        grammar = _checked(writer.grammar(_opening(model.thinking, f"( {answer} | {calls} )")), shape.field)
    most = MAX_CALLS if choice.parallel else 1
    kinds = {tool.name: kinds_of(tool.parameters) for tool in offered} if form in _UNQUOTED else {}
    return Plan(_rendered(offered), grammar, Reading(form, _names(offered), model.thinking, most, kinds))


def _forced(model: ModelInfo, tools: Sequence[Tool], choice: ToolChoice) -> Plan:
    wanted = [tool for tool in tools if choice.mode == "required" or tool.name == choice.name]
    form = _bound(model.calls or "generic")
    writer = SchemaWriter()
    calls = _calls(writer, wanted, form, choice)
    grammar = _checked(writer.grammar(_opening(model.thinking, calls)), "tools")
    return Plan(_rendered(tools) if model.calls else (), grammar, Reading(form, _names(wanted), model.thinking))


def _bound(form: CallForm) -> CallForm:
    """How a grammar has a model of this form write its calls: whose own has values without quotes writes JSON."""
    return "hermes" if form in _UNQUOTED else form


def _shaped(shape: Shape, thinking: Thinking) -> tuple[str | None, Reading]:
    if shape.grammar is not None:
        return _checked(shape.grammar, shape.field), PLAIN
    if shape.schema is None:
        return None, Reading(thinking=thinking)
    writer = SchemaWriter()
    answer = writer.add(shape.schema, shape.field)
    return _checked(writer.grammar(_opening(thinking, answer)), shape.field), Reading(thinking=thinking)


def bind_text(shape: Shape) -> str | None:
    """The grammar for an answer of this shape where no chat template stands before it. Raises: Refused (400)."""
    return _shaped(shape, "")[0]


def _opening(thinking: Thinking, answer: str) -> str:
    """Where the template has opened the model's thoughts already, they are closed first."""
    return f'"</think>\\n\\n" {answer}' if thinking == "opened" else answer


def _rendered(tools: Sequence[Tool]) -> tuple[Mapping[str, Any], ...]:
    return tuple(tool.as_openai() for tool in tools)


def _names(tools: Sequence[Tool]) -> frozenset[str]:
    return frozenset(tool.name for tool in tools)


def _calls(writer: SchemaWriter, tools: Sequence[Tool], form: CallForm, choice: ToolChoice) -> str:
    """An expression for one call or more of these tools, as a model of this form writes them."""
    options = []
    for tool in tools:
        arguments = writer.add(tool.parameters or NO_ARGUMENTS, "tools")
        head, tail = _around(tool.name, form)
        options.append(f"{literal(head)} {arguments} {literal(tail)}".rstrip())
    call = writer.rule(" | ".join(options))
    more = MAX_CALLS - 1 if choice.parallel else 0
    match form:
        case "llama3":
            return call
        case "hermes":
            begin, end = literal("<tool_call>\n"), literal("\n</tool_call>")
            return writer.rule(f'{begin} {call} {end} ( "\\n" {begin} {call} {end} ){{0,{more}}}')
        case "mistral-args":
            return writer.rule(f"{call} ( {call} ){{0,{more}}}")
        case "deepseek":
            begin, end = literal("<｜tool▁calls▁begin｜>"), literal("<｜tool▁calls▁end｜>")
            return writer.rule(f"{begin} {call} ( {call} ){{0,{more}}} {end}")
        case "mistral":
            return writer.rule(f'"[TOOL_CALLS][" {call} ( ", " {call} ){{0,{more}}} "]"')
    return writer.rule(f'"[" {call} ( ", " {call} ){{0,{more}}} "]"')


def _around(name: str, form: CallForm) -> tuple[str, str]:
    """What a call of this form has before and after its arguments."""
    match form:
        case "mistral-args":
            return f"[TOOL_CALLS]{name}[ARGS]", ""
        case "deepseek":
            return f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
    key = "parameters" if form == "llama3" else "arguments"
    return f'{{"name": {json.dumps(name)}, "{key}": ', "}"


def _checked(text: str, field: str) -> str:
    """Raises: Refused (400) when no engine would take the grammar."""
    try:
        Grammar(text)
    except WrongUse as error:
        refuse(field, f"'{field}': {error.message}", "invalid_grammar")
    return text
