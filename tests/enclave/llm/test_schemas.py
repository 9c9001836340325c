import contextlib
import datetime
import json
import time
import uuid
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.enclave.llm.schema_check import is_valid, random_text

from cloister.enclave.llm.envelope import Refused
from cloister.enclave.llm.grammar import Grammar
from cloister.enclave.llm.schemas import SchemaWriter
from cloister.errors import WrongUse

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name"],
}
SCHEMAS: dict[str, Any] = {
    "anything": True,
    "empty": {},
    "object": {"type": "object"},
    "string": {"type": "string"},
    "short string": {"type": "string", "minLength": 2, "maxLength": 4},
    "pattern": {"type": "string", "pattern": r'^[A-Z]{2,3}-\d+(\.\d\d?)?["\\]?$'},
    "pattern of choices": {"type": "string", "pattern": "^(foo|ba[rz])+$|^x$"},
    "pattern of others": {"type": "string", "pattern": r"^[^a-z\s]\D\W.\S$"},
    "integer": {"type": "integer"},
    "integers between": {"type": "integer", "minimum": -37, "maximum": 1205},
    "positive": {"type": "integer", "exclusiveMinimum": 0},
    "negative": {"type": "integer", "maximum": -1},
    "number": {"type": "number"},
    "share": {"type": "number", "minimum": 0, "maximum": 1},
    "open share": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "latitude": {"type": "number", "minimum": -90, "maximum": 90.5},
    "one of types": {"type": ["string", "null", "boolean"]},
    "constant": {"const": {"a": ['"', "é\n", None]}},
    "enumeration": {"enum": ["red", "green", 3, None, [1]]},
    "enumeration by type": {"type": "string", "enum": ["a", 1, "b"]},
    "many values": {"enum": [f"value {n}" for n in range(3000)]},
    "many properties": {"type": "object", "properties": {f"p{n}": {"type": "null"} for n in range(200)}},
    "person": PERSON,
    "closed": {**PERSON, "additionalProperties": False},
    "all optional": {"type": "object", "properties": {name: {"type": "boolean"} for name in "abcde"}},
    "last needed": {"properties": {name: {"type": "null"} for name in "abcd"}, "required": ["d", "b"]},
    "needed but not described": {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["z"]},
    "map": {"type": "object", "additionalProperties": {"type": "integer", "minimum": 5}},
    "no properties": {"type": "object", "properties": {}, "additionalProperties": False},
    "quoted name": {"type": "object", "properties": {'a"\\é\n': {"type": "null"}}, "required": ['a"\\é\n']},
    "list": {"type": "array", "items": {"type": "boolean"}},
    "counted list": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    "one item": {"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 1},
    "no items": {"type": "array", "maxItems": 0},
    "tuple": {"type": "array", "prefixItems": [{"type": "null"}, {"type": "boolean"}], "items": False},
    "tuple and more": {"type": "array", "prefixItems": [{"type": "null"}], "items": {"type": "boolean"}, "minItems": 3},
    "either": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"type": "null"}}]},
    "either with more": {"type": "object", "properties": {"a": {"type": "null"}}, "anyOf": [{"required": ["a"]}, {"properties": {"b": True}}]},
    "both": {"allOf": [PERSON, {"properties": {"x": {"type": "null"}}, "required": ["x"]}]},
    "closed by another": {
        "type": "object",
        "properties": {"a": {"type": "null"}, "b": {"type": "null"}},
        "allOf": [{"properties": {"b": {"type": "null"}}, "additionalProperties": False}],
    },
    "limited by another": {
        "type": "object",
        "properties": {"a": {}, "b": {"type": "null"}},
        "required": ["a"],
        "allOf": [{"additionalProperties": {"type": "null"}}],
    },
    "reference": {"$ref": "#/$defs/p", "$defs": {"p": PERSON}},
    "described reference": {"properties": {"p": {"allOf": [{"$ref": "#/$defs/p"}], "description": "x"}}, "$defs": {"p": PERSON}, "required": ["p"]},
    "tree": {
        "type": "object",
        "properties": {"value": {"type": "null"}, "children": {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}},
        "required": ["value"],
    },
    "a choice of anything": {"anyOf": [True], "oneOf": [{"type": "null"}]},
    "choices of two kinds": {"anyOf": [{"$ref": "#/$defs/a"}], "oneOf": [{"required": ["name"]}], "$defs": {"a": PERSON}},
    "a limit beside a reference to anything": {
        "allOf": [{"$ref": "#/$defs/a", "type": "string", "maxLength": 3}],
        "$defs": {"a": True},
    },
    "many references": {"allOf": [{"$ref": "#/$defs/a"}] * 40, "$defs": {"a": PERSON}},
    "remarks": {"type": "null", "title": "x", "description": "y", "default": 5, "examples": [1], "x-mine": {"not": 1}},
    "unknown format": {"type": "string", "format": "uri", "maxLength": 5},
}  # fmt: skip


