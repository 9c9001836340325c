"""JSON schemas as GBNF: whatever the grammar lets through is valid, though not all that is valid gets through.

White space, strings and numbers are bounded, free values are nested eight levels deep at most, properties come in the
schema's order, and those that it does not name are left out. `oneOf` is read as `anyOf`. What a grammar cannot say is
refused, so that no answer pretends to be valid.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn
from urllib.parse import unquote

from cloister.enclave.llm.fields import refuse
from cloister.enclave.llm.gbnf import MAX_GRAMMAR
from cloister.enclave.llm.numbers import Bounds, decimals_between, integers_between
from cloister.enclave.llm.patterns import PatternError, gbnf_of_pattern, literal, one_of

__all__ = ["JSON_OBJECT", "SchemaWriter"]

JSON_OBJECT: Mapping[str, Any] = {"type": "object"}
MAX_SCHEMA = 64 << 10
"""Characters of a schema as JSON."""
MAX_DEPTH = 32
MAX_VISITS = 2048
"""Schemas inside a schema, counted as often as they are written out."""
MAX_WORK = 2 * MAX_SCHEMA
"""Keywords, items and characters of references and patterns, counted as often as they are looked at or copied."""
MAX_STRING = 1 << 14
"""Characters of a string whose schema says no less."""
MAX_ITEMS = 1 << 16
MAX_OPTIONAL = 200
"""Properties of one object that may be left out: any of them may come next, so all are possible at the same time."""
FREE_DEPTH = 8

_WS = "ws"
_PRIMITIVES = {
    "ws": '( " " | "\\n" [ \\t]{0,32} )?',
    "char": r'[^"\\\x00-\x1f\x7f] | "\\" ( ["\\/bfnrt] | "u" ( [0-9a-cA-CefEF] [0-9a-fA-F] | [dD] [0-7] ) [0-9a-fA-F]{2} )',
    "string": f'"\\"" char{{0,{MAX_STRING}}} "\\""',
    "integer": '"-"? ( "0" | [1-9] [0-9]{0,14} )',
    "number": 'integer ( "." [0-9]{1,15} )? ( [eE] [-+]? [0-9]{1,2} )?',
    "boolean": '"true" | "false"',
    "null": '"null"',
}
_YEAR = '[0-9]{3} [1-9] "-" ( "0" [1-9] | "1" [0-2] ) "-" ( "0" [1-9] | "1" [0-9] | "2" [0-8] )'
_CLOCK = '( [01] [0-9] | "2" [0-3] ) ":" [0-5] [0-9] ":" [0-5] [0-9] ( "." [0-9]{1,6} )?'
_ZONE = '( "Z" | [-+] ( [01] [0-9] | "2" [0-3] ) ":" [0-5] [0-9] )'
_BYTE = '( "25" [0-5] | "2" [0-4] [0-9] | "1" [0-9] [0-9] | [1-9]? [0-9] )'
_LABEL = "[a-z0-9]{1,32}"
_FORMATS = {
    "date": _YEAR,
    "time": f"{_CLOCK} {_ZONE}",
    "date-time": f'{_YEAR} "T" {_CLOCK} {_ZONE}',
    "uuid": '[0-9a-f]{8} ( "-" [0-9a-f]{4} ){3} "-" [0-9a-f]{12}',
    "ipv4": f'{_BYTE} ( "." {_BYTE} ){{3}}',
    "email": f'{_LABEL} ( "." {_LABEL} ){{0,4}} "@" {_LABEL} ( "." {_LABEL} ){{1,4}}',
}
"""Other formats are remarks, as the specification has it."""
_TYPES = ("string", "integer", "number", "boolean", "null", "object", "array")
_BEYOND = (
    "not",
    "if",
    "then",
    "else",
    "patternProperties",
    "propertyNames",
    "dependentRequired",
    "dependentSchemas",
    "dependencies",
    "unevaluatedProperties",
    "unevaluatedItems",
    "contains",
    "multipleOf",
    "$dynamicRef",
    "$recursiveRef",
)
_COMPOSING = ("allOf", "anyOf", "oneOf")
_REMARKS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema", "$id"}
    | {"$defs", "definitions"}
)
_OF_TYPE = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}


class SchemaWriter:
    """Collects the rules of one grammar. `add` as many schemas as it needs; each gives an expression for its JSON."""

    def __init__(self) -> None:
        self._rules: dict[str, str] = {}
        self._visits = self._work = self._written = 0
        self._field = ""
        self._root: Any = {}
        self._refs: dict[int, str] = {}
        """By what they lead to, as one place has many names."""

    def add(self, schema: Any, field: str) -> str:
        """`field`: the request's field that holds the schema, for refusals. Raises: Refused (400)."""
        self._field, self._root, self._refs = field, schema, {}
        if len(json.dumps(schema)) > MAX_SCHEMA:
            self._refuse(f"is longer than {MAX_SCHEMA} characters")
        return self._visit(schema, 0)

    def grammar(self, root: str) -> str:
        """The whole text, with this expression to begin with."""
        wanted = {"root": root, **self._rules}
        return "".join(f"{name} ::= {body}\n" for name, body in wanted.items())

    def rule(self, body: str) -> str:
        """A rule of its own for a body; its name."""
        self._written += len(body)
        if self._written > MAX_GRAMMAR:
            self._refuse(f"takes more than {MAX_GRAMMAR} characters of a grammar")
        name = f"r{len(self._rules)}"
        self._rules[name] = body
        return name

    def primitive(self, name: str) -> str:
        """`name`, with the rules that it needs."""
        if name not in self._rules:
            self._rules[name] = _PRIMITIVES[name]
            for needed in {"string": ("char",), "number": ("integer",)}.get(name, ()):
                self.primitive(needed)
        return name

    def _refuse(self, what: str) -> NoReturn:
        refuse(self._field, f"The schema in '{self._field}' {what}.", "unsupported_schema")

    def _spend(self, work: int) -> None:
        self._work += work
        if self._work > MAX_WORK:
            self._refuse("takes too long to write out")

    def _visit(self, schema: Any, depth: int) -> str:
        self._visits += 1
        if self._visits > MAX_VISITS:
            self._refuse(f"holds more than {MAX_VISITS} schemas")
        if depth > MAX_DEPTH:
            self._refuse(f"is nested deeper than {MAX_DEPTH} levels")
        if schema is True:
            return self._free(FREE_DEPTH)
        if not isinstance(schema, dict):
            self._refuse("allows nothing in some place" if schema is False else "holds something that is no schema")
        self._spend(len(schema))
        for keyword in _BEYOND:
            if keyword in schema:
                self._refuse(f"uses '{keyword}', which a grammar cannot say")
        if schema.get("uniqueItems") is True or schema.get("minProperties") or "maxProperties" in schema:
            self._refuse("counts or compares values, which a grammar cannot say")
        return self._composed(schema, depth)

    def _composed(self, schema: Mapping[str, Any], depth: int) -> str:
        beside = {key: value for key, value in schema.items() if key not in ("$ref", *_COMPOSING)}
        composing = {key: schema[key] for key in _COMPOSING if key in schema}
        bare = not beside.keys() - _REMARKS
        if "$ref" in schema and bare and not composing:
            return self._ref(schema["$ref"], depth)
        if "$ref" in schema:
            merged = self._merge(beside, {"$ref": schema["$ref"]})
            return self._visit(self._merge(merged, composing), depth + 1)
        if "allOf" in schema:
            for part in self._list(composing.pop("allOf")):
                beside = self._merge(beside, part)
            return self._visit(self._merge(beside, composing), depth + 1)
        for key in composing:
            others = {k: v for k, v in composing.items() if k != key}
            options = [part if bare and not others else self._merge(beside, part) for part in self._list(schema[key])]
            options = [self._merge(option, others) if others else option for option in options]
            return self._either([self._visit(option, depth + 1) for option in options])
        return self._plain(schema, depth)

    def _list(self, value: Any) -> Sequence[Any]:
        if not isinstance(value, list) or not value:
            self._refuse("has an empty list, or none, where schemas belong")
        self._spend(len(value))
        return value

    def _either(self, options: Sequence[str]) -> str:
        distinct = list(dict.fromkeys(options))
        return distinct[0] if len(distinct) == 1 else self.rule(" | ".join(distinct))

    def _merge(self, one: Mapping[str, Any], other: Any) -> dict[str, Any]:
        """A schema that says what both say, where that can be told at a glance."""
        turns = 0
        while isinstance(other, dict) and "$ref" in other:
            turns += 1
            if turns > MAX_DEPTH:
                self._refuse("refers to itself without end")
            one = self._merge(one, {key: value for key, value in other.items() if key != "$ref"})
            other = self._target(other["$ref"])
        if other is True:
            return dict(one)
        if not isinstance(other, dict):
            self._refuse("combines what allows nothing")
        self._spend(len(one) + len(other))
        merged, other = self._limited(one, other), self._limited(other, one)
        if ("prefixItems" in one and "items" in other) or ("items" in one and "prefixItems" in other):
            self._refuse("combines lists in a way that a grammar cannot say")
        for key, value in other.items():
            if key not in merged or key in _REMARKS or self._same(merged[key], value):
                merged[key] = value
            elif key == "required" and _are_names(value) and _are_names(merged[key]):
                self._spend(len(merged[key]))
                merged[key] = list(dict.fromkeys([*merged[key], *value]))
            elif key == "properties" and isinstance(value, dict) and isinstance(merged[key], dict):
                known = merged[key]
                self._spend(len(known))
                merged[key] = known | {
                    name: inner if self._same(known.get(name, inner), inner) else {"allOf": [known[name], inner]}
                    for name, inner in value.items()
                }
            elif key == "additionalProperties" and False in (value, merged[key]):
                merged[key] = False
            else:
                self._refuse("combines schemas in a way that a grammar cannot say")
        return merged

    def _same(self, one: Any, other: Any) -> bool:
        self._spend(_size(other))
        return bool(one == other)

    def _limited(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
        """`one`, its properties as narrow as `other` has those that it does not name."""
        properties, named = one.get("properties"), other.get("properties") or {}
        others = other.get("additionalProperties", True)
        if others is True or not isinstance(properties, dict) or not isinstance(named, dict):
            return dict(one)
        self._spend(len(properties))
        narrow = {
            name: inner if name in named else others is not False and {"allOf": [inner, others]}
            for name, inner in properties.items()
        }
        return {**one, "properties": narrow}

    def _target(self, ref: Any) -> Any:
        if not isinstance(ref, str) or (ref != "#" and not ref.startswith("#/")):
            self._refuse("has a $ref that leads out of it: only #/… is followed")
        self._spend(len(ref))
        found = self._root
        for step in unquote(ref[1:]).split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and name in found:
                found = found[name]
            elif isinstance(found, list) and name.isdecimal() and len(name) < 6 and int(name) < len(found):
                found = found[int(name)]
            else:
                self._refuse("has a $ref that leads nowhere")
        return found

    def _ref(self, ref: Any, depth: int) -> str:
        target = self._target(ref)
        if id(target) not in self._refs:
            self._refs[id(target)] = name = self.rule("")
            self._rules[name] = self._visit(target, depth + 1)
        return self._refs[id(target)]

    def _plain(self, schema: Mapping[str, Any], depth: int) -> str:
        kinds = schema.get("type")
        if "const" in schema or "enum" in schema:
            return self._one_of(schema)
        if kinds is None:
            kinds = [kind for kind, keywords in _OF_TYPE.items() if any(key in schema for key in keywords)][:1]
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if not isinstance(kinds, list) or any(kind not in _TYPES for kind in kinds):
            self._refuse("names an unknown type")
        if not kinds:
            return self._free(FREE_DEPTH)
        writers: Mapping[str, Callable[[Mapping[str, Any], int], str]] = {
            "object": self._object,
            "array": self._array,
            "string": lambda inner, _depth: self._string(inner),
            "integer": lambda inner, _depth: self._number(inner, whole=True),
            "number": lambda inner, _depth: self._number(inner, whole=False),
        }
        return self._either(
            [writers[kind](schema, depth) if kind in writers else self.primitive(kind) for kind in kinds]
        )

    def _one_of(self, schema: Mapping[str, Any]) -> str:
        """One of the values that are named, as compact JSON."""
        if any(key in schema for keywords in _OF_TYPE.values() for key in keywords if key != "format"):
            self._refuse("combines named values with other limits, which a grammar cannot say")
        values = self._list(schema.get("enum", [schema.get("const")]))
        allowed = [value for value in values if "type" not in schema or _is_one_of(value, schema["type"])]
        texts = [json.dumps(value, ensure_ascii=False) for value in allowed]
        if "const" in schema:
            wanted = json.dumps(schema["const"], ensure_ascii=False)
            texts = [text for text in texts if text == wanted]
        if not texts:
            self._refuse("allows nothing in some place")
        return self.rule(one_of(texts))

    def _free(self, levels: int) -> str:
        """Any JSON, so many containers deep."""
        name = f"free{levels}"
        if name not in self._rules:
            self._rules[name] = ""
            options = [self.primitive(kind) for kind in ("string", "number", "boolean", "null")]
            if levels:
                inner = self._free(levels - 1)
                options += [self.list_of(inner), self._pairs(inner)]
            self._rules[name] = " | ".join(options)
        return name

    def list_of(self, item: str, least: int = 0, most: int | None = None) -> str:
        """An array of so many items; `most` is 1 or more."""
        ws = self.primitive(_WS)
        more = f'( "," {ws} {item} ){{{max(least - 1, 0)},{"" if most is None else most - 1}}}'
        filled = f"{item} {more} {ws}" if least else f"( {item} {more} {ws} )?"
        return self.rule(f'"[" {ws} {filled} "]"')

    def _pairs(self, value: str) -> str:
        ws, key = self.primitive(_WS), self.primitive("string")
        pair = f'{key} ":" {ws} {value}'
        return self.rule(f'"{{" {ws} ( {pair} ( "," {ws} {pair} )* {ws} )? "}}"')

    def _array(self, schema: Mapping[str, Any], depth: int) -> str:
        first, others = schema.get("prefixItems", ()), schema.get("items", True)
        if isinstance(others, list):  # as older drafts wrote it
            first, others = others, schema.get("additionalItems", True)
        if not isinstance(first, list | tuple):
            self._refuse("has no list in 'prefixItems'")
        least, most = self._counts(schema, "minItems", "maxItems", None)
        first = first if most is None else first[:most]
        if not first and (others is False or most == 0):
            if least:
                self._refuse("allows nothing in some place")
            return '"[]"'
        if not first:
            return self.list_of(self._visit(others, depth + 1), least, most)
        ws = self.primitive(_WS)
        items = f' "," {ws} '.join(self._visit(item, depth + 1) for item in first)
        least, most = max(least - len(first), 0), None if most is None else most - len(first)
        if others is False or most == 0 or ("items" not in schema and not least):
            if least:
                self._refuse("allows nothing in some place")
            return self.rule(f'"[" {ws} {items} {ws} "]"')
        limit = "" if most is None else most
        return self.rule(f'"[" {ws} {items} ( "," {ws} {self._visit(others, depth + 1)} ){{{least},{limit}}} {ws} "]"')

    def _counts(self, schema: Mapping[str, Any], low: str, high: str, default: int | None) -> tuple[int, int | None]:
        least, most = schema.get(low, 0), schema.get(high)
        for value in (least, most):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                self._refuse(f"has no count in '{low}' or '{high}'")
        least = least or 0
        if least > MAX_ITEMS or (most is not None and most < least):
            self._refuse(f"asks for more than {MAX_ITEMS} in '{low}', or for less in '{high}'")
        if most is None:
            return least, None if default is None else max(default, least)
        return least, min(most, MAX_ITEMS)

    def _object(self, schema: Mapping[str, Any], depth: int) -> str:
        properties, required = schema.get("properties"), schema.get("required", [])
        others = schema.get("additionalProperties", True)
        if not isinstance(properties, dict | None) or not isinstance(required, list):
            self._refuse("has no object in 'properties', or no list in 'required'")
        if not _are_names(required):
            self._refuse("has something else than names in 'required'")
        if properties is None and not required and others is not False:
            return self._pairs(self._free(FREE_DEPTH - 1) if others is True else self._visit(others, depth + 1))
        named, needed = dict(properties or {}), set(required)
        self._spend(len(named) + len(required))
        for name in required:
            if name not in named and others is False:
                self._refuse("requires a property that it does not allow")
            named.setdefault(name, others)
        ws = self.primitive(_WS)
        members = [
            (
                f'{literal(json.dumps(name, ensure_ascii=False))} ":" {ws} {self._visit(inner, depth + 1)}',
                name in needed,
            )
            for name, inner in named.items()
            if inner is not False or name in needed
        ]
        return self._members(members)

    def _members(self, members: Sequence[tuple[str, bool]]) -> str:
        """An object of these, in this order; those that are not required may be left out.

        `following`: a rule for what may come next, one member at least, from some member on.
        """
        ws = self.primitive(_WS)
        if not members:
            return '"{}"'
        if sum(not needed for _, needed in members) > MAX_OPTIONAL:
            self._refuse(f"has an object with more than {MAX_OPTIONAL} properties that may be left out")
        following, some_needed = "", False
        for member, needed in reversed(members):
            name = self.rule(member)
            if following:
                more = f'"," {ws} {following}'
                name = f"{name} {more}" if some_needed else f"{name} ( {more} )?"
            following = self.rule(name if needed or not following else f"{name} | {following}")
            some_needed = some_needed or needed
        return self.rule(f'"{{" {ws} ( {following} {ws} ){"" if some_needed else "?"} "}}"')

    def _string(self, schema: Mapping[str, Any]) -> str:
        pattern, form = schema.get("pattern"), schema.get("format")
        measured = "minLength" in schema or "maxLength" in schema
        if pattern is not None:
            if measured or not isinstance(pattern, str):
                self._refuse("uses 'pattern' together with a length, which a grammar cannot say")
            self._spend(len(pattern))
            try:
                return self.rule(f'"\\"" {gbnf_of_pattern(pattern)} "\\""')
            except PatternError:
                self._refuse("has a 'pattern' that is too long, or beyond what a grammar can say")
        if measured:
            least, most = self._counts(schema, "minLength", "maxLength", MAX_STRING)
            return self.rule(f'"\\"" {self.primitive("char")}{{{least},{most}}} "\\""')
        if isinstance(form, str) and form in _FORMATS:
            return self.rule(f'"\\"" {_FORMATS[form]} "\\""')
        return self.primitive("string")

    def _number(self, schema: Mapping[str, Any], *, whole: bool) -> str:
        low, above = self._bound(schema, "minimum", "exclusiveMinimum", max)
        high, below = self._bound(schema, "maximum", "exclusiveMaximum", min)
        if low is None and high is None:
            return self.primitive("integer" if whole else "number")
        bounds = Bounds(low, high, above=above, below=below)
        options = integers_between(bounds) if whole else decimals_between(bounds)
        if not options:
            self._refuse("has bounds that no number lies between, or none that a grammar can say")
        return self.rule(" | ".join(options))

    def _bound(
        self, schema: Mapping[str, Any], plain: str, exclusive: str, tighter: Callable[..., Any]
    ) -> tuple[int | float | None, bool]:
        """The bound, and whether it is itself excluded; in older drafts, the second keyword says only that."""
        given, excluded = schema.get(plain), schema.get(exclusive)
        if isinstance(excluded, bool):
            given, excluded = (None, given) if excluded else (given, None)
        for value in (given, excluded):
            number = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
            if not number or (value is not None and not abs(value) < 1e15):
                self._refuse(f"has no number, or too large a one, in '{plain}' or '{exclusive}'")
        if given is None or excluded is None:
            return (given, False) if excluded is None else (excluded, True)
        return tighter(given, excluded), tighter(given, excluded) == excluded


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _size(value: Any) -> int:
    """How many values it is made of."""
    count, todo = 0, [value]
    while todo:
        count += 1
        match todo.pop():
            case dict() as inner:
                todo += inner.values()
            case list() as inner:
                todo += inner
    return count


def _is_one_of(value: Any, kinds: Any) -> bool:
    """Whether a value is of the type, or of one of the types."""
    names = [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else []
    match value:
        case None:
            found = {"null"}
        case bool():
            found = {"boolean"}
        case int():
            found = {"integer", "number"}
        case float():
            found = {"number", *(["integer"] if value.is_integer() else [])}
        case str():
            found = {"string"}
        case list():
            found = {"array"}
        case _:
            found = {"object"}
    return bool(found & set(map(str, names)))
