"""Tools and calls: how a model writes a call in its text, and the parts that the text comes apart into.

Every API takes the same three steps: it parses `Tool`s and a `ToolChoice` at its edge; `structured.plan_answer` makes a
prompt's tools, a grammar and a `Reading` of them; and an `AnswerReader` takes the text apart that comes back.
"""

import json
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Literal, TypeAlias, get_args

from cloister.enclave.llm import taggedcalls
from cloister.enclave.llm.reasoning import MOST_BLANKS, Thinking, ThinkSplitter, overlap
from cloister.enclave.llm.taggedcalls import Kinds, TaggedCall

__all__ = [
    "AUTO",
    "CALL_FORMS",
    "MARKERS",
    "PLAIN",
    "AnswerReader",
    "CallArguments",
    "CallForm",
    "CallStarted",
    "Part",
    "Reading",
    "Reasoning",
    "Text",
    "Tool",
    "ToolChoice",
    "call_form_of",
]

CallForm: TypeAlias = Literal[
    "", "hermes", "llama3", "mistral", "mistral-args", "deepseek", "qwen-xml", "glm-xml", "generic"
]
"""How calls stand in a model's text.

hermes: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, once for each call (Hermes, Qwen).
llama3: the whole answer is `{"name": …, "parameters": {…}}`, perhaps after `<|python_tag|>`.
mistral: `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`.
mistral-args, deepseek, qwen-xml, glm-xml: see `taggedcalls`.
generic: the whole answer is `[{"name": …, "arguments": {…}}, …]`: what calls that a grammar forces look like where the
model's template knows no tools.
"": the template knows no tools, or writes calls in a form that is not parsed here.
"""

CALL_FORMS: tuple[CallForm, ...] = get_args(CallForm)
_JSON_OPENS = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]", "llama3": "<|python_tag|>"}
_OPENS: Mapping[str, str] = {**_JSON_OPENS, **taggedcalls.OPENS}
_CLOSES: Mapping[str, tuple[str, ...]] = {"hermes": ("</tool_call>",), **taggedcalls.CLOSES}
_BARE: Collection[CallForm] = ("llama3", "mistral", "generic")
"""Forms whose calls may stand at an answer's beginning without their marker."""
MARKERS = tuple(dict.fromkeys([*_OPENS.values(), *taggedcalls.MARKS, "<think>", "</think>"]))
"""Shown although the vocabulary may hold them as control tokens: without them an answer could not be taken apart."""
_MOST_BEFORE_A_CALL = 1 << 16  # characters that may stand before it is one; each costs as much as there are
_MOST_BETWEEN_CALLS = 2 * MOST_BLANKS  # characters; also of a name that stands after the arguments
_BLANKS = " \t\r\n"
_SEPARATORS = _BLANKS + "[],;"


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. `parameters` is a JSON schema of an object; empty: any object."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def as_openai(self) -> dict[str, Any]:
        """As chat templates expect it in `tools`."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """`named` forces a call of the tool `name`, `required` one of any. Without `parallel`, one call at most."""

    mode: Literal["auto", "none", "required", "named"] = "auto"
    name: str = ""
    parallel: bool = True

    @property
    def forced(self) -> bool:
        return self.mode in ("required", "named")


AUTO = ToolChoice()


@dataclass(frozen=True, slots=True)
class Text:
    """What the model says to the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What it says to itself beforehand."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    """`index` counts an answer's calls from 0; `id` is fresh."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next piece of call `index`'s arguments: JSON text, an object when all pieces are joined."""

    index: int
    text: str


Part: TypeAlias = Text | Reasoning | CallStarted | CallArguments


@dataclass(frozen=True, slots=True)
class Reading:
    """How one answer is to be read. `names`: the tools that may be called; a call of another is plain text.

    `most`: how many calls are taken; further ones are dropped. `kinds`: of each tool's parameters, for forms that write
    them without quotes.
    """

    form: CallForm = ""
    names: frozenset[str] = frozenset()
    thinking: Thinking = ""
    most: int = 64
    kinds: Mapping[str, Kinds] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Whether all text is the answer's text, so that no reader is needed."""
        return not self.thinking and not (self.form and self.names)