def grammar_of(schema: Any) -> Grammar:
    writer = SchemaWriter()
    return Grammar(writer.grammar(writer.add(schema, "response_format")))


@pytest.mark.parametrize("name", SCHEMAS)
def test_all_that_the_grammar_lets_through_is_valid(name: str) -> None:
    grammar = grammar_of(SCHEMAS[name])
    texts = {random_text(grammar, seed) for seed in range(60)}
    for text in texts:
        assert is_valid(json.loads(text), SCHEMAS[name]), text


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("object", ['{"a": {"b": [1, "x", {"c": null}]}}', "{}", '{\n  "a": 1\n}']),
        ("short string", ['"ab"', '"a\\"\\u00e9"', '"日本語語"']),
        ("pattern", ['"AB-1"', '"ABC-12.5"', r'"AB-1\""', r'"AB-1\\"']),
        ("integers between", ["-37", "-1", "0", "9", "10", "99", "100", "999", "1205"]),
        ("positive", ["1", "10", "999999999999999"]),
        ("share", ["0", "1", "0.5", "0.001"]),
        ("latitude", ["-90", "-0.5", "89.25", "90", "0"]),
        ("person", ['{"name": "x"}', '{"name":"x","age":5}']),
        ("all optional", ["{}", '{"a": true}', '{"e": true}', '{"b": true, "d": false}']),
        ("last needed", ['{"b": null, "d": null}', '{"a": null, "b": null, "c": null, "d": null}']),
        ("tree", ['{"value": null, "children": [{"value": null, "children": []}]}']),
        ("enumeration", ['"red"', "3", "null", "[1]"]),
    ],
)
def test_what_models_write_gets_through(name: str, texts: list[str]) -> None:
    grammar = grammar_of(SCHEMAS[name])
    for text in texts:
        assert is_valid(json.loads(text), SCHEMAS[name])
        state = grammar.after(grammar.start, text.encode())
        assert state is not None, text
        assert state.may_end, text


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("integers between", ["-38", "1206", "2000", "007", "1.5"]),
        ("positive", ["0", "-1", "01"]),
        ("share", ["1.5", "2", "-0.1"]),
        ("open share", ["0", "1", "0.0"]),
        ("short string", ['"a"', '"abcde"']),
        ("person", ["{}", '{"age": 5}', '{"name": 5}']),
        ("counted list", ["[]", "[true]", "[true, true, true, true]"]),
        ("pattern", ['"a"', '"AB-"', '"AB-1\n"']),
        ("string", ['"\n"', '"\\ud800"', '"\\x"']),
    ],
)
def test_what_is_not_valid_does_not_get_through(name: str, texts: list[str]) -> None:
    grammar = grammar_of(SCHEMAS[name])
    for text in texts:
        state = grammar.after(grammar.start, text.encode())
        assert state is None or not state.may_end, text


def test_white_space_and_strings_come_to_an_end() -> None:
    grammar = grammar_of({"type": "object"})
    assert grammar.after(grammar.start, b"{\n" + b" " * 32) is not None
    assert grammar.after(grammar.start, b"{\n" + b" " * 33) is None
    assert grammar.after(grammar.start, b"{\n\n") is None
    assert grammar.after(grammar.start, b"{  ") is None
    assert grammar.after(grammar.start, b'{"' + b"a" * (1 << 14)) is not None
    assert grammar.after(grammar.start, b'{"' + b"a" * ((1 << 14) + 1)) is None
    assert grammar.after(grammar.start, b'{"":' + b"[" * 7) is not None
    assert grammar.after(grammar.start, b'{"":' + b"[" * 8) is None
    done = grammar.after(grammar.start, b"{}")
    assert done is not None
    assert done.must_end


@pytest.mark.parametrize(
    ("form", "parse"),
    [
        ("date", datetime.date.fromisoformat),
        ("time", datetime.time.fromisoformat),
        ("date-time", datetime.datetime.fromisoformat),
        ("uuid", uuid.UUID),
    ],
)
def test_formats_are_kept(form: str, parse: Any) -> None:
    grammar = grammar_of({"type": "string", "format": form})
    for seed in range(50):
        parse(json.loads(random_text(grammar, seed)))


def nested(levels: int) -> Any:
    return {"type": "array", "items": nested(levels - 1)} if levels else {"type": "null"}


