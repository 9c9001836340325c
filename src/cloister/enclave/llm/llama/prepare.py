"""From a request to tokens that fit: the template, the tokenizer, the context's length. Runs beside the decode loop."""

from collections.abc import Mapping, Sequence
from typing import Any

from cloister.enclave.llm.engine import GenerateRequest
from cloister.enclave.llm.grammar import Grammar
from cloister.enclave.llm.llama.loop import Job
from cloister.enclave.llm.llama.model import Model
from cloister.enclave.llm.llama.templates import ChatTemplate
from cloister.errors import CloisterError, ContextLengthExceeded, WrongUse

__all__ = ["Preparer"]

_MOST_LOGPROBS = 20


class Preparer:
    """Turns requests into jobs. Any one thread."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._template: ChatTemplate | None = None
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
            tokens = self._from_plain(prompt.text, prompt.tokens)
            room = self._room(request)
            if request.truncate_prompt and len(tokens) > room:
                head = 1 if self._model.adds_bos and prompt.tokens is None else 0
                tokens, truncated = _cut(tokens, head, room)
        if not tokens:
            raise WrongUse("The prompt is empty.")
        self._check_fit(len(tokens), request)
        return Job(number, tuple(tokens), sampling, request.scope, truncated, grammar)

    def _from_plain(self, text: str | None, tokens: Sequence[int] | None) -> list[int]:
        if tokens is not None:
            self._model.check_tokens(tokens)
            return list(tokens)
        found = self._model.tokenize(text or "")
        return [self._model.bos, *found] if self._model.adds_bos else found

    def _from_messages(self, messages: Sequence[Mapping[str, Any]], request: GenerateRequest) -> tuple[list[int], int]:
        tokens = self.render(messages, tools=request.prompt.tools)
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
        """Control tokens only where the template itself wrote them; BOS in front where the model wants one."""
        if self._template is None:
            raise WrongUse(
                "This model has no chat template.", hint="Use /v1/completions (or /generate) with a plain prompt."
            )
        tokens: list[int] = []
        for text, meant in self._template.render(messages, tools=tools, answer=answer):
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
            tokens = self._try_render([*messages[:system], *messages[middle:]])
            if tokens is not None and len(tokens) <= room:
                best, high = tokens, middle - 1
            else:
                low = middle + 1
        if best is not None:
            return best
        return self.render([*messages[:system], *messages[-1:]] if len(messages) > system else messages)

    def _try_render(self, messages: Sequence[Mapping[str, Any]]) -> list[int] | None:
        try:
            return self.render(messages)
        except CloisterError:
            return None

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

    def _check_fit(self, prompt: int, request: GenerateRequest) -> None:
        limit, wanted = self._model.context_length, request.sampling.max_tokens
        requested = prompt + (1 if wanted is None else wanted)
        if requested > limit:
            raise ContextLengthExceeded(limit=limit, prompt=prompt, requested=requested)


def _cut(tokens: list[int], head: int, room: int) -> tuple[list[int], int]:
    """Keep the first `head` tokens (if they leave at least half the room) and the end, `room` in all."""
    if len(tokens) <= room or room < 1:
        return tokens, 0
    if 2 * head > room:
        head = 0
    kept = tokens[:head] + tokens[len(tokens) - (room - head) :]
    return kept, len(tokens) - len(kept)
