"""What a client asks, parsed at the edge into frozen types. Unknown fields are ignored; those that would change the
answer and cannot be honoured are refused, so that no answer pretends to be what it is not."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from cloister.enclave.llm.engine import GenerateRequest, Prompt, Sampling
from cloister.enclave.llm.fields import MAX_TOKEN_ID, Fields, refuse
from cloister.enclave.llm.schemas import MAX_SCHEMA
from cloister.enclave.llm.structured import ANY, Plan, Shape, bind_text, parse_shape
from cloister.enclave.llm.toolcalls import AUTO, Tool, ToolChoice

__all__ = ["Ask", "GenerateAsk", "parse_chat", "parse_completion", "parse_generate"]

MAX_CHOICES = 8
MAX_MESSAGES = 4096
MAX_PROMPTS = 16
MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
MAX_LOGIT_BIASES = 1024
MAX_TOP_LOGPROBS = 20
MAX_TOKENS = 2**31 - 1
MAX_TOOLS = 128
COMPLETION_TOKENS = 16
"""What OpenAI's /v1/completions documents for an absent `max_tokens`."""

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
SEED_SPACE = 2**32
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")


@dataclass(frozen=True, slots=True)
class Ask:
    """One call of an OpenAI route: `n` answers to each prompt, in the order prompt by prompt."""

    model: str | None
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = AUTO
    shape: Shape = ANY

    def requests(self, scope: bytes | None, plan: Plan | None = None) -> list[GenerateRequest]:
        """The i-th answer to a prompt is sampled with seed + i; without a seed each differs by itself."""
        prompts, sampling = self.prompts, self.sampling
        if plan is not None:
            prompts = tuple(replace(prompt, tools=plan.tools) for prompt in prompts)
            sampling = replace(sampling, grammar=plan.grammar)
        return [
            GenerateRequest(prompt, _reseeded(sampling, choice), scope)
            for prompt in prompts
            for choice in range(self.n)
        ]


@dataclass(frozen=True, slots=True)
class GenerateAsk:
    """One call of the original's /generate: `template` False takes the text as it stands."""

    text: str
    sampling: Sampling
    template: bool = True


def _reseeded(sampling: Sampling, offset: int) -> Sampling:
    return sampling if sampling.seed is None else replace(sampling, seed=(sampling.seed + offset) % SEED_SPACE)


def parse_chat(fields: Fields) -> Ask:
    """`/v1/chat/completions`. `stream_options.include_obfuscation` is accepted and makes no difference: the sealed channel
    pads every event. Raises `Refused` (400)."""
    _refuse_unsupported_chat(fields)
    values = fields.array("messages")
    if len(values) > MAX_MESSAGES:
        refuse("messages", f"'messages' may hold {MAX_MESSAGES} messages at most.")
    messages = tuple(_message(value, index) for index, value in enumerate(values))
    if not messages:
        refuse("messages", "'messages' must hold at least one message.", "missing_required_parameter")
    max_tokens = fields.integer("max_tokens", 1, MAX_TOKENS)
    max_completion_tokens = fields.integer("max_completion_tokens", 1, MAX_TOKENS)
    sampling = _sampling(
        fields,
        max_tokens=max_tokens if max_completion_tokens is None else max_completion_tokens,
        logprobs=_chat_logprobs(fields),
    )
    tools, choice = _tools(fields)
    ask = _ask(fields, (Prompt(messages=messages),), sampling)
    return replace(ask, tools=tools, choice=choice, shape=parse_shape(fields))


def parse_completion(fields: Fields) -> Ask:
    """`/v1/completions`: a string, token ids, or an array of either. Raises `Refused` (400)."""
    if fields.flag("echo"):
        refuse("echo", "'echo' is not supported.", "unsupported_parameter")
    if fields.text("suffix"):
        refuse("suffix", "'suffix' is not supported.", "unsupported_parameter")
    best_of = fields.integer("best_of", 1, MAX_CHOICES)
    if best_of is not None and best_of != (fields.integer("n", 1, MAX_CHOICES) or 1):
        refuse("best_of", "'best_of' other than 'n' is not supported.", "unsupported_parameter")
    max_tokens = fields.integer("max_tokens", 1, MAX_TOKENS)
    sampling = _sampling(
        fields,
        max_tokens=COMPLETION_TOKENS if max_tokens is None else max_tokens,
        logprobs=fields.integer("logprobs", 0, MAX_TOP_LOGPROBS),
    )
    ask = _ask(fields, _prompts(fields), replace(sampling, grammar=bind_text(parse_shape(fields))))
    if len(ask.prompts) * ask.n > MAX_PROMPTS:
        refuse("prompt", f"'prompt' times 'n' may ask for {MAX_PROMPTS} answers at most.")
    return ask


