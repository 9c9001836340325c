"""OpenAI's /v1/responses, without its memory: nothing is stored, so that each request brings all that it refers to."""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cloister.enclave.llm import sse
from cloister.enclave.llm.blocks import Block, Blocks, Closed, Opened, Outcome, Piece, tell
from cloister.enclave.llm.engine import Prompt, Sampling
from cloister.enclave.llm.envelope import Problem, Refused
from cloister.enclave.llm.fields import Fields, refuse
from cloister.enclave.llm.functions import element, join_texts, missing, read_tools, refuse_media, required_text
from cloister.enclave.llm.requests import MAX_TOKENS, ROLES, Ask
from cloister.enclave.llm.schemas import JSON_OBJECT
from cloister.enclave.llm.service import Call
from cloister.enclave.llm.structured import ANY, Shape, plan_answer
from cloister.enclave.llm.toolcalls import AUTO, Tool, ToolChoice

__all__ = ["ResponseForm", "Told", "parse_response", "responses"]

STORED = {
    "previous_response_id": "Nothing is stored: send the earlier items in 'input' again.",
    "conversation": "Nothing is stored: send the earlier items in 'input' again.",
    "prompt": "No prompts are stored: send the text itself.",
}
MAX_INPUT = 4096
"""Items of one request."""


@dataclass(frozen=True, slots=True)
class Told:
    """What an answer repeats of its request."""

    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    parallel: bool = True
    tool_choice: Any = "auto"
    tools: Sequence[Mapping[str, Any]] = ()
    text: Mapping[str, Any] = field(default_factory=lambda: {"type": "text"})

    def fields(self) -> dict[str, Any]:
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "parallel_tool_calls": self.parallel,
            "tool_choice": self.tool_choice,
            "tools": list(self.tools),
            "text": {"format": self.text},
            "previous_response_id": None,
            "store": False,
            "background": False,
            "truncation": "disabled",
            "metadata": {},
        }


async def responses(call: Call) -> None:
    """One answer, whole or streamed."""
    call.prompt_field = "input"
    ask, told = parse_response(await call.fields())
    info = call.service.serving(ask.model)
    if not info.model.has_chat_template:
        message = "The model has no chat template; /v1/completions takes plain text."
        raise Refused(400, "no_chat_template", message, param="input")
    plan = plan_answer(info.model, ask.tools, ask.choice, ask.shape)
    form = ResponseForm(f"resp_{secrets.token_hex(12)}", int(time.time()), info.model.name, told)
    call.reply.failure = form.failure
    request = ask.requests(call.scope(), plan)[0]
    await tell(call, request, form, Blocks(plan.reading), stream=ask.stream)


def parse_response(fields: Fields) -> tuple[Ask, Told]:
    """Raises `Refused` (400)."""
    _refuse_unsupported(fields)
    instructions = fields.text("instructions")
    messages = _messages(fields)
    if instructions:
        messages = [{"role": "system", "content": instructions}, *messages]
    tools = read_tools(fields, ("function",), "parameters")
    choice = _choice(fields, tools)
    shape = _shape(fields.object("text").object("format"))
    sampling = Sampling(
        max_tokens=fields.integer("max_output_tokens", 1, MAX_TOKENS),
        temperature=fields.number("temperature", 1.0, 0, 2),
        top_p=fields.number("top_p", 1.0, 0, 1),
    )
    ask = Ask(
        model=fields.text("model"),
        prompts=(Prompt(messages=tuple(messages)),),
        sampling=sampling,
        stream=fields.flag("stream"),
        tools=tools,
        choice=choice,
        shape=shape,
    )
    told = Told(
        instructions=instructions,
        max_output_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        parallel=fields.flag("parallel_tool_calls", default=True),
        tool_choice={"type": "function", "name": choice.name} if choice.mode == "named" else choice.mode,
        tools=[_told_tool(tool) for tool in tools],
        text=fields.object("text").object("format").values or {"type": "text"},
    )
    return ask, told


def _refuse_unsupported(fields: Fields) -> None:
    for name, message in STORED.items():
        if fields.has(name):
            refuse(name, f"'{name}' is not supported. {message}", "unsupported_parameter")
    if fields.flag("background"):
        refuse("background", "'background' is not supported: nothing is stored.", "unsupported_parameter")
    if fields.integer("top_logprobs", 0, 20) or "message.output_text.logprobs" in fields.array("include"):
        message = "Log-probabilities are told by /v1/chat/completions only."
        refuse("top_logprobs", message, "unsupported_parameter")


