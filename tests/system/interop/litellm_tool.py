"""LiteLLM, unchanged, as a client of both dialects: asks what a program asks, and prints what it saw, as JSON.

litellm_tool.py http://127.0.0.1:8484 http://127.0.0.1:8485
"""
# mypy: ignore-errors

import json
import sys
from typing import Any

import litellm

MESSAGES = [{"role": "user", "content": "What does attestation prove?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "people": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "people"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "place", "description": "A place.", "parameters": SCHEMA}}


def dialects(address: str) -> dict[str, dict[str, Any]]:
    return {
        "openai": {"model": "openai/default", "api_base": f"{address}/v1", "api_key": "none"},
        "anthropic": {"model": "anthropic/default", "api_base": address, "api_key": "none"},
    }


def seen_by(dialect: dict[str, Any]) -> dict[str, Any]:
    asked = {**dialect, "messages": MESSAGES, "max_tokens": 24, "temperature": 0, "num_retries": 0}
    whole = litellm.completion(**asked)
    pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**asked, stream=True)]
    called = litellm.completion(
        **{**asked, "max_tokens": 200},
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "place"}},
    )
    function = called.choices[0].message.tool_calls[0].function
    return {
        "whole": whole.choices[0].message.content,
        "tokens": whole.usage.completion_tokens,
        "streamed": "".join(pieces),
        "call": [called.choices[0].finish_reason, function.name, json.loads(function.arguments)],
        "errors": [
            error_of({**asked, "model": asked["model"].replace("default", "nothing")}),
            error_of({**asked, "temperature": 9}),
        ],
    }


def error_of(asked: dict[str, Any]) -> str:
    try:
        litellm.completion(**asked)
    except (litellm.exceptions.BadRequestError, litellm.exceptions.NotFoundError) as error:
        return type(error).__name__
    return "none"


def typed(dialect: dict[str, Any]) -> Any:
    answer = litellm.completion(
        **dialect,
        messages=MESSAGES,
        max_tokens=200,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}},
    )
    return json.loads(answer.choices[0].message.content)


def seen_at(address: str) -> dict[str, Any]:
    both = dialects(address)
    return {**{name: seen_by(one) for name, one in both.items()}, "typed": typed(both["openai"])}


litellm.suppress_debug_info = True
print(json.dumps([seen_at(address) for address in sys.argv[1:]]))