def parse_generate(fields: Fields, default_tokens: int) -> GenerateAsk:
    """`POST /generate`. Raises `Refused` (400)."""
    query = fields.text("query")
    if not query:
        refuse("query", "'query' is missing or empty.", "missing_required_parameter")
    max_tokens = fields.integer("max_tokens", 1, MAX_TOKENS) or default_tokens
    sampling = _sampling(fields, max_tokens=max_tokens, logprobs=None)
    return GenerateAsk(query, sampling, fields.flag("template", default=True))


def _ask(fields: Fields, prompts: tuple[Prompt, ...], sampling: Sampling) -> Ask:
    options = fields.object("stream_options")
    options.flag("include_obfuscation")
    return Ask(
        model=fields.text("model"),
        prompts=prompts,
        sampling=sampling,
        n=fields.integer("n", 1, MAX_CHOICES) or 1,
        stream=fields.flag("stream"),
        include_usage=options.flag("include_usage"),
    )


def _sampling(fields: Fields, *, max_tokens: int | None, logprobs: int | None) -> Sampling:
    top_k = fields.integer("top_k", -1, MAX_TOKENS)
    seed = fields.integer("seed", -(2**63), 2**64 - 1)
    return Sampling(
        max_tokens=max_tokens,
        temperature=fields.number("temperature", 1.0, 0, 2),
        top_p=fields.number("top_p", 1.0, 0, 1),
        top_k=max(0, top_k or 0),
        min_p=fields.number("min_p", 0.0, 0, 1),
        seed=None if seed is None else seed % SEED_SPACE,
        stop=_stop(fields),
        frequency_penalty=fields.number("frequency_penalty", 0.0, -2, 2),
        presence_penalty=fields.number("presence_penalty", 0.0, -2, 2),
        repeat_penalty=fields.number("repeat_penalty", 1.0, 0.01, 10),
        logit_bias=_logit_bias(fields),
        logprobs=logprobs,
    )


def _stop(fields: Fields) -> tuple[str, ...]:
    value = fields.get("stop")
    stops = (value,) if isinstance(value, str) else fields.array("stop")
    if len(stops) > MAX_STOPS:
        refuse("stop", f"'stop' may hold {MAX_STOPS} strings at most.")
    if any(not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        refuse("stop", f"'stop' must hold strings of 1 to {MAX_STOP_LENGTH} characters.")
    return tuple(stops)


def _logit_bias(fields: Fields) -> Mapping[int, float]:
    biases = fields.object("logit_bias")
    if len(biases.values) > MAX_LOGIT_BIASES:
        refuse("logit_bias", f"'logit_bias' may name {MAX_LOGIT_BIASES} tokens at most.")
    found: dict[int, float] = {}
    for token, bias in biases.values.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 10 and int(token) <= MAX_TOKEN_ID):
            refuse("logit_bias", "The names in 'logit_bias' must be token ids.")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            refuse("logit_bias", "The values in 'logit_bias' must be numbers from -100 to 100.")
        found[int(token)] = float(bias)
    return found


def _chat_logprobs(fields: Fields) -> int | None:
    top = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if fields.flag("logprobs"):
        return top or 0
    if top:
        refuse("top_logprobs", "'top_logprobs' needs 'logprobs': true.")
    return None


def _refuse_unsupported_chat(fields: Fields) -> None:
    if fields.array("functions") and fields.get("function_call") != "none":
        refuse("functions", "'functions' is not supported: 'tools' took its place.", "unsupported_parameter")
    if any(modality != "text" for modality in fields.array("modalities")):
        refuse("modalities", "Only text is supported.", "unsupported_parameter")


def _tools(fields: Fields) -> tuple[tuple[Tool, ...], ToolChoice]:
    """The tools on offer, and how they may be called; none of them where `tool_choice` is "none". A function that is
    named is called exactly once, as OpenAI has it."""
    values = fields.array("tools")
    parallel = fields.flag("parallel_tool_calls", default=True)
    if fields.get("tool_choice") == "none":
        return (), AUTO
    if len(values) > MAX_TOOLS:
        refuse("tools", f"'tools' may hold {MAX_TOOLS} tools at most.")
    tools = tuple(_tool(value, f"tools[{index}]") for index, value in enumerate(values))
    names = {tool.name for tool in tools}
    if len(names) < len(tools):
        refuse("tools", "'tools' holds two tools of one name.")
    choice = _tool_choice(fields, names)
    return tools, replace(choice, parallel=parallel and choice.mode != "named") if tools else choice


def _tool(value: Any, where: str) -> Tool:
    if not isinstance(value, dict):
        refuse(where, f"'{where}' must be an object.", "invalid_type")
    fields = Fields(value, f"{where}.")
    if fields.text("type") != "function":
        refuse(f"{where}.type", f"'{where}.type' must be function: others are not supported.", "unsupported_parameter")
    function = fields.object("function")
    name = function.text("name")
    if name is None or not _TOOL_NAME.fullmatch(name):
        refuse(function.name("name"), f"'{function.name('name')}' must be 1 to 128 letters, digits or any of _.:/-.")
    parameters = function.object("parameters").values
    if len(json.dumps(parameters)) > MAX_SCHEMA:
        refuse(function.name("parameters"), f"'{function.name('parameters')}' is longer than {MAX_SCHEMA} characters.")
    return Tool(name, function.text("description") or "", parameters)


