"""Continuous batching: many streams, one model, one thread.

Every `step` runs one decode of all running streams (a token each), or one chunk of somebody's prompt: separate calls to
llama.cpp are cheaper than mixed ones, and a prompt can be given up midway without touching anybody else's answer. No
sockets, no queues, no clock but for choosing between the two and the chunk's size: `cloister bench` runs this same loop
bare:

    library = load_library()
    with seal_weights(path) as weights:
        model = Model(library, Path(f"/proc/self/fd/{weights.fd}"), LoopSettings(slots=16))
    loop = DecodeLoop(library, model, slots=16)
    loop.submit(Job(1, tokens, Sampling(max_tokens=128, temperature=0), scope=None, truncated=0))
    while loop.busy:
        for number, event in loop.step(): ...
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister.enclave.llm.engine import Delta, Done, Event, Sampling, Started
from cloister.enclave.llm.grammar import Grammar
from cloister.enclave.llm.llama.model import AbortedError, Model
from cloister.enclave.llm.llama.sampling import Sampler, logprob_of
from cloister.enclave.llm.llama.sequences import Sequences, common_prefix, divide
from cloister.enclave.llm.llama.text import TextStream
from cloister.errors import CloisterError, WrongUse

__all__ = ["DecodeLoop", "Job", "Stats"]

_CHUNK_SECONDS = 0.15
"""How long one chunk of somebody's prompt may hold up as many answers, at least one small chunk."""
_LONGEST_CHUNK = 0.4
"""Seconds for which prompts may hold up answers at a time, however many prompts wait and however long ago the last was."""
_MOST_OWED = 4.0
"""Seconds of reading that are saved up at most while nobody has a prompt, or nobody an answer: short prompts that come
together are read at once, since half a batch decodes for nearly the price of a whole one."""
_READING = 0.4
"""Seconds of reading for one of answering, where answers are more: with the slower decodes beside a long prompt, an answer
takes about twice as long meanwhile."""
_WAITING_COUNTS = 2.0
"""How many that have an answer weigh as much as one that waits for its first token."""
_QUIET_SECONDS = 1.0
"""How long a chunk may take while there are prompts only: large chunks are read faster."""
_ALONE_SECONDS = 2.0
"""How long it may run when there are no others: whoever comes meanwhile waits for its end."""
_GATHERING = 0.05
"""Seconds in which a chunk that nobody's answer waits for is begun again when another prompt comes, to be read with it:
together they cost little more than the one alone, and clients that ask at the same moment arrive one by one."""
_SMALLEST_CHUNK = 64
"""Rows. llama.cpp's attention reads so many at once; a batch of fewer costs up to eight times as much where much stands
before it (measured at depth 3,000: 63 rows 4.8 s, 64 rows 0.6 s)."""
_SMALLEST_PARTED = 32
"""Rows, where the cache has a part for each stream: there few rows are cheap."""
_DEEP = 512
_GROWTH = 256
"""Cells that a stream reserves beyond what it holds. Most answers end long before the most that they might become."""


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt ready to run: tokens that fit the context, and how to go on from them."""

    number: int
    prompt: tuple[int, ...]
    sampling: Sampling
    scope: bytes | None
    truncated: int
    grammar: Grammar | None = None


@dataclass(slots=True)
class Stats:
    """Counted since the start. `prompt_tokens_evaluated` leaves out what was reused, and counts repeated work twice."""

    requests: int = 0
    prompt_tokens_evaluated: int = 0
    prompt_tokens_reused: int = 0
    tokens_generated: int = 0
    decode_steps: int = 0
    prefill_chunks: int = 0
    aborts: int = 0
    pauses: int = 0


@dataclass(slots=True)
class _Stream:
    job: Job
    sequence: int
    tokens: list[int]
    sampler: Sampler
    text: TextStream
    room: int
    reserved: int
    past: int = 0
    cached: int = 0
    generated: int = 0
    fresh: bool = True

    @property
    def goal(self) -> int:
        """How many tokens must be evaluated before the next one can be decoded on its own."""
        return len(self.tokens) - 1 if self.generated else len(self.job.prompt)

    @property
    def prefilling(self) -> bool:
        return self.past < self.goal

    @property
    def longest(self) -> int:
        return len(self.job.prompt) + self.room


@dataclass(slots=True)
class _Current:
    """Which jobs are open, and whose work llama.cpp is doing right now; shared with the thread that cancels."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    owners: frozenset[int] = frozenset()
    gathers_until: float = 0.0
    open: set[int] = field(default_factory=set)
    cancelled: set[int] = field(default_factory=set)


