"""Anthropic's routes: messages, and messages/count_tokens (https://docs.anthropic.com/en/api/messages)."""

import secrets
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from cloister.enclave.llm import sse
from cloister.enclave.llm.blocks import Block, Blocks, Closed, Opened, Outcome, Piece, tell
from cloister.enclave.llm.connection import WhileConnected
from cloister.enclave.llm.engine import EngineInfo, GenerateRequest, Prompt, Sampling, Started
from cloister.enclave.llm.envelope import Refused
from cloister.enclave.llm.fields import Fields, refuse
from cloister.enclave.llm.functions import element, join_texts, missing, read_tools, refuse_media, required_text
from cloister.enclave.llm.requests import MAX_MESSAGES, MAX_STOP_LENGTH, MAX_STOPS, MAX_TOKENS, Ask
from cloister.enclave.llm.service import Call
from cloister.enclave.llm.structured import ANY, Plan, Shape, plan_answer
from cloister.enclave.llm.toolcalls import AUTO, Tool, ToolChoice
from cloister.errors import ContextLengthExceeded

__all__ = ["count_tokens", "messages", "parse_count", "parse_messages"]

ERROR_EVENT = b"event: error\n"
ROLES = ("user", "assistant", "system")
FORGOTTEN = ("thinking", "redacted_thinking")
"""Blocks of past answers that no template wants back."""


async def messages(call: Call) -> None:
    """One answer, whole or streamed. Thoughts are told only where `thinking` asks for them."""
    call.reply.error_event = ERROR_EVENT
    ask, thoughts = parse_messages(await call.fields())
    info, plan = _plan(call, ask)
    limit = ask.sampling.max_tokens
    if limit is not None and limit >= info.model.context_length:  # such an answer ends with the context
        ask = replace(ask, sampling=replace(ask.sampling, max_tokens=None))
    # The engine does not say which stop sequence it met, so that they are looked for here.
    unstopped = replace(ask, sampling=replace(ask.sampling, stop=()))
    request = unstopped.requests(call.scope(), plan)[0]
    blocks = Blocks(plan.reading, thoughts=thoughts)
    form = MessageForm(f"msg_{secrets.token_hex(12)}", info.model.name, ask.sampling.max_tokens)
    await tell(call, request, form, blocks, stream=ask.stream, stops=ask.sampling.stop)


async def count_tokens(call: Call) -> None:
    """The prompt's tokens as the engine counts them, its template and tools included, however long it is.

    It takes a slot for that, and gives it back before anything is generated.
    """
    ask = parse_count(await call.fields())
    _, plan = _plan(call, ask)
    counted = 0
    async with WhileConnected(call.receive):
        try:
            counted = await _count(call, replace(ask.requests(call.scope(), plan)[0], count_prompt=True))
        except ContextLengthExceeded as error:
            counted = error.prompt
        await call.reply.json(200, sse.compact({"input_tokens": counted}).encode("ascii"))


async def _count(call: Call, request: GenerateRequest) -> int:
    async with aclosing(call.answers([request])) as events:
        async for _, event in events:
            if isinstance(event, Started):
                return event.prompt_tokens
    return 0


def _plan(call: Call, ask: Ask) -> tuple[EngineInfo, Plan]:
    info = call.service.serving(ask.model)
    if not info.model.has_chat_template:
        message = "The model has no chat template; /v1/completions takes plain text."
        raise Refused(400, "no_chat_template", message, param="messages")
    if ask.tools and not info.model.calls and ask.choice.mode == "auto":
        message = (
            "'tools': this model's chat template knows none, or writes calls in a form that is not known here. A "
            "'tool_choice' of type any or tool forces a call all the same."
        )
        refuse("tools", message, "unsupported_parameter")
    return info, plan_answer(info.model, ask.tools, ask.choice, ask.shape)


def parse_messages(fields: Fields) -> tuple[Ask, bool]:
    """`/v1/messages`, and whether thoughts are asked for. Raises `Refused` (400)."""
    max_tokens = fields.integer("max_tokens", 1, MAX_TOKENS)
    if max_tokens is None:
        missing("max_tokens")
    sampling = Sampling(
        max_tokens=max_tokens,
        temperature=fields.number("temperature", 1.0, 0, 1),
        top_p=fields.number("top_p", 1.0, 0, 1),
        top_k=fields.integer("top_k", 0, MAX_TOKENS) or 0,
        stop=_stops(fields),
    )
    thoughts = fields.object("thinking").text("type") in ("enabled", "adaptive")
    return replace(_asked(fields), sampling=sampling, stream=fields.flag("stream")), thoughts


