"""Calls that stand between marks or tags instead of inside one JSON object, read a character at a time.

mistral-args: `[TOOL_CALLS]name[ARGS]{…}`, once for each call; in some models `[CALL_ID]…` before `[ARGS]`.
deepseek: `<｜tool▁calls▁begin｜>`, for each call `<｜tool▁call▁begin｜>name<｜tool▁sep｜>{…}<｜tool▁call▁end｜>` or, as older
models have it, `…begin｜>function<｜tool▁sep｜>name`, a fenced block of JSON, `<｜tool▁call▁end｜>`; `<｜tool▁calls▁end｜>`.
qwen-xml: `<tool_call><function=name><parameter=key>value</parameter>…</function></tool_call>`.
glm-xml: `<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value>…</tool_call>`.

Their sources are the chat templates of Mistral Small 3.2 and Devstral, DeepSeek V3.1 and R1, Qwen3-Coder, and GLM 4.5 to
4.7. What these write between tags has no quotes: whether `5` is a number or a text, the tool's schema says.
"""

import json
from collections.abc import Callable, Collection, Generator, Mapping
from typing import Any, Final, TypeAlias

__all__ = ["CLOSES", "FORMS", "MARKS", "OPENS", "Kinds", "TaggedCall", "kinds_of"]

Kinds: TypeAlias = Mapping[str, frozenset[str]]
"""JSON's types that a tool's parameters may have, by their names; of one that is not there nothing is known."""

_CALLS, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _SEP, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_PARAMETER, _FUNCTION_END = "<parameter=", "</function>"
_KEY, _TAG_END = "<arg_key>", "</tool_call>"
_ARGS, _CALL_ID = "[ARGS]", "[CALL_ID]"

OPENS: Final = {
    "mistral-args": "[TOOL_CALLS]",
    "deepseek": _CALLS,
    "qwen-xml": "<tool_call>",
    "glm-xml": "<tool_call>",
}
"""What a call begins with; in DeepSeek's form, a row of calls."""
CLOSES: Final[Mapping[str, tuple[str, ...]]] = {"deepseek": (_CALL_END, "```" + _CALL_END), "qwen-xml": (_TAG_END,)}
"""What stands after a call and is no part of the answer."""
FORMS = tuple(OPENS)
MARKS = (*dict.fromkeys(OPENS.values()), _CALLS_END, _CALL, _SEP, _CALL_END, _ARGS, _CALL_ID, _TAG_END)
MARKS += (_KEY, "</arg_key>", "<arg_value>", "</arg_value>")

_BLANKS = " \t\r\n"
_MOST_ID = 64
_DEEPEST = 8
_UNKNOWN: frozenset[str] = frozenset()
_PYTHON = {"True": "true", "False": "false", "None": "null"}  # how templates of Qwen's form write JSON's

_Steps: TypeAlias = Generator[None, str, Any]


class _NoCallError(Exception):
    """What is read is no call, or none any more."""


class TaggedCall:
    """One call, from behind its opening mark. `feed` it characters until it `ended` or `failed`.

    `started` turns true when a call it is: a tool's `name`, and what leads to its arguments. These are an object when it
    has ended, in pieces that `take` gives out; what failed or broke off after its start leaves them incomplete. What
    ended without a start was the end of a row of calls.
    """

    def __init__(self, form: str, names: Collection[str], kinds: Mapping[str, Kinds]) -> None:
        scripts: Mapping[str, Callable[[], _Steps]] = {
            "mistral-args": self._mistral,
            "deepseek": self._deepseek,
            "qwen-xml": self._qwen,
            "glm-xml": self._glm,
        }
        self._names = names
        self._kinds = kinds
        self._out: list[str] = []
        self._keys: set[str] = set()
        self.name = ""
        self.started = self.ended = self.failed = False
        self._steps = scripts[form]()
        next(self._steps)

    def feed(self, char: str) -> None:
        try:
            self._steps.send(char)
        except StopIteration:
            self.ended = True
        except _NoCallError:
            self.failed = True

    def take(self) -> str:
        out, self._out = "".join(self._out), []
        return out

    def _mistral(self) -> _Steps:
        self.name, end = yield from _word(self._names, _ARGS, _CALL_ID)
        if end == _CALL_ID:
            yield from _until(_ARGS, most=_MOST_ID)
        yield from self._json()

    def _deepseek(self) -> _Steps:
        if (yield from _mark(_CALL, _CALLS_END)) == _CALLS_END:
            return
        self.name, _ = yield from _word({*self._names, "function"}, _SEP)
        if self.name not in self._names:
            self.name, _ = yield from _word(self._names, "\n")
            yield from _mark("```json")
        yield from self._json()

    def _qwen(self) -> _Steps:
        yield from _mark("<function=")
        self.name, _ = yield from _word(self._names, ">")
        self._start()
        while (yield from _mark(_PARAMETER, _FUNCTION_END)) == _PARAMETER:
            key = yield from _until(">")
            value = yield from _until("</parameter>")
            self._argument(key, value.removeprefix("\n").removesuffix("\n"))
        self._out.append("}")

    def _glm(self) -> _Steps:
        self.name, end = yield from _word(self._names, "\n", _KEY, _TAG_END)
        if end == "\n":
            end = yield from _mark(_KEY, _TAG_END)
        self._start()
        while end == _KEY:
            key = yield from _until("</arg_key>")
            yield from _mark("<arg_value>")
            self._argument(key.strip(_BLANKS), (yield from _until("</arg_value>")))
            end = yield from _mark(_KEY, _TAG_END)
        self._out.append("}")

    def _start(self) -> None:
        self.started = True
        self._out.append("{")

    def _argument(self, key: str, value: str) -> None:
        """The first of one name counts: it was passed on already."""
        if key in self._keys:
            return
        known = self._kinds.get(self.name, {}).get(key, _UNKNOWN)
        comma = ", " if self._keys else ""
        self._keys.add(key)
        self._out.append(f"{comma}{json.dumps(key, ensure_ascii=False)}: {_as_json(value, known)}")

    def _json(self) -> _Steps:
        """An object, passed on as it comes."""
        self._out.append((yield from _mark("{")))
        self.started = True
        depth, quoted, escaped = 1, False, False
        while depth:
            char = yield
            self._out.append(char)
            if quoted:
                quoted = escaped or char != '"'
                escaped = char == "\\" and not escaped
            else:
                quoted = char == '"'
                depth += (char in "{[") - (char in "}]")


