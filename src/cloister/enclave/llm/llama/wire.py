"""The words between front and engine: length-prefixed JSON over a socketpair, parsed strictly on both ends.

A model file may take over the engine's process, so nothing is ever unpickled, every length is bounded, and what does
not look as expected ends the conversation. One decode step's events for all streams travel in one message.
"""

import json
import struct
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from cloister.enclave.llm.engine import (
    Delta,
    Done,
    Event,
    GenerateRequest,
    ModelInfo,
    Prompt,
    Sampling,
    Started,
    TokenLogprob,
)
from cloister.enclave.llm.reasoning import THINKINGS
from cloister.enclave.llm.toolcalls import CALL_FORMS
from cloister.errors import (
    CloisterError,
    ContextLengthExceeded,
    MalformedMessage,
    MalformedModel,
    WrongUse,
)

__all__ = [
    "FrameReader",
    "FromEngine",
    "decode_error",
    "decode_event",
    "decode_model",
    "decode_request",
    "encode_error",
    "encode_event",
    "encode_model",
    "encode_request",
    "frame",
]

MAX_REQUEST = 64 << 20
"""Bytes of one message to the engine: a prompt and what belongs to it."""
MAX_EVENT = 16 << 20
"""Bytes of one message from the engine."""

FromEngine: TypeAlias = dict[str, Any]
_DEPTH = 64
_LENGTH = struct.Struct("<I")


def frame(message: Mapping[str, Any]) -> bytes:
    """Raises: TypeError, ValueError, RecursionError when the message is no JSON."""
    body = json.dumps(message, separators=(",", ":"), allow_nan=False).encode()
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Cuts a byte stream back into messages. Raises: MalformedMessage; the stream is of no more use then."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        held = self._held
        held += data
        messages = []
        at = 0
        while len(held) - at >= 4:
            (length,) = _LENGTH.unpack_from(held, at)
            if length > self._limit:
                raise MalformedMessage("An engine message is too long.", expected=str(self._limit), got=str(length))
            if len(held) - at - 4 < length:
                break
            messages.append(_parse(bytes(held[at + 4 : at + 4 + length])))
            at += 4 + length
        del held[:at]
        return messages


def _parse(body: bytes) -> dict[str, Any]:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MalformedMessage("An engine message is not JSON.") from error
    if not isinstance(message, dict):
        raise MalformedMessage("An engine message is not an object.")
    return message


def _whole(value: object, *, top: int = 1 << 40) -> int:
    if type(value) is not int or not 0 <= value <= top:
        raise MalformedMessage("An engine message holds no number where one belongs.")
    return value


def _text(value: object, *, limit: int = MAX_EVENT) -> str:
    if type(value) is not str or len(value) > limit:
        raise MalformedMessage("An engine message holds no text where some belongs.")
    return value


def real(value: object) -> float:
    """A finite number, as far from overflow as from NaN. Raises: MalformedMessage."""
    if not isinstance(value, float | int) or isinstance(value, bool) or not -1e300 <= value <= 1e300:
        raise MalformedMessage("An engine message holds no number where one belongs.")
    return float(value)


# Requests: from the front, which is ours; the engine still checks what it needs to.


def encode_request(number: int, request: GenerateRequest) -> dict[str, Any]:
    """Raises: WrongUse when messages or tools are nested beyond reason."""
    prompt, sampling = request.prompt, request.sampling
    message: dict[str, Any] = {"t": "generate", "id": number}
    message |= {"truncate": request.truncate_prompt, "count": request.count_prompt}
    if prompt.messages is not None:
        _check_depth(prompt.messages, _DEPTH)
        _check_depth(prompt.tools, _DEPTH)
        message["messages"] = [dict(m) for m in prompt.messages]
        message["tools"] = [dict(tool) for tool in prompt.tools]
    elif prompt.tokens is not None:
        message["tokens"] = list(prompt.tokens)
    else:
        message["text"] = prompt.text or ""
    if request.scope is not None:
        message["scope"] = request.scope.hex()
    fields = {name: getattr(sampling, name) for name in Sampling.__dataclass_fields__}
    fields["logit_bias"] = [[token, bias] for token, bias in sampling.logit_bias.items()]
    message["sampling"] = fields
    return message


def _check_depth(value: object, left: int) -> None:
    if left == 0:
        raise WrongUse("The messages are nested too deeply.", expected=f"{_DEPTH} levels at most")
    inner: Iterable[object] = ()
    if isinstance(value, Mapping):
        inner = value.values()
    elif isinstance(value, list | tuple):
        inner = value
    for item in inner:
        _check_depth(item, left - 1)


def decode_request(message: Mapping[str, Any]) -> GenerateRequest:
    fields = dict(message["sampling"])
    fields["stop"] = tuple(fields["stop"])
    fields["logit_bias"] = {int(token): float(bias) for token, bias in fields["logit_bias"]}
    scope = message.get("scope")
    messages, tokens = message.get("messages"), message.get("tokens")
    return GenerateRequest(
        prompt=Prompt(
            messages=None if messages is None else tuple(messages),
            text=message.get("text"),
            tokens=None if tokens is None else tuple(tokens),
            tools=tuple(message.get("tools", ())),
        ),
        sampling=Sampling(**fields),
        scope=None if scope is None else bytes.fromhex(scope),
        truncate_prompt=bool(message["truncate"]),
        count_prompt=bool(message["count"]),
    )


