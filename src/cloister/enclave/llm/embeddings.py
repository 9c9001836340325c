"""OpenAI's /v1/embeddings (https://platform.openai.com/docs/api-reference/embeddings), for models that give any."""

import base64
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from cloister.enclave.llm import sse
from cloister.enclave.llm.connection import WhileConnected
from cloister.enclave.llm.engine import Embedded
from cloister.enclave.llm.fields import Fields, refuse
from cloister.enclave.llm.service import Call

__all__ = ["EmbeddingsAsk", "embeddings", "parse_embeddings"]

MAX_INPUTS = 2048
"""Texts in one request, as OpenAI has it."""
_MAX_DIMENSIONS = 1 << 16

Input: TypeAlias = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class EmbeddingsAsk:
    """`dimensions`: what the caller counts on; None: whatever the model gives. `packed`: base64 of 32-bit floats."""

    model: str | None
    inputs: tuple[Input, ...]
    packed: bool = False
    dimensions: int | None = None


def parse_embeddings(fields: Fields) -> EmbeddingsAsk:
    """A string, token ids, or an array of either. Raises `Refused` (400)."""
    encoding = fields.text("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        refuse("encoding_format", "'encoding_format' must be float or base64.")
    return EmbeddingsAsk(
        model=fields.text("model"),
        inputs=_inputs(fields),
        packed=encoding == "base64",
        dimensions=fields.integer("dimensions", 1, _MAX_DIMENSIONS),
    )


def _inputs(fields: Fields) -> tuple[Input, ...]:
    value = fields.get("input")
    values = [value] if isinstance(value, str) else fields.array("input")
    if not values:
        refuse("input", "'input' is missing or empty.", "missing_required_parameter")
    if isinstance(values[0], int):
        return (fields.tokens("input", values),)
    if len(values) > MAX_INPUTS:
        refuse("input", f"'input' may hold {MAX_INPUTS} texts at most.")
    found = tuple(_input(fields, one) for one in values)
    if len({isinstance(one, str) for one in found}) > 1:
        refuse("input", "'input' must hold either texts or token ids.", "invalid_type")
    return found


def _input(fields: Fields, value: Any) -> Input:
    if not isinstance(value, str | list):
        refuse("input", "'input' must be a string, token ids, or an array of either.", "invalid_type")
    if not value:
        refuse("input", "'input' holds an empty text.")
    return value if isinstance(value, str) else fields.tokens("input", value)


async def embeddings(call: Call) -> None:
    call.prompt_field = "input"
    ask = parse_embeddings(await call.fields())
    model = call.service.serving(ask.model).model
    if ask.dimensions is not None and model.embedding and ask.dimensions != model.embedding:
        message = f"This model's embeddings have {model.embedding} dimensions, and are not cut to fewer."
        refuse("dimensions", message, "unsupported_parameter")
    async with WhileConnected(call.receive):
        found = await call.service.embeddings(call.principal, ask.inputs)
        await call.reply.json(200, _whole(found, model.name, packed=ask.packed))


def _whole(found: Sequence[Embedded], model: str, *, packed: bool) -> bytes:
    tokens = sum(embedded.tokens for embedded in found)
    data = [
        {"object": "embedding", "index": index, "embedding": _numbers(embedded.vector, packed=packed)}
        for index, embedded in enumerate(found)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return sse.compact({"object": "list", "data": data, "model": model, "usage": usage}).encode("ascii")


def _numbers(vector: bytes, *, packed: bool) -> str | list[float]:
    """As text each number in as few digits as give the same 32 bits again would be; JSON has the 64 of them."""
    if packed:
        return base64.b64encode(vector).decode()
    return list(struct.unpack(f"<{len(vector) // 4}f", vector))
