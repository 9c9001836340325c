"""An answer as a row of blocks (thoughts, text, calls), as the newer dialects tell it: opened, continued, closed."""

import json
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from cloister.enclave.llm.connection import WhileConnected
from cloister.enclave.llm.engine import Delta, Done, GenerateRequest, Started
from cloister.enclave.llm.reasoning import overlap
from cloister.enclave.llm.service import Call
from cloister.enclave.llm.toolcalls import AnswerReader, CallArguments, CallStarted, Part, Reading, Reasoning, Text

__all__ = ["Block", "BlockForm", "Blocks", "Closed", "Opened", "Outcome", "Piece", "StopScanner", "tell"]

Kind: TypeAlias = Literal["text", "thinking", "call"]


@dataclass(slots=True)
class Block:
    """`index` counts an answer's blocks from 0. `id` and `name` are a call's; its text is its arguments' JSON."""

    kind: Kind
    index: int
    id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)
    whole: bool = False
    """False while it is open, and where the answer broke off inside it."""

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def arguments(self) -> Mapping[str, Any] | None:
        """A call's arguments; None where they are no JSON object, for the answer ended too early or is wrong."""
        try:
            value = json.loads(self.text)
        except (ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None


@dataclass(frozen=True, slots=True)
class Opened:
    block: Block


@dataclass(frozen=True, slots=True)
class Piece:
    block: Block
    text: str


@dataclass(frozen=True, slots=True)
class Closed:
    block: Block


Change: TypeAlias = Opened | Piece | Closed


class Blocks:
    """Cuts one answer into blocks, as it comes. `thoughts` False leaves out what the model says to itself."""

    def __init__(self, reading: Reading, *, thoughts: bool = True) -> None:
        self._reader = AnswerReader(reading)
        self._thoughts = thoughts
        self.all: list[Block] = []

    def feed(self, text: str) -> list[Change]:
        return [change for part in self._reader.feed(text) for change in self._changes(part)]

    def finish(self, *, whole: bool = True) -> list[Change]:
        """The rest, and the last block's end; `whole` False: the answer was cut off."""
        changes = [change for part in self._reader.finish() for change in self._changes(part)]
        return changes + self._close(whole=whole)

    def _changes(self, part: Part) -> list[Change]:
        match part:
            case Reasoning():
                return self._continue("thinking", part.text) if self._thoughts else []
            case Text():
                return self._continue("text", part.text)
            case CallStarted():
                return [*self._close(), self._open("call", part.id, part.name)]
            case CallArguments():
                return self._continue("call", part.text)

    def _continue(self, kind: Kind, text: str) -> list[Change]:
        changes: list[Change] = []
        if not self.all or self.all[-1].whole or self.all[-1].kind != kind:
            changes = [*self._close(), self._open(kind)]
        block = self.all[-1]
        block.pieces.append(text)
        return [*changes, Piece(block, text)]

    def _open(self, kind: Kind, call_id: str = "", name: str = "") -> Change:
        self.all.append(Block(kind, len(self.all), call_id, name))
        return Opened(self.all[-1])

    def _close(self, *, whole: bool = True) -> list[Change]:
        if not self.all or self.all[-1].whole:
            return []
        self.all[-1].whole = whole
        return [Closed(self.all[-1])]


class StopScanner:
    """Ends a text at the first of `stops`, as it comes; `found` is that one.

    The engine could look for them, but does not tell which it met, or whether it met one at all.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """What surely stands before any stop."""
        if not self._stops:
            return text
        self._held += text
        hits = [(at, -len(stop), stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            at, _, self.found = min(hits)
            return self._held[:at]
        kept = max(overlap(self._held, stop) for stop in self._stops)
        shown = self._held[: len(self._held) - kept]
        self._held = self._held[len(shown) :]
        return shown

    def finish(self) -> str:
        """What was held back because it might have begun a stop."""
        held, self._held = self._held, ""
        return "" if self.found is not None else held


@dataclass(slots=True)
class Outcome:
    """How an answer ended, and the tokens it took. `stop`: the stop sequence that ended it."""

    reason: Literal["stop", "length"] = "stop"
    stop: str | None = None
    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0
    """Of the answer's tokens, those that brought thoughts."""


class BlockForm(Protocol):
    """How one dialect writes an answer."""

    def begin(self, outcome: Outcome) -> bytes:
        """The events before the first block; only the prompt's tokens are known."""

    def change(self, change: Change) -> bytes: ...

    def end(self, blocks: Sequence[Block], outcome: Outcome) -> bytes: ...

    def whole(self, blocks: Sequence[Block], outcome: Outcome) -> bytes: ...


class _Told:
    """One answer on its way: what the engine says becomes changes, and counts."""

    def __init__(self, blocks: Blocks, stops: Sequence[str]) -> None:
        self.blocks = blocks
        self.outcome = Outcome()
        self._scanner = StopScanner(stops)

    @property
    def stopped(self) -> bool:
        return self._scanner.found is not None

    def take(self, event: Started | Delta | Done) -> list[Change]:
        outcome = self.outcome
        match event:
            case Started():
                outcome.prompt, outcome.cached = event.prompt_tokens, event.cached_tokens
            case Delta():
                outcome.completion += event.tokens
                shown = self._scanner.feed(event.text)
                outcome.stop = self._scanner.found
                changes = self.blocks.feed(shown) if shown else []
                if any(change.block.kind == "thinking" for change in changes if isinstance(change, Piece)):
                    outcome.reasoning += event.tokens
                return changes
            case Done():
                outcome.reason = event.finish_reason
                outcome.prompt, outcome.cached = event.prompt_tokens, event.cached_tokens
                outcome.completion = event.completion_tokens
        return []

    def finish(self) -> list[Change]:
        rest = self.blocks.feed(self._scanner.finish())
        return rest + self.blocks.finish(whole=self.outcome.reason == "stop")


async def tell(
    call: Call, request: GenerateRequest, form: BlockForm, blocks: Blocks, *, stream: bool, stops: Sequence[str] = ()
) -> None:
    """Asks the engine and sends its answer, streamed or whole. Closes the engine's stream at the first of `stops`.

    The opening events travel with the first text: alone, they would make it wait for the channel's next tick.
    """
    told = _Told(blocks, stops)
    pending = b""
    async with WhileConnected(call.receive):
        async with aclosing(call.answers([request])) as events:
            async for _, event in events:
                changes = told.take(event)
                if stream and isinstance(event, Started):
                    pending += form.begin(told.outcome)
                if stream and changes:
                    await call.reply.event(pending + b"".join(map(form.change, changes)))
                    pending = b""
                if told.stopped:
                    break
        rest = told.finish()
        if stream:
            await call.reply.end(pending + b"".join(map(form.change, rest)) + form.end(blocks.all, told.outcome))
        else:
            await call.reply.json(200, form.whole(blocks.all, told.outcome))