def _mark(*marks: str) -> _Steps:
    """One of these, after blanks."""
    held = ""
    while held not in marks:
        char = yield
        held += char if held or char not in _BLANKS else ""
        if not any(mark.startswith(held) for mark in marks):
            raise _NoCallError
    return held


def _word(words: Collection[str], *ends: str) -> _Steps:
    """One of these words after blanks, and what it ended with."""
    held = ""
    while True:
        char = yield
        held += char if held or char not in _BLANKS else ""
        fits = [(word, end) for word in words for end in ends if (word + end).startswith(held)]
        if not fits:
            raise _NoCallError
        if held and (found := next((one for one in fits if one[0] + one[1] == held), None)):
            return found


def _until(mark: str, most: int | None = None) -> _Steps:
    """Whatever stands before the mark."""
    pieces: list[str] = []
    tail = ""
    while tail != mark:
        char = yield
        pieces.append(char)
        tail = (tail + char)[-len(mark) :]
        if most is not None and len(pieces) > most:
            raise _NoCallError
    return "".join(pieces)[: -len(mark)]


def _as_json(text: str, kinds: Collection[str]) -> str:
    """JSON of what a text between tags says: itself, where it is JSON of a type that the parameter may have.

    Templates write texts without quotes, so that what reads as a text of JSON is one with quotes in it.
    """
    bare = _PYTHON.get(text.strip(_BLANKS), text.strip(_BLANKS))
    found = _types(bare)
    if "string" in kinds:
        found &= frozenset(kinds)
    return json.dumps(text, ensure_ascii=False) if not found or "string" in found else bare


def _types(text: str) -> frozenset[str]:
    """JSON's types of this JSON; none for what is no JSON."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _UNKNOWN
    return _types_of(value)


def _types_of(value: Any) -> frozenset[str]:
    match value:
        case None:
            return frozenset({"null"})
        case bool():
            return frozenset({"boolean"})
        case int():
            return frozenset({"integer", "number"})
        case float():
            return frozenset({"number"})
        case str():
            return frozenset({"string"})
        case list():
            return frozenset({"array"})
    return frozenset({"object"})


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def kinds_of(schema: Mapping[str, Any]) -> Kinds:
    """Of a tool's parameters, from the JSON schema of them all."""
    properties = schema.get("properties")
    if not isinstance(properties, Mapping):
        return {}
    return {name: kinds for name, one in properties.items() if (kinds := _kinds(one, schema, _DEEPEST))}


def _kinds(schema: Any, root: Mapping[str, Any], levels: int) -> frozenset[str]:
    """The types that a value of this schema may have; none where it does not say so plainly."""
    if not isinstance(schema, Mapping) or not levels:
        return _UNKNOWN
    match schema:
        case {"const": value}:
            return _types_of(value)
        case {"enum": list(values)}:
            return frozenset[str]().union(*map(_types_of, values))
        case {"type": str(name)}:
            return frozenset({name})
        case {"type": list(names)}:
            return frozenset(name for name in names if isinstance(name, str))
        case {"anyOf": list(options)} | {"oneOf": list(options)}:
            found = [_kinds(option, root, levels - 1) for option in options]
            return frozenset[str]().union(*found) if all(found) else _UNKNOWN
        case {"$ref": str(path)} if path.startswith("#/"):
            return _kinds(_at(root, path), root, levels - 1)
    return _UNKNOWN


def _at(root: Any, path: str) -> Any:
    for step in path.removeprefix("#/").split("/"):
        root = root.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(root, Mapping) else None
    return root