HOSTILE: dict[str, Any] = {
    "no schema": 5,
    "nothing": False,
    "many that may be left out": {"type": "object", "properties": {f"p{n}": {} for n in range(201)}},
    "a list of types that are none": {"type": ["string", "thing"]},
    "type of another kind": {"type": 5},
    "remote": {"$ref": "https://attacker.invalid/schema.json"},
    "file": {"$ref": "file:///etc/passwd"},
    "relative": {"$ref": "other.json#/a"},
    "nowhere": {"$ref": "#/$defs/none"},
    "no text": {"$ref": 5},
    "itself": {"$ref": "#"},
    "each other": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "itself by all": {"allOf": [{"$ref": "#"}]},
    "itself by any": {"anyOf": [{"$ref": "#"}]},
    "endless": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    "not": {"not": {"type": "string"}},
    "if": {"if": {}, "then": {}},
    "pattern properties": {"type": "object", "patternProperties": {"a": {}}},
    "unique": {"type": "array", "uniqueItems": True},
    "multiple": {"type": "integer", "multipleOf": 7},
    "no enumeration": {"enum": []},
    "enumeration of another type": {"type": "string", "enum": [1]},
    "named values and other limits": {"enum": ["a", "abc"], "minLength": 2},
    "lists in two ways": {"prefixItems": [{"type": "null"}], "allOf": [{"items": {"type": "boolean"}}]},
    "no choices": {"anyOf": []},
    "choices that are none": {"anyOf": 5},
    "counts backwards": {"type": "array", "minItems": 3, "maxItems": 2},
    "reference by anchor": {"$ref": "#a", "$defs": {"a": {"$anchor": "a", "type": "null"}}},
    "reference before its way": {"$ref": "#x/$defs/a", "$defs": {"a": {"type": "null"}}},
    "choices beside a reference to others": {
        "$ref": "#/$defs/a",
        "anyOf": [{"const": 1}],
        "$defs": {"a": {"anyOf": [{"const": 1}, {"const": 2}]}},
    },
    "choices beside a part's": {"allOf": [{"anyOf": [{"const": 1}]}], "anyOf": [{"const": 1}, {"const": 2}]},
    "choices among others": {"anyOf": [{"oneOf": [{"const": 1}]}], "oneOf": [{"const": 1}, {"const": 2}]},
    "limits beside a part's reference": {
        "allOf": [{"$ref": "#/$defs/a", "type": "string", "minLength": 1}],
        "$defs": {"a": {"minLength": 5}},
    },
    "reference to itself beside a limit": {"allOf": [{"$ref": "#/allOf/0", "type": "null"}]},
    "negative count": {"type": "string", "minLength": -1},
    "count of another kind": {"type": "string", "maxLength": "5"},
    "huge count": {"type": "array", "minItems": 10**9},
    "no number between": {"type": "integer", "minimum": 1.2, "maximum": 1.8},
    "bounds backwards": {"type": "integer", "minimum": 5, "maximum": 1},
    "huge bound": {"type": "integer", "minimum": 10**4000},
    "bound of another kind": {"type": "integer", "minimum": "5"},
    "looking ahead": {"type": "string", "pattern": "^(?=a)b"},
    "reference in a pattern": {"type": "string", "pattern": r"(a)\1"},
    "broken pattern": {"type": "string", "pattern": "(["},
    "long pattern": {"type": "string", "pattern": "a" * 5000},
    "exploding pattern": {"type": "string", "pattern": "((((a{1,999}){1,999}){1,999}){1,99999})"},
    "pattern of nothing": {"type": "string", "pattern": "(a*)*"},
    "pattern of another kind": {"type": "string", "pattern": 5},
    "pattern and length": {"type": "string", "pattern": "a", "maxLength": 5},
    "properties that are none": {"type": "object", "properties": [1]},
    "required that is none": {"type": "object", "required": "a"},
    "required of no names": {"type": "object", "required": [1]},
    "required but not allowed": {"type": "object", "required": ["a"], "additionalProperties": False},
    "a property that is no schema": {"type": "object", "properties": {"a": 5}},
    "deep": nested(40),
    "long": {"enum": ["x" * 70_000]},
    "wide": {"anyOf": [{"const": n} for n in range(3000)]},
    "multiplying": {
        "$ref": "#/$defs/d0",
        "$defs": {
            f"d{n}": {"type": "object", "properties": {p: {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}]} for p in "abc"}}
            for n in range(8)
        }
        | {"d8": {"type": "null"}},
    },
    "clashing": {"allOf": [{"type": "string"}, {"type": "integer"}]},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_no_grammar_can_say_is_refused_by_the_fields_name(name: str) -> None:
    with pytest.raises((Refused, WrongUse)) as caught:
        grammar_of(HOSTILE[name])
    if isinstance(caught.value, Refused):
        assert (caught.value.status, caught.value.param) == (400, "response_format")
        assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("multiplying", "more than 2048 schemas"),
        ("remote", "leads out of it"),
        ("file", "leads out of it"),
        ("deep", "deeper than 32"),
        ("long", "longer than 65536"),
        ("unique", "counts or compares"),
        ("looking ahead", "'pattern'"),
    ],
)
def test_a_refusal_says_what_is_wrong(name: str, words: str) -> None:
    with pytest.raises(Refused, match=words):
        grammar_of(HOSTILE[name])