def _told_tool(tool: Tool) -> dict[str, Any]:
    head = {"type": "function", "name": tool.name, "description": tool.description or None}
    return {**head, "parameters": dict(tool.parameters), "strict": False}


def _choice(fields: Fields, tools: Sequence[Tool]) -> ToolChoice:
    value = fields.get("tool_choice")
    parallel = fields.flag("parallel_tool_calls", default=True)
    if value in (None, "auto"):
        return ToolChoice(AUTO.mode, parallel=parallel)
    if value == "none":
        return ToolChoice("none", parallel=parallel)
    if value == "required":
        if not tools:
            refuse("tool_choice", "'tool_choice' needs 'tools'.")
        return ToolChoice("required", parallel=parallel)
    if not isinstance(value, dict):
        refuse("tool_choice", "'tool_choice' must be none, auto, required, or name a function.")
    chosen = fields.object("tool_choice")
    name = chosen.text("name")
    if chosen.text("type") != "function" or name is None or name not in {tool.name for tool in tools}:
        refuse("tool_choice", "'tool_choice' must name a function that 'tools' holds.")
    return ToolChoice("named", name, parallel=False)


def _shape(wanted: Fields) -> Shape:
    kind = wanted.text("type")
    if kind in (None, "text"):
        return ANY
    if kind == "json_object":
        return Shape("text.format", JSON_OBJECT)
    if kind != "json_schema":
        message = "'text.format.type' must be text, json_object or json_schema."
        refuse("text.format.type", message, "unsupported_parameter")
    if not wanted.has("schema"):
        missing("text.format.schema")
    return Shape("text.format", wanted.object("schema").values)


def _messages(fields: Fields) -> list[Mapping[str, Any]]:
    """The `input` as templates know messages; calls and the text around them are one message of the assistant's."""
    value = fields.get("input")
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    items = fields.array("input")
    if not items:
        refuse("input", "'input' is missing or empty.", "missing_required_parameter")
    if len(items) > MAX_INPUT:
        refuse("input", f"'input' may hold {MAX_INPUT} items at most.")
    messages: list[Mapping[str, Any]] = []
    for index, item in enumerate(items):
        message = _item(element(item, f"input[{index}]"))
        last = messages[-1] if messages else {}
        if message is None:
            continue
        if "tool_calls" in message and last.get("role") == "assistant":
            messages[-1] = {**last, "tool_calls": [*last.get("tool_calls", ()), *message["tool_calls"]]}
        else:
            messages.append(message)
    if not messages:
        refuse("input", "'input' must hold at least one message.", "missing_required_parameter")
    return messages


def _item(fields: Fields) -> Mapping[str, Any] | None:
    """None for past thoughts: no template wants them back."""
    match fields.text("type"):
        case None | "message":
            return _message(fields)
        case "reasoning":
            return None
        case "function_call":
            arguments = fields.text("arguments") or "{}"
            function = {"name": required_text(fields, "name"), "arguments": arguments}
            called = {"id": required_text(fields, "call_id"), "type": "function", "function": function}
            return {"role": "assistant", "content": "", "tool_calls": [called]}
        case "function_call_output":
            call_id = required_text(fields, "call_id")
            return {"role": "tool", "tool_call_id": call_id, "content": join_texts(fields, "output", _text)}
        case "item_reference":
            refuse(fields.name("type"), "Nothing is stored: send the item itself.", "unsupported_parameter")
    message = f"'{fields.name('type')}' must be message, function_call, function_call_output or reasoning."
    return refuse(fields.name("type"), message, "unsupported_parameter")


def _message(fields: Fields) -> Mapping[str, Any]:
    role = ROLES.get(fields.text("role") or "")
    if role in (None, "tool"):
        name = fields.name("role")
        refuse(name, f"'{name}' must be one of {', '.join(role for role in ROLES if role != 'tool')}.")
    if fields.get("content") is None:
        missing(fields.name("content"))
    return {"role": role, "content": join_texts(fields, "content", _text)}


def _text(fields: Fields) -> str:
    kind = fields.text("type")
    if kind not in ("input_text", "output_text", "text", "refusal"):
        remote = any(
            not url.startswith("data:") for name in ("image_url", "file_url") if (url := fields.text(name)) is not None
        )
        refuse_media(fields, remote=remote)
    text = fields.text("refusal" if kind == "refusal" else "text")
    return missing(fields.name("text")) if text is None else text


