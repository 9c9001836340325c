"""From a request to tokens that fit: the template, the tokenizer, the context's length. Runs beside the decode loop."""

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from cloister.enclave.llm.engine import GenerateRequest
from cloister.enclave.llm.grammar import Grammar
from cloister.enclave.llm.llama.loop import Job
from cloister.enclave.llm.llama.placeholders import Segment
from cloister.enclave.llm.llama.templates import ChatTemplate
from cloister.enclave.llm.reasoning import thinking_of
from cloister.errors import CloisterError, ContextLengthExceeded, WrongUse

__all__ = ["Preparer", "Words"]

_MOST_LOGPROBS = 20


class Words(Protocol):
    """What is needed of a model: `llama.model.Model` has it all. `bos` and `eos` are -1 where there are none."""

    @property
    def bos(self) -> int: ...

    @property
    def eos(self) -> int: ...

    @property
    def adds_bos(self) -> bool: ...

    @property
    def context_length(self) -> int: ...

    @property
    def chat_template(self) -> str | None: ...

    @property
    def control_texts(self) -> tuple[str, ...]: ...

    def piece(self, token: int, *, special: bool = False) -> bytes: ...

    def beginnings(self) -> object: ...

    def check_tokens(self, tokens: Sequence[int]) -> None: ...

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]: ...