KEYWORDS = [
    "type",
    "properties",
    "required",
    "items",
    "prefixItems",
    "anyOf",
    "allOf",
    "oneOf",
    "$ref",
    "enum",
    "const",
    "pattern",
]
KEYWORDS += ["minItems", "maxItems", "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "format", "a"]
VALUES = st.sampled_from(["object", "array", "string", "integer", "number", "#", "#/properties/a", "^a+$", "date", "a"])
LEAVES = st.one_of(st.booleans(), st.integers(-3, 4), st.floats(-3, 3), VALUES, st.none())
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=4),
    max_leaves=20,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(KEYWORDS), ANYTHING, max_size=5))
@example({"type": "array", "minItems": None})
def test_any_json_is_a_schema_or_refused(schema: Any) -> None:
    with contextlib.suppress(Refused, WrongUse):
        grammar_of(schema)


NAMES = st.lists(st.sampled_from(["a", "b", "title", 'q"']), max_size=3)
SIMPLE: Any = st.one_of(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["string", "integer", "number", "boolean", "null", "object", "array"])}
    ),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["integer", "number"])},
        optional={
            "minimum": st.integers(-30, 5),
            "maximum": st.integers(0, 40),
            "exclusiveMinimum": st.floats(-9, 1),
            "exclusiveMaximum": st.integers(5, 9),
        },
    ),
    st.fixed_dictionaries({}, optional={"minLength": st.integers(0, 3), "maxLength": st.integers(2, 5)}),
    st.fixed_dictionaries({"enum": st.lists(LEAVES, min_size=1, max_size=3)}, optional={"type": st.just("string")}),
)


def larger(inner: Any) -> Any:
    described = st.dictionaries(st.sampled_from(["a", "b", "title", 'q"']), inner, max_size=3)
    some = st.lists(inner, min_size=1, max_size=3)
    thing = st.fixed_dictionaries(
        {"type": st.just("object")},
        optional={"properties": described, "required": NAMES, "additionalProperties": st.booleans() | inner},
    )
    series = st.fixed_dictionaries(
        {"type": st.just("array")},
        optional={"items": inner, "prefixItems": some, "minItems": st.integers(0, 2), "maxItems": st.integers(1, 4)},
    )
    choice = st.fixed_dictionaries({"anyOf": some}, optional={"type": st.just("object"), "properties": described})
    return st.one_of(thing, series, choice, st.fixed_dictionaries({"allOf": some}, optional={"required": NAMES}))


@settings(deadline=None, max_examples=300)
@given(st.recursive(SIMPLE, larger, max_leaves=8), st.integers(0, 9))
def test_whatever_gets_through_the_grammar_of_any_schema_is_valid(schema: Any, seed: int) -> None:
    with contextlib.suppress(Refused, WrongUse):
        text = random_text(grammar_of(schema), seed)
        assert is_valid(json.loads(text), schema), text


LABORIOUS: dict[str, Any] = {
    "parts of many keywords": {
        "$defs": {"a": {"allOf": [{f"k{n}": 0 for n in range(1500)}, *[{}] * 6000]}},
        "anyOf": [{"title": "x", "minLength": n, "$ref": "#/$defs/a"} for n in range(400)],
    },
    "values beside many options": {"enum": [*range(5000), "a"], "type": "string", "anyOf": [{}] * 2000},
    "texts beside many options": {"const": "x" * 40_000, "anyOf": [{}] * 2000},
    "a value held against many": {"const": ["x"] * 5000, "enum": [[], *range(6000)]},
    "names beside many options": {"properties": {"x" * 40_000: {"type": "null"}}, "anyOf": [{}] * 1000},
    "a pattern beside many options": {"pattern": f"^[^{'a' * 1000}]$", "anyOf": [{}] * 2000},
    "a long way": {
        "$defs": {"a" * 5000: {}, "b": {"$ref": "#/$defs/" + "%61" * 5000}},
        "anyOf": [{"type": "null", "$ref": "#/$defs/b"}] * 900,
    },
}


@pytest.mark.parametrize("name", LABORIOUS)
def test_what_takes_long_to_write_out_is_refused_soon(name: str) -> None:
    began = time.thread_time()
    with contextlib.suppress(Refused):
        SchemaWriter().add(LABORIOUS[name], "response_format")
    assert time.thread_time() - began < 0.5


def test_one_place_is_written_out_once_whatever_it_is_called() -> None:
    writer = SchemaWriter()
    schema = {"$defs": {"a": PERSON}, "anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/%24defs/a"}]}
    assert writer.grammar(writer.add(schema, "response_format")).count("name") == 1