def parse_count(fields: Fields) -> Ask:
    """`/v1/messages/count_tokens`: what makes up the prompt. Raises `Refused` (400)."""
    return _asked(fields)


def _asked(fields: Fields) -> Ask:
    system = join_texts(fields, "system", _text)
    turns = [
        message
        for index, value in enumerate(fields.array("messages"))
        for message in _turn(element(value, f"messages[{index}]"))
    ]
    if not turns:
        refuse("messages", "'messages' must hold at least one message.", "missing_required_parameter")
    if len(turns) > MAX_MESSAGES:
        refuse("messages", f"'messages' may hold {MAX_MESSAGES} messages and results of tools at most.")
    if turns[-1]["role"] == "assistant":
        refuse("messages", "'messages' must not end with the assistant's: this model begins its answers anew.")
    if system:
        turns = [{"role": "system", "content": system}, *turns]
    tools = read_tools(fields, (None, "custom"), "input_schema")
    return Ask(
        model=fields.text("model"),
        prompts=(Prompt(messages=tuple(turns)),),
        sampling=Sampling(max_tokens=1),
        tools=tools,
        choice=_choice(fields.object("tool_choice"), tools),
        shape=_shape(fields.object("output_config").object("format")),
    )


def _stops(fields: Fields) -> tuple[str, ...]:
    stops = fields.array("stop_sequences")
    if len(stops) > MAX_STOPS:
        refuse("stop_sequences", f"'stop_sequences' may hold {MAX_STOPS} strings at most.")
    if any(not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        refuse("stop_sequences", f"'stop_sequences' must hold strings of 1 to {MAX_STOP_LENGTH} characters.")
    return tuple(stops)


def _choice(fields: Fields, tools: Sequence[Tool]) -> ToolChoice:
    kind = fields.text("type")
    parallel = not fields.flag("disable_parallel_tool_use")
    if kind in (None, "auto"):
        return replace(AUTO, parallel=parallel)
    if kind == "none":
        return ToolChoice("none")
    if kind == "any":
        if not tools:
            refuse("tool_choice", "'tool_choice' needs 'tools'.")
        return ToolChoice("required", parallel=parallel)
    if kind != "tool":
        refuse("tool_choice.type", "'tool_choice.type' must be auto, any, tool or none.")
    name = required_text(fields, "name")
    if name not in {tool.name for tool in tools}:
        refuse("tool_choice.name", "'tool_choice.name' must name a tool that 'tools' holds.")
    return ToolChoice("named", name, parallel=False)


def _shape(wanted: Fields) -> Shape:
    kind = wanted.text("type")
    if kind is None:
        return ANY
    if kind != "json_schema" or not wanted.has("schema"):
        refuse("output_config.format", "'output_config.format' must be a json_schema with its 'schema'.")
    return Shape("output_config.format", wanted.object("schema").values)


def _text(fields: Fields) -> str:
    """A text block's text."""
    kind = fields.text("type")
    if kind != "text":
        source = fields.object("source")
        refuse_media(fields, remote=kind in ("image", "document") and source.text("type") == "url")
    text = fields.text("text")
    return missing(fields.name("text")) if text is None else text


def _turn(fields: Fields) -> list[Mapping[str, Any]]:
    """One message as templates know them: results of tools are messages of their own."""
    role = fields.text("role")
    if role not in ROLES:
        refuse(fields.name("role"), f"'{fields.name('role')}' must be one of {', '.join(ROLES)}.")
    content = fields.get("content")
    if content is None:
        missing(fields.name("content"))
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    where = fields.name("content")
    parts = [element(part, f"{where}[{index}]") for index, part in enumerate(fields.array("content"))]
    return _answered(parts) if role == "assistant" else _said(role, parts)


def _answered(parts: Sequence[Fields]) -> list[Mapping[str, Any]]:
    texts: list[str] = []
    calls: list[Mapping[str, Any]] = []
    for part in parts:
        kind = part.text("type")
        if kind == "tool_use":
            function = {"name": required_text(part, "name"), "arguments": part.object("input").values}
            calls.append({"id": required_text(part, "id"), "type": "function", "function": function})
        elif kind not in FORGOTTEN:
            texts.append(_text(part))
    return [{"role": "assistant", "content": "\n".join(texts), **({"tool_calls": calls} if calls else {})}]


def _said(role: str, parts: Sequence[Fields]) -> list[Mapping[str, Any]]:
    turns: list[Mapping[str, Any]] = []
    texts: list[str] = []
    for part in parts:
        if part.text("type") == "tool_result":
            if texts:
                turns.append({"role": role, "content": "\n".join(texts)})
                texts = []
            turns.append(_result(part))
        else:
            texts.append(_text(part))
    return [*turns, {"role": role, "content": "\n".join(texts)}] if texts else turns


def _result(fields: Fields) -> Mapping[str, Any]:
    content = join_texts(fields, "content", _text)
    if fields.flag("is_error"):  # templates have no other place for it
        content = f"Error: {content}"
    return {"role": "tool", "tool_call_id": required_text(fields, "tool_use_id"), "content": content}


class MessageForm:
    """`/v1/messages`. `max_tokens` None: the answer may go on until the context is full."""

    def __init__(self, message_id: str, model: str, max_tokens: int | None) -> None:
        self._id = message_id
        self._model = model
        self._max_tokens = max_tokens

    def _message(self, content: Sequence[Mapping[str, Any]], stop: Mapping[str, Any], outcome: Outcome) -> Any:
        head = {"id": self._id, "type": "message", "role": "assistant", "model": self._model}
        return {**head, "content": content, **stop, "usage": _usage(outcome)}

    def begin(self, outcome: Outcome) -> bytes:
        message = self._message([], {"stop_reason": None, "stop_sequence": None}, outcome)
        return _event("message_start", message=message)

    def change(self, change: Opened | Piece | Closed) -> bytes:
        block = change.block
        match change:
            case Opened():
                return _event("content_block_start", index=block.index, content_block=_empty(block))
            case Piece():
                kind, key = _DELTAS[block.kind]
                return _event("content_block_delta", index=block.index, delta={"type": kind, key: change.text})
            case Closed():
                return _event("content_block_stop", index=block.index)

    def end(self, blocks: Sequence[Block], outcome: Outcome) -> bytes:
        delta = self._stop(blocks, outcome)
        return _event("message_delta", delta=delta, usage=_usage(outcome)) + _event("message_stop")

    def whole(self, blocks: Sequence[Block], outcome: Outcome) -> bytes:
        content = [told for block in blocks if (told := _content(block)) is not None]
        return sse.compact(self._message(content, self._stop(blocks, outcome), outcome)).encode("ascii")

    def _stop(self, blocks: Sequence[Block], outcome: Outcome) -> dict[str, Any]:
        if outcome.stop is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": outcome.stop}
        if outcome.reason == "length":
            full = self._max_tokens is None or outcome.completion < self._max_tokens
            reason = "model_context_window_exceeded" if full else "max_tokens"
        else:
            called = any(block.kind == "call" and block.arguments() is not None for block in blocks)
            reason = "tool_use" if called else "end_turn"
        return {"stop_reason": reason, "stop_sequence": None}


_DELTAS = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "call": ("input_json_delta", "partial_json"),
}


def _event(kind: str, **fields: Any) -> bytes:
    return sse.named(kind, sse.compact({"type": kind, **fields}))


def _empty(block: Block) -> dict[str, Any]:
    match block.kind:
        case "text":
            return {"type": "text", "text": ""}
        case "thinking":
            return {"type": "thinking", "thinking": "", "signature": ""}
        case "call":
            return {"type": "tool_use", "id": block.id, "name": block.name, "input": {}}


def _content(block: Block) -> dict[str, Any] | None:
    """None for a call whose arguments are no JSON object: nobody could make it."""
    empty = _empty(block)
    if block.kind != "call":
        return {**empty, block.kind: block.text}
    arguments = block.arguments()
    return None if arguments is None else {**empty, "input": arguments}


def _usage(outcome: Outcome) -> dict[str, int]:
    """`input_tokens` are those that were read anew."""
    return {
        "input_tokens": outcome.prompt - outcome.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": outcome.cached,
        "output_tokens": outcome.completion,
    }
