"""Whether a value is valid by a JSON schema: written from the specification, for tests, and slow. And random texts."""

import random
import re
from typing import Any

from cloister.enclave.llm.gbnf import Chars
from cloister.enclave.llm.grammar import Grammar

KINDS: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
}


def is_kind(value: Any, kind: str) -> bool:
    if kind in ("integer", "number"):
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        return plain and (kind == "number" or float(value).is_integer())
    return isinstance(value, KINDS[kind])


def is_valid(value: Any, schema: Any, root: Any = None) -> bool:
    root = schema if root is None else root
    if isinstance(schema, bool):
        return schema
    kinds = schema.get("type", [])
    checks = [
        not kinds or any(is_kind(value, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)),
        "const" not in schema or value == schema["const"],
        "enum" not in schema or value in schema["enum"],
        all(is_valid(value, part, root) for part in schema.get("allOf", [])),
        all(any(is_valid(value, part, root) for part in schema[key]) for key in ("anyOf", "oneOf") if key in schema),
    ]
    if "$ref" in schema:
        target = root
        for step in schema["$ref"].split("/")[1:]:
            target = target[step]
        checks.append(is_valid(value, target, root))
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        checks += [name in value for name in schema.get("required", [])]
        checks += [is_valid(inner, known.get(name, others), root) for name, inner in value.items()]
    elif isinstance(value, list):
        first, others = schema.get("prefixItems", []), schema.get("items", True)
        checks += [schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))]
        checks += [is_valid(item, part, root) for item, part in zip(value, first, strict=False)]
        checks += [is_valid(item, others, root) for item in value[len(first) :]]
    elif isinstance(value, str):
        checks += [schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))]
        checks += [re.search(schema.get("pattern", ""), value) is not None]
    elif is_kind(value, "number"):
        checks += ["minimum" not in schema or value >= schema["minimum"]]
        checks += ["maximum" not in schema or value <= schema["maximum"]]
        checks += ["exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"]]
        checks += ["exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"]]
    return all(checks)


def random_text(grammar: Grammar, seed: int) -> str:
    """Some text that the grammar takes; every way on is as likely as the others."""
    rng = random.Random(seed)
    state, text = grammar.start, ""
    while not state.must_end:
        way = rng.choice(state.ways)
        if way is None:
            break
        head = way[0]
        assert isinstance(head, Chars)
        run = rng.randrange(0, len(head.bounds), 2)
        char = chr(rng.randrange(head.bounds[run], min(head.bounds[run + 1], head.bounds[run] + 90)))
        after = grammar.after(state, char.encode(errors="surrogatepass"))
        assert after is not None
        state, text = after, text + char
    return text
