"""What other people's tools are asked to fill in, and that it came the same by both ways to one enclave."""

import base64
import os
from collections.abc import Mapping
from typing import TypeVar

from jsonschema import Draft202012Validator

Seen = TypeVar("Seen")

PLACE = Draft202012Validator(
    {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"enum": list(range(1, 10))}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
)


def caching() -> dict[str, str]:
    """For one way's client: what was read of its earlier prompts is kept, with and without a proxy. What is computed anew
    may differ in a last bit, and with it a token."""
    return {"Cloister-Cache-Secret": base64.urlsafe_b64encode(os.urandom(32)).rstrip(b"=").decode()}


def same(seen: Mapping[str, Seen]) -> Seen:
    """What was seen, which does not depend on the way."""
    assert seen["plaintext"] == seen["proxy"], seen
    return seen["proxy"]