class ResponseForm:
    """`/v1/responses`. Its events are numbered from 0."""

    def __init__(self, response_id: str, created: int, model: str, told: Told) -> None:
        self._head = {"id": response_id, "object": "response", "created_at": created, "model": model}
        self._told = told
        self._number = 0
        self._ids: dict[int, str] = {}

    def begin(self, _outcome: Outcome) -> bytes:
        response = self._response("in_progress", [], None)
        created = self._event("response.created", response=response)
        return created + self._event("response.in_progress", response=response)

    def change(self, change: Opened | Piece | Closed) -> bytes:
        block = change.block
        match change:
            case Opened():
                return self._opened(block)
            case Piece():
                return self._block_event(block, f"{_NAMES[block.kind]}.delta", delta=change.text, **_logprobs(block))
            case Closed():
                return self._closed(block)

    def _opened(self, block: Block) -> bytes:
        item = {**self._item(block, "in_progress"), **_EMPTIED[block.kind]}
        added = self._event("response.output_item.added", output_index=block.index, item=item)
        if block.kind == "call":
            return added
        return added + self._block_event(block, "response.content_part.added", part=_part(block, ""))

    def _closed(self, block: Block) -> bytes:
        key = "arguments" if block.kind == "call" else "text"
        done = self._block_event(block, f"{_NAMES[block.kind]}.done", **{key: block.text}, **_logprobs(block))
        if block.kind != "call":
            done += self._block_event(block, "response.content_part.done", part=_part(block, block.text))
        return done + self._event("response.output_item.done", output_index=block.index, item=self._item(block))

    def end(self, blocks: Sequence[Block], outcome: Outcome) -> bytes:
        response = self._finished(blocks, outcome)
        return self._event(f"response.{response['status']}", response=response)

    def whole(self, blocks: Sequence[Block], outcome: Outcome) -> bytes:
        return sse.compact(self._finished(blocks, outcome)).encode("ascii")

    def failure(self, found: Problem) -> bytes:
        """The event of an error within the stream."""
        return self._event("error", code=found.code, message=found.message, param=found.param)

    def _finished(self, blocks: Sequence[Block], outcome: Outcome) -> dict[str, Any]:
        status = "completed" if outcome.reason == "stop" else "incomplete"
        return self._response(status, [self._item(block) for block in blocks], outcome)

    def _response(self, status: str, output: Sequence[Mapping[str, Any]], outcome: Outcome | None) -> dict[str, Any]:
        return {
            **self._head,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": output,
            "usage": None if outcome is None else _usage(outcome),
            **self._told.fields(),
        }

    def _item(self, block: Block, status: str = "") -> dict[str, Any]:
        item_id = self._ids.setdefault(block.index, f"{_PREFIXES[block.kind]}_{secrets.token_hex(12)}")
        head = {"id": item_id, "status": status or ("completed" if block.whole else "incomplete")}
        match block.kind:
            case "text":
                return {**head, "type": "message", "role": "assistant", "content": [_part(block, block.text)]}
            case "thinking":
                return {**head, "type": "reasoning", "summary": [], "content": [_part(block, block.text)]}
            case "call":
                called = {"call_id": block.id, "name": block.name, "arguments": block.text}
                return {**head, "type": "function_call", **called}

    def _block_event(self, block: Block, kind: str, **fields: Any) -> bytes:
        where: dict[str, Any] = {"item_id": self._ids[block.index], "output_index": block.index}
        if block.kind != "call":
            where["content_index"] = 0
        return self._event(kind, **where, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return sse.named(kind, sse.compact({"type": kind, "sequence_number": number, **fields}))


_NAMES = {
    "text": "response.output_text",
    "thinking": "response.reasoning_text",
    "call": "response.function_call_arguments",
}
_PREFIXES = {"text": "msg", "thinking": "rs", "call": "fc"}
_EMPTIED: Mapping[str, Mapping[str, Any]] = {"text": {"content": []}, "thinking": {"content": []}, "call": {}}


def _part(block: Block, text: str) -> dict[str, Any]:
    if block.kind == "thinking":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _logprobs(block: Block) -> dict[str, Any]:
    return {"logprobs": []} if block.kind == "text" else {}


def _usage(outcome: Outcome) -> dict[str, Any]:
    return {
        "input_tokens": outcome.prompt,
        "input_tokens_details": {"cached_tokens": outcome.cached, "cache_write_tokens": 0},
        "output_tokens": outcome.completion,
        "output_tokens_details": {"reasoning_tokens": outcome.reasoning},
        "total_tokens": outcome.prompt + outcome.completion,
    }