class Preparer:
    """Turns requests into jobs. Any one thread.

    `longest`: bytes of a text that one token stands for at most; None where nobody can say. Asked once, and only for a text
    that may be too long.
    """

    def __init__(self, model: Words, *, longest: Callable[[], int | None] = lambda: None) -> None:
        self._model = model
        self._longest = functools.cache(longest)
        self._template: ChatTemplate | None = None
        self._continues = thinking_of(model.chat_template) != "opened"
        if model.chat_template is not None:
            self._template = ChatTemplate(
                model.chat_template,
                control=model.control_texts,
                bos=self._word(model.bos),
                eos=self._word(model.eos),
            )

    def _word(self, token: int) -> str:
        return self._model.piece(token, special=True).decode(errors="replace") if token >= 0 else ""

    def prepare(self, number: int, request: GenerateRequest) -> Job:
        """Raises: WrongUse (a grammar too), ContextLengthExceeded, MalformedModel (the template)."""
        sampling, prompt = request.sampling, request.prompt
        grammar = None
        if sampling.grammar is not None:
            grammar = Grammar(sampling.grammar)
            self._model.beginnings()  # made here once, not where everybody waits
        if sampling.logprobs is not None and not 0 <= sampling.logprobs <= _MOST_LOGPROBS:
            raise WrongUse(f"logprobs must be between 0 and {_MOST_LOGPROBS}.")
        truncated = 0
        if prompt.messages is not None:
            tokens, truncated = self._from_messages(prompt.messages, request)
        else:
            self._check_bytes([prompt.text or ""], request)
            tokens = self._from_plain(prompt.text, prompt.tokens)
            room = self._room(request)
            if request.truncate_prompt and len(tokens) > room:
                head = 1 if self._model.adds_bos and prompt.tokens is None else 0
                tokens, truncated = _cut(tokens, head, room)
        if not tokens:
            raise WrongUse("The prompt is empty.")
        self._check_fit(len(tokens), request)
        return Job(number, tuple(tokens), sampling, request.scope, truncated, grammar)

    def embeddable(self, text: str | None, tokens: Sequence[int] | None) -> list[int]:
        """A text's tokens, with those that the model wants around it, or tokens as they are.

        Raises: WrongUse, ContextLengthExceeded.
        """
        if tokens is not None:
            self._model.check_tokens(tokens)
        elif text:
            self._check_embeddable(self._least([text]))
        found = list(tokens) if tokens is not None else self._model.tokenize(text or "", add_special=True)
        if not found:
            raise WrongUse("The text is empty.")
        self._check_embeddable(len(found))
        return found

    def _check_embeddable(self, tokens: int) -> None:
        limit = self._model.context_length
        if tokens > limit:
            raise ContextLengthExceeded(limit=limit, prompt=tokens, requested=tokens)

    def _from_plain(self, text: str | None, tokens: Sequence[int] | None) -> list[int]:
        if tokens is not None:
            self._model.check_tokens(tokens)
            return list(tokens)
        found = self._model.tokenize(text or "")
        return [self._model.bos, *found] if self._model.adds_bos else found

    def _from_messages(self, messages: Sequence[Mapping[str, Any]], request: GenerateRequest) -> tuple[list[int], int]:
        segments = self._segments(messages, tools=request.prompt.tools)
        self._check_bytes((text for text, _ in segments), request)
        tokens = self._tokens(segments)
        room = self._room(request)
        if not request.truncate_prompt or len(tokens) <= room:
            return tokens, 0
        shorter = self._drop_messages(messages, room)
        kept, _ = _cut(shorter, self._head_length(messages, shorter), room)
        return kept, len(tokens) - len(kept)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        answer: bool = True,
    ) -> list[int]:
        """Control tokens only where the template itself wrote them; BOS in front where the model wants one.

        A last message that is the assistant's own is what its answer begins with, and is left open, unless the template
        opens the model's thoughts before every answer.
        """
        return self._tokens(self._segments(messages, tools=tools, answer=answer))

    def _segments(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        answer: bool = True,
    ) -> list[Segment]:
        if self._template is None:
            raise WrongUse(
                "This model has no chat template.", hint="Use /v1/completions (or /generate) with a plain prompt."
            )
        segments = None
        if answer and self._continues and _is_begun(messages):
            segments = _left_open(self._template, messages, tools)
        return segments or self._template.render(messages, tools=tools, answer=answer)

    def _tokens(self, segments: Sequence[Segment]) -> list[int]:
        tokens: list[int] = []
        for text, meant in segments:
            tokens += self._model.tokenize(text, parse_special=meant)
        if self._model.adds_bos and tokens[:1] != [self._model.bos]:
            tokens.insert(0, self._model.bos)
        return tokens

    def _drop_messages(self, messages: Sequence[Mapping[str, Any]], room: int) -> list[int]:
        """The rendering with the fewest oldest messages left out that fits; else the one of the last message alone.

        A leading system message stays. A template that refuses a conversation without its beginning (it may want the
        user to speak first) is asked with one message less.
        """
        system = 1 if messages and messages[0].get("role") in ("system", "developer") else 0
        low, high = system + 1, len(messages) - 1  # the first message to keep
        best: list[int] | None = None
        while low <= high:
            middle = (low + high) // 2
            tokens = self._try_render([*messages[:system], *messages[middle:]], room)
            if tokens is not None:
                best, high = tokens, middle - 1
            else:
                low = middle + 1
        if best is not None:
            return best
        return self.render([*messages[:system], *messages[-1:]] if len(messages) > system else messages)

    def _try_render(self, messages: Sequence[Mapping[str, Any]], room: int) -> list[int] | None:
        """None where the template refuses them, or they do not fit."""
        try:
            segments = self._segments(messages)
            if self._least(text for text, _ in segments) > room:
                return None
            tokens = self._tokens(segments)
        except CloisterError:
            return None
        return tokens if len(tokens) <= room else None

    def _head_length(self, messages: Sequence[Mapping[str, Any]], tokens: Sequence[int]) -> int:
        """How many leading tokens belong to the system message (and BOS), if the template lets us see that."""
        head = int(tokens[:1] == [self._model.bos])
        if messages[0].get("role") not in ("system", "developer") or len(messages) < 2:
            return head
        try:
            system = self.render(messages[:1], answer=False)
        except CloisterError:
            return head
        return len(system) if list(tokens[: len(system)]) == system else head

    def _room(self, request: GenerateRequest) -> int:
        """Tokens that the prompt may take when it may be cut: without a wish, a quarter is left for the answer."""
        context = self._model.context_length
        wanted = request.sampling.max_tokens
        return context - (wanted if wanted is not None else context // 4)

    def _check_bytes(self, texts: Iterable[str], request: GenerateRequest) -> None:
        """Refuses what cannot fit whatever the tokenizer makes of it, before it has to make anything of it."""
        if request.truncate_prompt or request.count_prompt:
            return
        if (least := self._least(texts)) >= self._model.context_length:
            self._check_fit(least, request)

    def _least(self, texts: Iterable[str]) -> int:
        """How many tokens these texts take at least, if that may be more than the context has; 0 where nobody can say."""
        size = sum(len(text.encode(errors="replace")) for text in texts)
        longest = self._longest() if size > self._model.context_length else None
        return -(-size // longest) if longest else 0

    def _check_fit(self, prompt: int, request: GenerateRequest) -> None:
        limit, wanted = self._model.context_length, request.sampling.max_tokens
        requested = prompt + (1 if wanted is None else wanted)
        if requested > limit:
            raise ContextLengthExceeded(limit=limit, prompt=prompt, requested=requested)


def _is_begun(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last message is the beginning of an answer: the assistant's, with a text, and without calls."""
    last = messages[-1] if messages else {}
    content = last.get("content")
    return last.get("role") == "assistant" and isinstance(content, str) and bool(content) and not last.get("tool_calls")


def _left_open(
    template: ChatTemplate, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[Segment] | None:
    """The rendering up to the end of the last message's text; None where the template does not show it whole."""
    end = f"\ufdd2{os.urandom(12).hex()}\ufdd3"
    last = {**messages[-1], "content": f"{messages[-1]['content']}{end}"}
    kept: list[Segment] = []
    for text, meant in template.render([*messages[:-1], last], tools=tools, answer=False):
        head, found, _ = text.partition(end)
        kept.append((head, meant))
        if found:
            return kept
    return None


def _cut(tokens: list[int], head: int, room: int) -> tuple[list[int], int]:
    """Keep the first `head` tokens (if they leave at least half the room) and the end, `room` in all."""
    if len(tokens) <= room or room < 1:
        return tokens, 0
    if 2 * head > room:
        head = 0
    kept = tokens[:head] + tokens[len(tokens) - (room - head) :]
    return kept, len(tokens) - len(kept)
