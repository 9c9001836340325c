"""What comes back from `/v1/completions`, read strictly: a pure reader of server-sent events that gives the seam's events.

An answer is whole only when its reason to end, its counts of tokens and `[DONE]` have all come, in this order.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from cloister.enclave.llm.engine import Delta, Done, TokenLogprob
from cloister.enclave.llm.grammar import Grammar
from cloister.enclave.llm.upstream.exchange import broken, nonsense
from cloister.errors import EngineDied

__all__ = ["CompletionReader"]

_MAX_EVENT = 32 << 20
"""Bytes of one event: the first may name all tokens of the prompt again."""
_MOST_LOGPROBS = 20
_MOST_TOKENS = 1 << 31
UNKNOWN_TOKEN = -1
"""Of a token that an upstream names by its text alone."""
_SPELLED = re.compile(r"bytes:((?:\\x[0-9a-f]{2})+)")


class CompletionReader:
    """Feed it the body as it comes, then `finish` once.

    `prompt`: tokens that were sent. `grammar`: what the answer must keep to; one that does not is an upstream that knows
    no grammars, and no answer. `whole`: the grammar is to be at an end where the answer is.
    """

    def __init__(self, prompt: int, *, grammar: Grammar | None = None, whole: bool = True) -> None:
        self._prompt = prompt
        self._held = bytearray()
        self._reason: Literal["stop", "length"] | None = None
        self._usage: tuple[int, int] | None = None
        self._counted = 0
        self._grammar = grammar
        self._state = None if grammar is None else grammar.start
        self._whole = whole
        self.finished = False
        """No more of the body is needed."""

    def feed(self, data: bytes) -> Iterator[Delta]:
        """Raises: EngineDied when the upstream fails, or says what no such server would."""
        self._held += data
        while not self.finished and (at := self._held.find(b"\n")) >= 0:
            line = bytes(self._held[:at]).rstrip(b"\r")
            del self._held[: at + 1]
            if at > _MAX_EVENT:
                raise nonsense()
            yield from self._line(line)
        if len(self._held) > _MAX_EVENT:
            raise nonsense()

    def finish(self) -> Iterator[Delta | Done]:
        """When the body is at its end. Raises: EngineDied when the answer is not."""
        if not self.finished or self._reason is None or self._usage is None:
            raise broken()
        completion, cached = self._usage
        if self._state is not None and self._whole and self._reason == "stop" and not self._state.may_end:
            raise _loose()
        if completion > self._counted:
            yield Delta("", completion - self._counted)
        yield Done(self._reason, self._prompt, max(completion, self._counted), min(cached, self._prompt))

    def _line(self, line: bytes) -> Iterator[Delta]:
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"error":
            raise _failed()
        if field != b"data":  # a comment, an event's name, an empty line
            return
        if value == b"[DONE]":
            self.finished = True
            return
        yield from self._event(_parse(value))

    def _event(self, event: Mapping[str, Any]) -> Iterator[Delta]:
        if event.get("error") is not None:
            raise _failed()
        choices = event.get("choices")
        if not isinstance(choices, list) or len(choices) > 1:
            raise nonsense()
        usage = event.get("usage")
        for choice in choices:
            yield from self._choice(choice)
        if usage is not None:
            self._usage = _counts(usage)

    def _choice(self, choice: Any) -> Iterator[Delta]:
        if not isinstance(choice, dict) or choice.get("index", 0) != 0:
            raise nonsense()
        text, reason = choice.get("text"), choice.get("finish_reason")
        if not isinstance(text, str) or (text and self._reason is not None):
            raise nonsense()
        if reason not in (None, "stop", "length"):  # "abort", "error": it gave up
            raise _failed()
        self._follow(text)
        logprobs = _logprobs(choice.get("logprobs"))
        tokens = _number_of_tokens(choice.get("token_ids"), text, logprobs)
        if text or tokens or logprobs:
            self._counted += tokens
            yield Delta(text, tokens, logprobs)
        self._reason = self._reason or reason

    def _follow(self, text: str) -> None:
        try:
            piece = text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair
            raise nonsense() from error
        if self._grammar is None or self._state is None:
            return
        state = self._grammar.after(self._state, piece)
        if state is None:
            raise _loose()
        self._state = state


def _parse(value: bytes) -> Mapping[str, Any]:
    try:
        event = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise nonsense() from error
    if not isinstance(event, dict):
        raise nonsense()
    return event


def _whole_number(value: object) -> int:
    if type(value) is not int or not 0 <= value <= _MOST_TOKENS:
        raise nonsense()
    return value


def _counts(usage: Any) -> tuple[int, int]:
    """Tokens of the answer, and those of the prompt that a cache gave."""
    if not isinstance(usage, dict):
        raise nonsense()
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return _whole_number(usage.get("completion_tokens")), 0 if cached is None else _whole_number(cached)


def _number_of_tokens(ids: Any, text: str, logprobs: Sequence[TokenLogprob]) -> int:
    """What the upstream says; else as many as have a log-probability; else one where there is text."""
    if ids is not None:
        if not isinstance(ids, list):
            raise nonsense()
        return len(ids)
    return len(logprobs) or bool(text)


def _logprobs(value: Any) -> tuple[TokenLogprob, ...]:
    """In the form of /v1/completions, or of chats, which llama-server gives here too."""
    if value is None:
        return ()
    try:
        if "content" in value:
            return tuple(_chat_logprob(entry, entry.get("top_logprobs") or ()) for entry in value["content"])
        tops = value.get("top_logprobs") or [None] * len(value["tokens"])
        entries = zip(value["tokens"], value["token_logprobs"], tops, strict=True)
        return tuple(_text_logprob(token, logprob, top or {}) for token, logprob, top in entries)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise nonsense() from error


def _chat_logprob(entry: Mapping[str, Any], tops: Sequence[Mapping[str, Any]]) -> TokenLogprob:
    token = entry.get("id", UNKNOWN_TOKEN)
    raw = entry.get("bytes")
    found = bytes(raw) if raw is not None else _raw(entry["token"])
    others = tuple(_chat_logprob(other, ()) for other in tops[:_MOST_LOGPROBS])
    return TokenLogprob(int(token), found, float(entry["logprob"]), others)


def _text_logprob(token: str, logprob: float | None, top: Mapping[str, float]) -> TokenLogprob:
    others = tuple(TokenLogprob(UNKNOWN_TOKEN, _raw(text), float(value)) for text, value in top.items())
    return TokenLogprob(UNKNOWN_TOKEN, _raw(token), float("-inf") if logprob is None else float(logprob), others)


def _raw(text: str) -> bytes:
    """A token's bytes; one that is no whole character may come spelled out."""
    if spelled := _SPELLED.fullmatch(text):
        return bytes.fromhex(spelled[1].replace("\\x", ""))
    return text.encode(errors="replace")


def _failed() -> EngineDied:
    return EngineDied("The upstream failed while it answered.", hint="See its own log.")


def _loose() -> EngineDied:
    return EngineDied("The upstream's answer does not keep to its grammar.", hint="Does it know structured outputs?")