def _tool_choice(fields: Fields, names: set[str]) -> ToolChoice:
    value = fields.get("tool_choice")
    if value is None or value == "auto":
        return AUTO
    if value == "required":
        if not names:
            refuse("tool_choice", "'tool_choice' needs 'tools'.")
        return ToolChoice("required")
    if not isinstance(value, dict):
        refuse("tool_choice", "'tool_choice' must be none, auto, required, or name a function.")
    chosen = fields.object("tool_choice")
    name = chosen.object("function").text("name")
    if chosen.text("type") != "function" or name not in names:
        refuse("tool_choice", "'tool_choice' must name a function that 'tools' holds.")
    return ToolChoice("named", name)


def _prompts(fields: Fields) -> tuple[Prompt, ...]:
    value = fields.get("prompt")
    if isinstance(value, str):
        return (Prompt(text=value),)
    values = fields.array("prompt")
    if not values:
        refuse("prompt", "'prompt' is missing or empty.", "missing_required_parameter")
    if isinstance(values[0], int):
        return (Prompt(tokens=fields.tokens("prompt", values)),)
    if len(values) > MAX_PROMPTS:
        refuse("prompt", f"'prompt' may hold {MAX_PROMPTS} prompts at most.")
    return tuple(_prompt(fields, value) for value in values)


def _prompt(fields: Fields, value: Any) -> Prompt:
    if isinstance(value, str):
        return Prompt(text=value)
    if not isinstance(value, list) or not value:
        refuse("prompt", "'prompt' must be a string, token ids, or an array of either.", "invalid_type")
    return Prompt(tokens=fields.tokens("prompt", value))


def _message(value: Any, index: int) -> Mapping[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(value, dict):
        refuse(where, f"'{where}' must be an object.", "invalid_type")
    fields = Fields(value, f"{where}.")
    role = ROLES.get(fields.text("role") or "")
    if role is None:
        refuse(f"{where}.role", f"'{where}.role' must be one of {', '.join(ROLES)}.")
    message = {**value, "role": role, "content": _content(fields, role)}
    if calls := fields.array("tool_calls"):
        message["tool_calls"] = [_past_call(call, f"{where}.tool_calls[{at}]") for at, call in enumerate(calls)]
    return message


def _past_call(value: Any, where: str) -> Mapping[str, Any]:
    """A call that an assistant made. Its arguments stay as they are: a model may have written them wrong."""
    if not isinstance(value, dict):
        refuse(where, f"'{where}' must be an object.", "invalid_type")
    fields = Fields(value, f"{where}.")
    function = fields.object("function")
    name, arguments = function.text("name"), function.get("arguments")
    if not name:
        refuse(function.name("name"), f"'{function.name('name')}' is missing.", "missing_required_parameter")
    if arguments is not None and not isinstance(arguments, str | dict):
        refuse(function.name("arguments"), f"'{function.name('arguments')}' must be a string.", "invalid_type")
    called = {"name": name, "arguments": "{}" if arguments in (None, "") else arguments}
    return {"id": fields.text("id") or "", "type": "function", "function": called}


def _content(fields: Fields, role: str) -> str:
    content = fields.get("content")
    if isinstance(content, str):
        return content
    name = fields.name("content")
    if content is None:
        if role == "assistant":  # an assistant that only called tools, or refused, said nothing
            return ""
        refuse(name, f"'{name}' is missing.", "missing_required_parameter")
    parts = fields.array("content")
    return "\n".join(_part(part, f"{name}[{index}]") for index, part in enumerate(parts))


def _part(value: Any, where: str) -> str:
    if not isinstance(value, dict):
        refuse(where, f"'{where}' must be an object.", "invalid_type")
    fields = Fields(value, f"{where}.")
    kind = fields.text("type")
    if kind is None or kind not in ("text", "refusal"):
        _refuse_part(fields, kind, where)
    text = fields.text(kind)
    if text is None:
        refuse(f"{where}.{kind}", f"'{where}.{kind}' is missing.", "missing_required_parameter")
    return text


def _refuse_part(fields: Fields, kind: str | None, where: str) -> NoReturn:
    if kind == "image_url":
        image = fields.get("image_url")
        url = image.get("url") if isinstance(image, dict) else image
        if not (isinstance(url, str) and url.startswith("data:")):
            # Fetching it would tell a stranger's server that, and when, this was asked.
            refuse(where, "An enclave fetches no remote address for a prompt.", "remote_url_refused")
    refuse(where, "This model reads text only.", "unsupported_content")