PLAIN = Reading()


def call_form_of(template: str | None) -> CallForm:
    """How a model with this chat template writes calls. Looks at the template's source only, and runs nothing."""
    if template is None or "tools" not in template:
        return ""
    if "[TOOL_CALLS]" in template:
        return "mistral-args" if "[ARGS]" in template else "" if "[CALL_ID]" in template else "mistral"
    if "<tool_call>" in template:
        return "qwen-xml" if "<function=" in template else "glm-xml" if "<arg_key>" in template else "hermes"
    if taggedcalls.OPENS["deepseek"] in template:
        return "deepseek"
    if "<|python_tag|>" in template or ('"parameters"' in template and "<|start_header_id|>" in template):
        return "llama3"
    return ""


class AnswerReader:
    """Takes one answer apart, as it comes. `feed` it text, then `finish` once; both give out parts in order.

    The parts do not depend on where the text was cut, but for how it is spread over parts of the same kind. No state
    is shared between answers.
    """

    def __init__(self, reading: Reading) -> None:
        self._splitter = ThinkSplitter(reading.thinking)
        self._calls = _CallParser(reading) if reading.form and reading.names else None

    @property
    def called(self) -> bool:
        """Whether any call was made so far: the answer then ends with "tool_calls"."""
        return self._calls is not None and self._calls.count > 0

    def feed(self, text: str) -> list[Part]:
        thought, said = self._splitter.feed(text)
        return self._parts(thought, said, last=False)

    def finish(self) -> list[Part]:
        """The rest, when no more text comes."""
        thought, said = self._splitter.finish()
        return self._parts(thought, said, last=True)

    def _parts(self, thought: str, said: str, *, last: bool) -> list[Part]:
        parts: list[Part] = [Reasoning(thought)] if thought else []
        if self._calls is None:
            return [*parts, Text(said)] if said else parts
        parts += self._calls.feed(said)
        return [*parts, *self._calls.finish()] if last else parts