class DecodeLoop:
    """`submit`, `reject` and `step` belong to one thread; `expect`, `regroup` and `cancel` may be called from any."""

    def __init__(self, library: Any, model: Model, *, slots: int) -> None:
        self._lib = library
        self._model = model
        self._sequences = Sequences(cells=model.kv_tokens, count=model.sequences, slots=slots)
        self._waiting: deque[Job] = deque()
        self._streams: dict[int, _Stream] = {}
        self._paused: deque[_Stream] = deque()
        self._turns: deque[int] = deque()
        self._current = _Current()
        self._prefill_rate = 0.0
        self._owed = _MOST_OWED
        self._reads = False
        self._gathers_since = math.inf
        self._used = False
        self._events: list[tuple[int, Event | CloisterError]] = []
        self.stats = Stats()

    @property
    def busy(self) -> bool:
        return bool(self._streams or self._paused or self._waiting or self._events)

    def gathering(self) -> float:
        """Seconds for which prompts should wait for another that is being prepared, or that they were just given up for;
        mostly 0, and never beside answers (`_GATHERING`)."""
        if not self.busy or any(not stream.prefilling for stream in self._streams.values()):
            return 0.0
        now = time.monotonic()
        with self._current.lock:
            coming = len(self._current.open) > len(self._streams) + len(self._waiting) + len(self._paused)
        if coming:
            self._gathers_since = min(self._gathers_since, now)
        return max(0.0, self._gathers_since + _GATHERING - now) if self._gathers_since < math.inf else 0.0

    def expect(self, number: int) -> None:
        """A job of this number is being prepared: `cancel` knows it from now on."""
        with self._current.lock:
            self._current.open.add(number)

    def submit(self, job: Job) -> None:
        self.expect(job.number)
        if not self.busy:
            self._gathers_since = math.inf  # whoever was gathered before is gone
        self._waiting.append(job)

    def reject(self, number: int, error: CloisterError) -> None:
        """The expected job cannot be run: the next `step` says so."""
        self._close(number)
        self._events.append((number, error))

    def cancel(self, number: int) -> None:
        """Forget a job, if it is still open. What llama.cpp does for cancelled jobs alone is aborted at once."""
        with self._current.lock:
            if number not in self._current.open:
                return
            self._current.cancelled.add(number)
            if self._current.owners and self._current.owners <= self._current.cancelled:
                self._model.abort(True)  # noqa: FBT003

    def regroup(self, number: int) -> None:
        """This job is about to be submitted: let a chunk that began just now, without it, wait for it (`_GATHERING`)."""
        with self._current.lock:
            owners = self._current.owners
            if owners and number not in owners and time.monotonic() < self._current.gathers_until:
                self._model.abort(True)  # noqa: FBT003

    def forgotten(self, number: int) -> bool:
        """Whether an expected job was cancelled before it was submitted; it need not be prepared any more."""
        with self._current.lock:
            if number not in self._current.cancelled:
                return False
            self._current.open.discard(number)
            self._current.cancelled.discard(number)
            return True

    def _close(self, number: int) -> None:
        with self._current.lock:
            self._current.open.discard(number)
            self._current.cancelled.discard(number)

    def step(self) -> list[tuple[int, Event | CloisterError]]:
        """Do a bounded amount of work; the events it gave, in order. Raises: MalformedModel when decoding fails.

        A token for everybody and chunks of prompts take turns, one at a time, by the clock: reading gets its part by their
        numbers, never less than `_READING`, and what it did not use before.
        """
        self._drop_cancelled()
        self._admit()
        running = [s for s in self._streams.values() if not s.prefilling]
        prefilling = len(self._streams) - len(running)
        started = time.monotonic()
        if running and not (prefilling and self._owed > 0 and not self._reads):
            self._decode(running)
            self._reads = False
            share = max(_READING, _WAITING_COUNTS * prefilling / len(running))
            self._owed = min(self._owed + share * (time.monotonic() - started), _MOST_OWED)
        elif prefilling:
            self._prefill()
            self._reads = True
            self._owed -= time.monotonic() - started
        if not running:
            self._owed = _MOST_OWED
        events, self._events = self._events, []
        return events

    def rest(self, *, forget: bool, stop: Callable[[], bool] = lambda: False) -> bool:
        """To be called while nothing is to be done: overwrite the cache memory with zeros, once after each use.

        Which cells are free is llama.cpp's secret, so it must wait while finished conversations are kept for their
        scope; with `forget` they are dropped. `stop` may end it early. Returns whether nothing of anybody's is in the
        cache any more.
        """
        if self.busy:
            return False
        if forget:
            self._sequences.drop_kept()
        if self._sequences.kept:
            return False
        if self._used:
            self._used = not self._model.erase(stop)
        return not self._used

    def embed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """See `Model.embed`. What it leaves in the cache is overwritten by the next `rest`, as all else."""
        self._used = True
        return self._model.embed(tokens)

    # Coming and going.

    def _drop_cancelled(self) -> None:
        with self._current.lock:
            cancelled = set(self._current.cancelled)
        if not cancelled:
            return
        for number in cancelled & {job.number for job in self._waiting}:
            self._close(number)
        self._waiting = deque(job for job in self._waiting if job.number not in cancelled)
        for stream in [one for one in self._paused if one.job.number in cancelled]:
            self._paused.remove(stream)
            stream.sampler.close()
            self._close(stream.job.number)
        for number in cancelled & self._streams.keys():
            stream = self._streams[number]
            self._end(stream, keep=not stream.prefilling)

    def _admit(self) -> None:
        """In order, those who were paused first: a large request at the head waits for room, and is not overtaken."""
        while self._paused:
            need = self._paused[0].longest  # all that it can ever need: nobody is paused twice
            if not self._sequences.fits(need):
                return
            self._settle(self._paused.popleft(), need)
        while self._waiting:
            job = self._waiting[0]
            room = self._model.context_length - len(job.prompt)
            room = min(room, job.sampling.max_tokens) if job.sampling.max_tokens is not None else room
            need = len(job.prompt) + min(room, _GROWTH)
            if not self._sequences.fits(need):
                return
            self._waiting.popleft()
            try:
                sampler = Sampler(
                    self._lib, self._model, job.sampling, prompt=job.prompt, length=room, grammar=job.grammar
                )
            except WrongUse as error:
                self.reject(job.number, error)
                continue
            stop = tuple(s for s in job.sampling.stop if s)
            stream = _Stream(job, -1, list(job.prompt), sampler, TextStream(stop), room, 0)
            self._settle(stream, need)
            stream.cached = stream.past
            self.stats.requests += 1
            self.stats.prompt_tokens_reused += stream.past
            self._events.append((job.number, Started(len(job.prompt), stream.past, job.truncated)))

    def _settle(self, stream: _Stream, need: int) -> None:
        """Give a stream a sequence with `need` cells, for which there is room, and what is known of its tokens."""
        scope = stream.job.scope if self._model.reuses_prefixes else None
        running: dict[int, Sequence[int]] = {}
        if scope is not None:
            running = {s.sequence: s.tokens[: s.past] for s in self._streams.values() if s.job.scope == scope}
        place = self._sequences.place(scope, stream.tokens, need, running)
        for sequence in place.evict:
            self._model.forget(sequence)
        stream.past = self._take(place.sequence, place.source, place.reused)
        stream.sequence, stream.reserved, stream.fresh = place.sequence, need, True
        self._streams[stream.job.number] = stream
        self._turns.append(stream.job.number)

    def _reserve(self, running: Sequence[_Stream]) -> list[_Stream]:
        """Cells for one more token of each, oldest first; where they do not suffice, the youngest of those that may still
        grow pause meanwhile. Nobody new is let in before they are back."""
        for stream in running:
            while stream.job.number in self._streams and stream.past >= stream.reserved:
                need = min(stream.longest, stream.past + _GROWTH)
                evict = self._sequences.grow(stream.sequence, need)
                if evict is None:
                    growing = [s for s in self._streams.values() if s.reserved < s.longest]
                    self._pause(growing[-1])
                    continue
                for sequence in evict:
                    self._model.forget(sequence)
                stream.reserved = need
        return [stream for stream in running if stream.job.number in self._streams]

    def _pause(self, stream: _Stream) -> None:
        """Give up a stream's cells; its tokens are read again when there is room for all that it may become."""
        del self._streams[stream.job.number]
        self._turns.remove(stream.job.number)
        self._sequences.release(stream.sequence, (), keep=False)
        self._model.forget(stream.sequence)
        self._paused.appendleft(stream)
        self.stats.pauses += 1

    def _take(self, sequence: int, source: int, reused: int) -> int:
        """Make `sequence` hold exactly the first `reused` tokens of `source`; returns how many it really holds."""
        if not reused:
            self._model.forget(sequence)
            return 0
        if source != sequence:
            self._model.forget(sequence)
            if reused < self._least_shared:
                return 0
            self._model.share(source, sequence, reused)
            return reused
        if not self._model.forget(sequence, reused):
            self._model.forget(sequence)
            return 0
        return reused

    @property
    def _least_shared(self) -> int:
        """Tokens. In a parted cache all of a part is copied, which takes longer than reading a few of them."""
        return _SMALLEST_CHUNK if self._model.parted else 1

    def _end(self, stream: _Stream, *, keep: bool) -> None:
        stream.sampler.close()
        del self._streams[stream.job.number]
        self._turns.remove(stream.job.number)
        self._close(stream.job.number)
        if not self._sequences.release(stream.sequence, stream.tokens[: stream.past], keep=keep):
            self._model.forget(stream.sequence)

    # The two kinds of batch.

    def _decode(self, running: list[_Stream]) -> None:
        running = self._reserve(running)
        for together, fillers in self._groups(running):
            self._decode_together(together, fillers)
        self.stats.decode_steps += bool(running)

    def _decode_together(self, running: Sequence[_Stream], fillers: Sequence[tuple[int, int]]) -> None:
        items = [(s.tokens[s.past], s.past, s.sequence, True) for s in running]
        rows = sorted([*items, *((0, past, sequence, False) for sequence, past in fillers)], key=lambda item: item[2])
        done = self._run(rows, running)
        for sequence, past in fillers:
            self._model.forget(sequence, past)
        if not done:
            return
        places = {sequence: row for row, (_, _, sequence, _) in enumerate(rows)}
        for stream in running:
            stream.past += 1
            self._next_token(stream, places[stream.sequence])

    def _groups(self, running: Sequence[_Stream]) -> list[tuple[list[_Stream], list[tuple[int, int]]]]:
        """Who is evaluated together, and with which fillers: sequences in between, and how many cells they hold."""
        if not self._model.parted or len(running) < 2:
            return [(list(running), [])] if running else []
        streams = {stream.sequence: stream for stream in running}
        own = {stream.sequence: stream.past for stream in self._streams.values()}
        between = range(min(streams), max(streams) + 1)
        held = {at: own[at] if at in own else self._sequences.held(at) for at in between}
        cell = self._model.cell_size / self._model.weights_size
        groups = divide(sorted(streams), held, cell=cell, most=self._model.context_length)
        return [
            ([streams[at] for at in group if at in streams], [(at, held[at]) for at in group if at not in streams])
            for group in groups
        ]

    def _prefill(self) -> None:
        """One chunk: the prompt whose turn it is, and, if room is left, the beginning of the next ones."""
        turns = [self._streams[n] for n in self._turns if self._streams[n].prefilling]
        # What an older one shares may be all that a resumed stream had to read again.
        turns = [stream for stream in turns if not self._waits_for_prefix(stream) and stream.prefilling]
        budget = self._chunk_size()
        ends: list[tuple[_Stream, int]] = []
        first = turns[0].job.number if turns else 0
        for stream in turns:
            end = min(stream.goal, stream.past + budget)
            if end <= stream.past:
                break
            budget -= end - stream.past
            ends.append((stream, end))
        if not ends:
            return
        self._fill_up(ends)
        ends.sort(key=lambda part: part[0].sequence)
        items: list[tuple[int, int, int, bool]] = []
        shares: list[tuple[_Stream, int, int]] = []
        for stream, end in ends:
            last = -1 if stream.generated else stream.goal - 1
            items += [(stream.tokens[at], at, stream.sequence, at == last) for at in range(stream.past, end)]
            shares.append((stream, end, len(items) - 1))
        started = time.monotonic()
        alone = all(stream.prefilling for stream in self._streams.values())
        self._gathers_since = min(self._gathers_since, started)
        gathers_until = self._gathers_since + _GATHERING if alone and budget > 0 else 0.0
        if not self._run(items, [stream for stream, _, _ in shares], gathers_until):
            return
        self._gathers_since = math.inf
        self._note_rate(len(items), time.monotonic() - started)
        self.stats.prefill_chunks += 1
        self.stats.prompt_tokens_evaluated += len(items)
        self._turns.remove(first)
        self._turns.append(first)
        for stream, end, row in shares:
            stream.past, stream.fresh = end, False
            if not stream.prefilling and not stream.generated:
                self._next_token(stream, row)

    def _fill_up(self, ends: Sequence[tuple[_Stream, int]]) -> None:
        """Where a batch would be small and deep, begin earlier: some tokens are evaluated again."""
        missing = _SMALLEST_CHUNK - sum(end - stream.past for stream, end in ends)
        deepest = max((stream for stream, _ in ends), key=lambda stream: stream.past)
        if missing > 0 and deepest.past >= _DEEP and self._model.reuses_prefixes and not self._model.parted:
            deepest.past -= missing
            self._model.forget(deepest.sequence, deepest.past)

    def _waits_for_prefix(self, stream: _Stream) -> bool:
        """Before a stream's first chunk: take what older ones of its scope have read of its tokens by now.

        True: one of them is just reading some of them, so that this one had better wait for it.
        """
        scope = stream.job.scope
        if scope is None or not stream.fresh or not self._model.reuses_prefixes:
            return False
        others = [s for s in self._streams.values() if s.job.scope == scope and s is not stream]
        running: dict[int, Sequence[int]] = {other.sequence: other.tokens[: other.past] for other in others}
        source, longest = self._sequences.best(scope, stream.tokens, running)
        longest = max(longest, stream.past)
        for other in others:
            if other.job.number < stream.job.number and other.prefilling:
                shared = common_prefix(other.tokens[: other.goal], stream.tokens, len(stream.tokens) - 1)
                if shared - longest >= _SMALLEST_CHUNK:
                    return True
        if longest - stream.past >= self._least_shared:
            self._model.forget(stream.sequence)
            self._model.share(source, stream.sequence, longest)
            if not stream.generated:
                self.stats.prompt_tokens_reused += longest - stream.past
                stream.cached = longest
            stream.past = longest
        return False

    def _chunk_size(self) -> int:
        prefilling = sum(stream.prefilling for stream in self._streams.values())
        running = len(self._streams) - prefilling
        if running:
            seconds = min(max(_CHUNK_SECONDS * max(1.0, prefilling / running), self._owed), _LONGEST_CHUNK)
        else:
            seconds = _QUIET_SECONDS if prefilling > 1 or self._waiting else _ALONE_SECONDS
        smallest = _SMALLEST_PARTED if self._model.parted and self._prefill_rate else _SMALLEST_CHUNK
        wanted = int(self._prefill_rate * seconds) // smallest * smallest
        return max(min(wanted, self._model.chunk), smallest)

    def _note_rate(self, tokens: int, seconds: float) -> None:
        if tokens >= _SMALLEST_PARTED and seconds > 0:
            rate = tokens / seconds
            self._prefill_rate = rate if not self._prefill_rate else 0.7 * self._prefill_rate + 0.3 * rate

    def _run(
        self, items: Sequence[tuple[int, int, int, bool]], streams: Sequence[_Stream], gathers_until: float = 0.0
    ) -> bool:
        """Decode; False when it was aborted, and then nothing of it counts."""
        self._used = True
        owners = frozenset(s.job.number for s in streams)
        with self._current.lock:
            self._current.owners, self._current.gathers_until = owners, gathers_until
            self._model.abort(owners <= self._current.cancelled)
        try:
            self._model.decode(items)
        except AbortedError:
            self.stats.aborts += 1
            for stream in streams:
                if not self._model.forget(stream.sequence, stream.past):
                    self._model.forget(stream.sequence)
                    stream.past = 0
            return False
        finally:
            with self._current.lock:
                self._current.owners = frozenset()
                self._model.abort(False)  # noqa: FBT003
        return True

    def _next_token(self, stream: _Stream, row: int) -> None:
        """Choose one, tell about it, and end the stream if that was the last."""
        if stream.room == 0:
            self._finish(stream, "length")
            return
        model, sampling = self._model, stream.job.sampling
        try:
            token = stream.sampler.choose(row)
        except WrongUse as error:
            self._events.append((stream.job.number, error))
            self._end(stream, keep=False)
            return
        if token in model.end_tokens and not sampling.ignore_eos:
            self._finish(stream, "stop")
            return
        stream.generated += 1
        self.stats.tokens_generated += 1
        stream.tokens.append(token)
        logprob = None
        if sampling.logprobs is not None:
            logprob = logprob_of(model, model.logits(row), token, sampling.logprobs)
        delta = stream.text.feed(model.piece(token), logprob)
        if delta is not None:
            self._events.append((stream.job.number, delta))
        if stream.text.stopped or stream.sampler.finished:
            self._finish(stream, "stop")
        elif stream.generated >= stream.room:
            self._finish(stream, "length")

    def _finish(self, stream: _Stream, reason: Any) -> None:
        rest: Delta | None = stream.text.finish()
        number = stream.job.number
        if rest is not None:
            self._events.append((number, rest))
        self._events.append((number, Done(reason, len(stream.job.prompt), stream.generated, stream.cached)))
        self._end(stream, keep=True)
