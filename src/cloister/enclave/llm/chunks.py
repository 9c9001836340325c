"""The JSON of OpenAI's answers, whole and in chunks. What does not change within a request is put together once."""

import codecs
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cloister.enclave.llm import sse
from cloister.enclave.llm.engine import Delta, Done, TokenLogprob
from cloister.enclave.llm.toolcalls import (
    PLAIN,
    AnswerReader,
    CallArguments,
    CallStarted,
    Part,
    Reading,
    Reasoning,
    Text,
)

__all__ = ["Answer", "ChatForm", "Form", "Header", "TextForm", "Usage"]

UNLIKELY = -9999.0
"""OpenAI's number for a token that is very unlikely; JSON has no minus infinity."""


@dataclass(frozen=True, slots=True)
class Header:
    """What all chunks of one answer say. `id` is fresh and says nothing of the request."""

    id: str
    created: int
    model: str
    fingerprint: str

    def fields(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


@dataclass(slots=True)
class Usage:
    """Tokens of one request. A prompt that is answered `n` times counts once, as the first answer found it."""

    n: int
    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def add(self, index: int, done: Done) -> None:
        self.completion += done.completion_tokens
        if index % self.n == 0:
            self.prompt += done.prompt_tokens
            self.cached += done.cached_tokens

    def fields(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(slots=True)
class Answer:
    """One answer, collected."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str = ""


class Form(Protocol):
    """How one route of OpenAI's writes its answers."""

    def begin(self, index: int) -> bytes:
        """What stands before the first delta of an answer."""

    def delta(self, index: int, delta: Delta) -> bytes:
        """One event; empty when there is nothing to say yet."""

    def finish(self, index: int, reason: str) -> bytes: ...

    def usage(self, usage: Usage) -> bytes:
        """The extra event for `stream_options.include_usage`."""

    def whole(self, answers: Sequence[Answer], usage: Usage) -> bytes: ...


def _event_around(header: Header, kind: str, *, include_usage: bool) -> tuple[str, str]:
    """What stands before and after the one choice of an event."""
    opening = sse.compact(header.fields(kind))[:-1]
    return f'data: {opening},"choices":[{{', '}],"usage":null}\n\n' if include_usage else "}]}\n\n"


class ChatForm:
    """`/v1/chat/completions`. `reading`: how thoughts and calls are told from the answer's text."""

    def __init__(self, header: Header, *, include_usage: bool, logprobs: bool, reading: Reading = PLAIN) -> None:
        self._header = header
        self._logprobs = logprobs
        self._reading = reading
        self._readers: dict[int, AnswerReader] = {}
        self._waiting: dict[int, list[TokenLogprob]] = {}
        """Of tokens whose text was held back; they go out with the next event."""
        self._before, self._after = _event_around(header, "chat.completion.chunk", include_usage=include_usage)

    def _event(self, index: int, delta: str, logprobs: str = "null", reason: str = "null") -> bytes:
        choice = f'"index":{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{reason}'
        return f"{self._before}{choice}{self._after}".encode("ascii")

    def begin(self, index: int) -> bytes:
        if not self._reading.plain:
            self._readers[index], self._waiting[index] = AnswerReader(self._reading), []
        return self._event(index, '{"role":"assistant","content":"","refusal":null}')

    def delta(self, index: int, delta: Delta) -> bytes:
        if not delta.text and not delta.logprobs:
            return b""
        if (reader := self._readers.get(index)) is not None:
            self._waiting[index] += delta.logprobs
            return self._parts(index, reader.feed(delta.text))
        logprobs = sse.compact(_chat_logprobs(delta.logprobs)) if self._logprobs else "null"
        return self._event(index, f'{{"content":{sse.quote(delta.text)}}}', logprobs)

    def _parts(self, index: int, parts: Sequence[Part]) -> bytes:
        return b"".join(self._event(index, _part_delta(part), self._waiting_logprobs(index)) for part in parts)

    def _waiting_logprobs(self, index: int) -> str:
        waiting = self._waiting.get(index, [])
        if not (self._logprobs and waiting):
            return "null"
        self._waiting[index] = []
        return sse.compact(_chat_logprobs(waiting))

    def finish(self, index: int, reason: str) -> bytes:
        reader = self._readers.pop(index, None)
        rest = self._parts(index, reader.finish()) if reader is not None else b""
        found = _reason(reason, called=reader is not None and reader.called)
        return rest + self._event(index, "{}", self._waiting_logprobs(index), sse.quote(found))

    def usage(self, usage: Usage) -> bytes:
        return sse.data({**self._header.fields("chat.completion.chunk"), "choices": [], "usage": usage.fields()})

    def whole(self, answers: Sequence[Answer], usage: Usage) -> bytes:
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        head = self._header.fields("chat.completion")
        return sse.compact({**head, "choices": choices, "usage": usage.fields()}).encode("ascii")

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        message, called = _message("".join(answer.texts), self._reading)
        return {
            "index": index,
            "message": message,
            "logprobs": _chat_logprobs(answer.logprobs) if self._logprobs else None,
            "finish_reason": _reason(answer.finish_reason, called=called),
        }


def _reason(reason: str, *, called: bool) -> str:
    """A call that was cut off for its length is no call to make."""
    return "tool_calls" if called and reason == "stop" else reason


def _part_delta(part: Part) -> str:
    match part:
        case Text():
            return f'{{"content":{sse.quote(part.text)}}}'
        case Reasoning():
            return f'{{"reasoning_content":{sse.quote(part.text)}}}'
        case CallStarted():
            call = {"index": part.index, **_call(part, "")}
        case CallArguments():
            call = {"index": part.index, "function": {"arguments": part.text}}
    return sse.compact({"tool_calls": [call]})


def _call(started: CallStarted, arguments: str) -> dict[str, Any]:
    return {"id": started.id, "type": "function", "function": {"name": started.name, "arguments": arguments}}


def _message(text: str, reading: Reading) -> tuple[dict[str, Any], bool]:
    """The answer's message, and whether it calls tools; it has no content when it does nothing else."""
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if reading.plain:
        return message, False
    reader = AnswerReader(reading)
    parts = [*reader.feed(text), *reader.finish()]
    message["content"] = "".join(part.text for part in parts if isinstance(part, Text))
    if thought := "".join(part.text for part in parts if isinstance(part, Reasoning)):
        message["reasoning_content"] = thought
    if reader.called:
        arguments = {part.index: "" for part in parts if isinstance(part, CallStarted)}
        for part in parts:
            if isinstance(part, CallArguments):
                arguments[part.index] += part.text
        started = [part for part in parts if isinstance(part, CallStarted)]
        message["content"] = message["content"] or None
        message["tool_calls"] = [_call(part, arguments[part.index]) for part in started]
    return message, reader.called


class TextForm:
    """`/v1/completions`."""

    def __init__(self, header: Header, *, include_usage: bool, logprobs: bool) -> None:
        self._header = header
        self._logprobs = logprobs
        self._before, self._after = _event_around(header, "text_completion", include_usage=include_usage)
        self._offsets: dict[int, _Offsets] = {}

    def _event(self, index: int, text: str, logprobs: str = "null", reason: str = "null") -> bytes:
        choice = f'"text":{sse.quote(text)},"index":{index},"logprobs":{logprobs},"finish_reason":{reason}'
        return f"{self._before}{choice}{self._after}".encode("ascii")

    def begin(self, index: int) -> bytes:
        self._offsets[index] = _Offsets()
        return b""

    def delta(self, index: int, delta: Delta) -> bytes:
        if not delta.text and not delta.logprobs:
            return b""
        logprobs = "null"
        if self._logprobs:
            logprobs = sse.compact(_text_logprobs(delta.logprobs, self._offsets[index]))
        return self._event(index, delta.text, logprobs)

    def finish(self, index: int, reason: str) -> bytes:
        return self._event(index, "", reason=sse.quote(reason))

    def usage(self, usage: Usage) -> bytes:
        return sse.data({**self._header.fields("text_completion"), "choices": [], "usage": usage.fields()})

    def whole(self, answers: Sequence[Answer], usage: Usage) -> bytes:
        choices = [
            {
                "text": "".join(answer.texts),
                "index": index,
                "logprobs": _text_logprobs(answer.logprobs, _Offsets()) if self._logprobs else None,
                "finish_reason": answer.finish_reason,
            }
            for index, answer in enumerate(answers)
        ]
        head = self._header.fields("text_completion")
        return sse.compact({**head, "choices": choices, "usage": usage.fields()}).encode("ascii")


def _token_text(raw: bytes) -> str:
    """A token that is only part of a character has no text: its bytes are spelled out, as OpenAI does."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else UNLIKELY


def _chat_logprobs(tokens: Sequence[TokenLogprob]) -> Mapping[str, Any]:
    content = [{**_chat_token(token), "top_logprobs": list(map(_chat_token, token.top))} for token in tokens]
    return {"content": content, "refusal": None}


def _chat_token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": _token_text(token.raw), "bytes": list(token.raw), "logprob": _finite(token.logprob)}


class _Offsets:
    """Where each token begins, in characters of the answer, also where a character takes several tokens."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def next(self, raw: bytes) -> int:
        offset = self._length
        self._length += len(self._decoder.decode(raw))
        return offset


def _text_logprobs(tokens: Sequence[TokenLogprob], offsets: _Offsets) -> Mapping[str, Any]:
    return {
        "tokens": [_token_text(token.raw) for token in tokens],
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [{_token_text(top.raw): _finite(top.logprob) for top in token.top} for token in tokens],
        "text_offset": [offsets.next(token.raw) for token in tokens],
    }