class _CallParser:
    """Finds the calls in what is said, a character at a time. What turns out to be none is given back as text."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._open = _OPENS.get(reading.form, "")
        self._closes = _CLOSES.get(reading.form, ())
        self._tagged = reading.form in taggedcalls.FORMS
        self._state = "start"
        self._held = ""
        """Of the text: the last blanks, and what may be the beginning of a marker. Blanks before a call are dropped."""
        self._raw = ""
        """What was read since it looked as if a call began: text, if none does."""
        self._object: _CallObject | TaggedCall = _CallObject(reading.names)
        self._out: list[Part] = []
        self.count = 0

    def feed(self, text: str) -> list[Part]:
        for char in text:
            self._read(char)
        return self._taken()

    def finish(self) -> list[Part]:
        rest = self._held + self._raw
        if not self.count or rest.strip(_SEPARATORS if self._state == "gap" else _BLANKS):
            self._say(rest)
        self._held = self._raw = ""
        return self._taken()

    def _taken(self) -> list[Part]:
        """The parts so far, neighbours of the same kind joined."""
        out, self._out = self._out, []
        joined: list[Part] = []
        for _, alike in groupby(out, key=lambda part: (type(part), getattr(part, "index", 0))):
            first, *rest = alike
            if not isinstance(first, CallStarted):
                text = "".join(part.text for part in (first, *rest) if not isinstance(part, CallStarted))
                first = replace(first, text=text)
            joined.append(first)
        return joined

    def _say(self, text: str) -> None:
        if text:
            self._out.append(Text(text))

    def _read(self, char: str) -> None:
        match self._state:
            case "start":
                self._read_start(char)
            case "gap":
                self._read_gap(char)
            case "object":
                self._read_object(char)
            case "close":
                self._read_close(char)
            case _:
                self._read_text(char)

    def _read_start(self, char: str) -> None:
        if char in _BLANKS:
            self._hold_blank(char)
        elif char in "{[" and self._reading.form in _BARE:
            self._raw, self._held = self._held, ""
            self._state = "gap"
            self._read_gap(char)
        else:
            self._state = "text"
            self._read_text(char)

    def _hold_blank(self, char: str) -> None:
        """After blanks only. Of many, all but the last are text."""
        self._held += char
        self._say(self._held[:-MOST_BLANKS])
        self._held = self._held[-MOST_BLANKS:]

    def _read_text(self, char: str) -> None:
        if char in _BLANKS and self._held[-1:] in _BLANKS:  # no marker has any, so that all that is held are blanks
            self._hold_blank(char)
            return
        self._held += char
        if self._open and self._held.endswith(self._open):
            self._raw, self._held = self._held, ""
            self._state = "gap"
            if self._tagged:
                self._begin_tagged()
            return
        shown = self._held[: len(self._held) - overlap(self._held, self._open)].rstrip(_BLANKS)
        self._say(shown)
        self._held = self._held[len(shown) :]

    def _read_gap(self, char: str) -> None:
        """Between the marker and a call, or between calls: blanks, and the brackets and commas of a list."""
        between = _BLANKS if self._reading.form == "hermes" else _SEPARATORS
        if char == "{":
            marked = bool(self._open) and self._raw.lstrip(_BLANKS).startswith(self._open)
            self._object = _CallObject(self._reading.names, lenient=marked)
            self._state = "object"
            self._read_object(char)
        elif len(self._raw) < _MOST_BETWEEN_CALLS and char in between:
            self._raw += char
        else:
            self._no_call(char)

    def _begin_tagged(self) -> None:
        self._object = TaggedCall(self._reading.form, self._reading.names, self._reading.kinds)
        self._state = "object"

    def _no_call(self, char: str) -> None:
        raw, self._raw = self._raw, ""
        self._state = "text"
        if raw.endswith("[") and self._open.startswith("[" + char):  # it may also have been the marker's
            raw, self._held = raw[:-1], "["
        if raw.strip(_SEPARATORS) or (raw.strip(_BLANKS) and not self.count):
            self._say(raw)
        elif not self.count:  # else it is the end of a list of calls
            self._held = raw + self._held
        self._read_text(char)

    def _read_object(self, char: str) -> None:
        found = self._object
        started = found.started
        found.feed(char)
        self._raw += char
        if found.started:
            if not started:
                self.count += 1
                self._raw = ""
                self._emit(CallStarted(self.count - 1, self._fresh_id(), found.name))
            if arguments := found.take():
                self._emit(CallArguments(self.count - 1, arguments))
            self._raw = ""
        elif len(self._raw) > _MOST_BEFORE_A_CALL:
            found.failed = True
        if found.ended or found.failed:
            self._leave(found)

    def _leave(self, found: "_CallObject | TaggedCall") -> None:
        raw, self._raw = self._raw, ""
        self._state = "text"
        if found.started:
            self._state = "close" if self._closes else "text" if self._tagged else "gap"
        elif not self._tagged:
            self._say(raw)
        elif found.failed or not self.count:  # else it is the end of a row of calls
            at = raw.find(self._open) + len(self._open) if self._open in raw else 0
            self._say(raw[:at])
            for one in raw[at:]:  # which may hold the next marker
                self._read(one)

    def _emit(self, part: Part) -> None:
        if self.count <= self._reading.most:
            self._out.append(part)

    def _fresh_id(self) -> str:
        """Mistral's templates take nine letters and digits, and nothing else."""
        return secrets.token_hex(5)[:9] if self._reading.form.startswith("mistral") else f"call_{secrets.token_hex(12)}"

    def _read_close(self, char: str) -> None:
        self._held = (self._held + char).lstrip(_BLANKS)
        if self._held in self._closes:
            self._state, self._held = "text", ""
            if self._reading.form == "deepseek":  # the next of the row, or its end
                self._begin_tagged()
        elif not any(close.startswith(self._held) for close in self._closes):
            self._state, again = "text", self._held
            self._held = ""
            for one in again:
                self._read_text(one)