# Events: from the engine, which may have been taken over.


def encode_event(number: int, event: Event | CloisterError) -> list[Any]:
    match event:
        case Started():
            return [number, "s", event.prompt_tokens, event.cached_tokens, event.truncated]
        case Delta():
            if event.logprobs:
                return [number, "d", event.text, event.tokens, [_encode_logprob(entry) for entry in event.logprobs]]
            return [number, "d", event.text, event.tokens]
        case Done():
            return [number, "f", event.finish_reason, event.prompt_tokens, event.completion_tokens, event.cached_tokens]
        case _:
            return [number, "x", *encode_error(event)]


def _encode_logprob(entry: TokenLogprob) -> list[Any]:
    return [entry.token, entry.raw.hex(), entry.logprob, [_encode_logprob(other) for other in entry.top]]


def decode_event(item: object) -> tuple[int, Event | CloisterError]:
    """Raises: MalformedMessage."""
    if not isinstance(item, list) or len(item) < 2:
        raise MalformedMessage("An engine event has no shape.")
    number, kind, fields = _whole(item[0]), item[1], item[2:]
    try:
        if kind == "d":
            if len(fields) == 2:
                return number, Delta(_text(fields[0]), _whole(fields[1]))
            text, tokens, entries = fields
            return number, Delta(_text(text), _whole(tokens), tuple(_decode_logprob(e, depth=1) for e in entries))
        if kind == "s":
            prompt, cached, truncated = fields
            return number, Started(_whole(prompt), _whole(cached), _whole(truncated))
        if kind == "f":
            reason, prompt, completion, cached = fields
            if reason not in ("stop", "length"):
                raise MalformedMessage("An engine event ends for no known reason.")
            return number, Done(reason, _whole(prompt), _whole(completion), _whole(cached))
        if kind == "x":
            return number, decode_error(fields)
    except (TypeError, ValueError) as error:
        raise MalformedMessage("An engine event has no shape.") from error
    raise MalformedMessage("An engine event of no known kind.")


def _decode_logprob(item: list[Any], *, depth: int) -> TokenLogprob:
    token, raw, logprob, top = item
    if top and not depth:
        raise MalformedMessage("An engine event is nested too deeply.")
    others = tuple(_decode_logprob(entry, depth=0) for entry in top)
    return TokenLogprob(_whole(token), bytes.fromhex(_text(raw, limit=4096)), real(logprob), others)


def encode_error(error: CloisterError) -> list[Any]:
    if isinstance(error, ContextLengthExceeded):
        return ["context", error.limit, error.prompt, error.requested]
    kind = "model" if isinstance(error, MalformedModel) else "use"
    return [kind, error.message, error.hint]


def decode_error(fields: list[Any]) -> CloisterError:
    """Only the errors that an engine may hand out. Raises: MalformedMessage, TypeError, ValueError."""
    kind = fields[0] if fields else None
    if kind == "context":
        _, limit, prompt, requested = fields
        return ContextLengthExceeded(limit=_whole(limit), prompt=_whole(prompt), requested=_whole(requested))
    if kind not in ("model", "use"):
        raise MalformedMessage("An engine error of no known kind.")
    _, message, hint = fields
    message, hint = printable(_text(message), 500), printable(_text(hint), 500)
    return MalformedModel(message, hint=hint) if kind == "model" else WrongUse(message, hint=hint)


def printable(text: str, limit: int) -> str:
    """`text` cut to `limit` characters, with nothing in it that could steer a terminal or a log."""
    return "".join(c if c.isprintable() else " " for c in text[:limit])


def encode_model(info: ModelInfo) -> dict[str, Any]:
    return {name: getattr(info, name) for name in ModelInfo.__dataclass_fields__}


def decode_model(fields: object, *, name: str, sha256: str, size: int, created: int) -> ModelInfo:
    """What the engine says about its model; what the front knows better replaces the engine's word.

    Raises: MalformedMessage.
    """
    if not isinstance(fields, dict):
        raise MalformedMessage("The engine describes no model.")
    calls, thinking = fields.get("calls", ""), fields.get("thinking", "")
    if calls not in CALL_FORMS or thinking not in THINKINGS:
        raise MalformedMessage("The engine describes a model of no known kind.")
    return ModelInfo(
        name=name or printable(_text(fields.get("name")), 200) or "model",
        sha256=sha256,
        quantization=printable(_text(fields.get("quantization")), 60),
        architecture=printable(_text(fields.get("architecture")), 60),
        parameters=_whole(fields.get("parameters"), top=1 << 60),
        size=size,
        context_length=_whole(fields.get("context_length")),
        has_chat_template=fields.get("has_chat_template") is True,
        created=created,
        calls=calls,
        thinking=thinking,
        embedding=_whole(fields.get("embedding", 0), top=1 << 16),
        generates=fields.get("generates") is not False,
    )