class _CallObject:
    """One call in JSON, a character at a time: `{"name": …, "arguments": {…}}`, in any order.

    `started` turns true when a call it is: a tool's name and arguments. Arguments are passed on as they come where they
    stand after the name. `failed`: it is none. `lenient`: a name alone is a call without arguments.
    """

    _NAMES = frozenset({"name", "id", "type", "arguments", "parameters"})

    def __init__(self, names: frozenset[str], *, lenient: bool = False) -> None:
        self._names = names
        self._lenient = lenient
        self._depth = 0
        self._quoted = self._escaped = self._streaming = False
        self._key: str | None = None
        self._member = ""
        self._arguments: str | None = None
        self._out = ""
        self.name = ""
        self.started = self.ended = self.failed = False

    def take(self) -> str:
        out, self._out = self._out, ""
        return out

    def feed(self, char: str) -> None:
        if self._quoted:
            self._keep(char)
            self._quoted = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
        elif char in "{[":
            self._open(char)
        elif char in "}]":
            self._close(char)
        elif self._depth == 1 and char == ",":
            self._end_member()
        elif self._depth == 1 and char == ":" and self._key is None:
            self._end_key()
        else:
            self._quoted = char == '"'
            misplaced = self._depth == 1 and self._key is None and char != '"' and char not in _BLANKS
            self.failed = self.failed or misplaced
            self._keep(char)

    def _keep(self, char: str) -> None:
        if self._streaming:
            self._out += char
        elif not self.started:
            self._member += char
        elif self._key is None:  # after the arguments, names alone matter
            self._member += char
            self.failed = self.failed or len(self._member) > _MOST_BETWEEN_CALLS

    def _open(self, char: str) -> None:
        self._depth += 1
        if self._depth == 1:
            return
        self.failed = self.failed or self._key is None
        holds_arguments = self._key in ("arguments", "parameters") and self._depth == 2
        if holds_arguments and char == "{" and self.name and not self.started and not self._member.strip(_BLANKS):
            self._streaming = self.started = True
        self._keep(char)

    def _close(self, char: str) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._end_member()
            self._end()
            return
        self._keep(char)
        if self._depth == 1:
            self._streaming = False

    def _end_key(self) -> None:
        key = _decoded(self._member)
        self._member = ""
        if isinstance(key, str) and key in self._NAMES:
            self._key = key
        elif isinstance(key, str) and (self.name or self._arguments):
            self._key = ""  # whatever else it says
        else:
            self.failed = True

    def _end_member(self) -> None:
        key, value = self._key, self._member.strip(_BLANKS)
        self._key, self._member = None, ""
        if key == "name" and not self.name:
            name = _decoded(value)
            self.failed = self.failed or not isinstance(name, str) or name not in self._names
            self.name = name if isinstance(name, str) else ""
        elif key in ("arguments", "parameters") and not self.started:
            inner = _decoded(value)
            self._arguments = inner if isinstance(inner, str) else value
            self.failed = self.failed or not (inner is None or isinstance(_decoded(self._arguments), dict))
        elif key is None and value:
            self.failed = True
        if self.name and self._arguments is not None and not self.failed and not self.started:
            self.started = True
            self._out = "{}" if self._arguments == "null" else self._arguments.strip(_BLANKS)

    def _end(self) -> None:
        self.ended = True
        if not self.started and not self.failed and self.name and self._lenient:
            self.started = True
            self._out = "{}"


def _decoded(text: str) -> Any:
    """The JSON value; an empty tuple, which is none, for what is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return ()
