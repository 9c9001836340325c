"""The front's side: an `Engine` for asyncio that outlives the process in which the model runs."""

import asyncio
import base64
import functools
import logging
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from typing import Any, TypeVar

from cloister.enclave.llm.engine import Done, Embedded, EngineInfo, Event, GenerateRequest, ModelInfo
from cloister.enclave.llm.llama import wire
from cloister.enclave.llm.llama.child import read_beat
from cloister.enclave.llm.llama.config import VARIANTS, LlamaConfig
from cloister.enclave.llm.llama.library import library_digest, library_dir
from cloister.enclave.llm.llama.process import EXIT_DIED, EXIT_HUNG, Running, spawn
from cloister.enclave.llm.llama.weights import Weights, open_measured, seal_weights
from cloister.errors import (
    CloisterError,
    EngineDied,
    EngineLoading,
    MalformedMessage,
    MalformedModel,
    NotTrusted,
    WrongUse,
)

__all__ = ["LlamaEngine"]

_log = logging.getLogger("cloister.engine")
_T = TypeVar("_T")
_CRASH_WINDOW = 60.0
_CRASH_LOOP = 5
_LONGEST_DELAY = 30.0
_TURNS = 3
"""Of the event loop, before what was said leaves. The engine takes every core as soon as it has a prompt: who asked at the same
moment has been opened and has said so by then, and need not open beside it. Turns without work take microseconds."""


class LlamaEngine:
    """llama.cpp behind the `Engine` seam.

    Constructing one starts a thread that all engines will be started from, again and again if need be: they inherit
    its priority, so construct first and lower the priority of the calling thread afterwards. `on_state` is told
    "loading", "ready" or "failed", with a line that holds no content.
    """

    def __init__(self, config: LlamaConfig, *, on_state: Callable[[str, str], None] | None = None) -> None:
        self._config = config
        self._on_state = on_state
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="engine-supervisor")
        self._pool.submit(int).result()  # the thread exists from now on
        self._state = "loading"
        self._progress = 0.0
        self._info: EngineInfo | None = None
        self._sha256 = config.sha256
        self._rungs: tuple[str, ...] = VARIANTS if config.mode == "process" else VARIANTS[:1]
        self._link: _Link | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._crashes: deque[float] = deque(maxlen=_CRASH_LOOP)
        self._numbers = count(1)

    @property
    def info(self) -> EngineInfo:
        """Raises: EngineLoading before the model was loaded for the first time."""
        if self._info is None:
            raise self._loading()
        return self._info

    @property
    def ready(self) -> bool:
        return self._state == "ready"

    @property
    def state(self) -> str:
        """ "loading", "ready", or "failed": it died too often, and is tried again every half minute."""
        return self._state

    @property
    def pid(self) -> int:
        """The engine process that serves now; 0 when there is none."""
        return self._link.running.pid if self._link is not None else 0

    async def start(self) -> None:
        await self._bring_up()
        self._keeper = asyncio.create_task(self._keep())

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
            self._keeper = None
        if self._link is not None:
            await self._finish(self._link)
        self._state = "loading"
        self._pool.shutdown(wait=False)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        """See `Engine.generate`. Raises EngineLoading while the engine is being restarted."""
        link = self._serving()
        number = next(self._numbers)
        answers: asyncio.Queue[Event | CloisterError] = asyncio.Queue()
        link.send(wire.encode_request(number, request))
        link.streams[number] = answers
        try:
            while True:
                event = await answers.get()
                if isinstance(event, CloisterError):
                    raise event
                if isinstance(event, Done):
                    link.streams.pop(number, None)
                yield event
                if isinstance(event, Done):
                    return
        finally:
            if link.streams.pop(number, None) is not None:
                link.send({"t": "cancel", "id": number})

    async def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        message = {"t": "tokenize", "text": text, "add_special": add_special, "parse_special": parse_special}
        value = await self._ask(message)
        if not isinstance(value, list) or not all(type(token) is int for token in value):
            raise MalformedMessage("The engine's answer has no shape.")
        return value

    async def detokenize(self, tokens: Sequence[int]) -> bytes:
        value = await self._ask({"t": "detokenize", "tokens": list(tokens)})
        try:
            return bytes.fromhex(value)
        except (TypeError, ValueError) as error:
            raise MalformedMessage("The engine's answer has no shape.") from error

    async def embed(self, inputs: Sequence[str | Sequence[int]]) -> list[Embedded]:
        """See `Engine.embed`. One after the other, so that others' come in between."""
        return [await self._embed(one) for one in inputs]

    async def _embed(self, one: str | Sequence[int]) -> Embedded:
        value = await self._ask({"t": "embed", **({"text": one} if isinstance(one, str) else {"tokens": list(one)})})
        try:
            vector, tokens = base64.b64decode(value["vector"], validate=True), value["tokens"]
        except (KeyError, TypeError, ValueError) as error:
            raise MalformedMessage("The engine's answer has no shape.") from error
        if len(vector) != 4 * self.info.model.embedding or type(tokens) is not int or tokens < 1:
            raise MalformedMessage("The engine's answer has no shape.")
        return Embedded(vector, tokens)

    async def stats(self) -> dict[str, int]:
        """What the decode loop counted since the engine was last started; see `Stats`."""
        value = await self._ask({"t": "stats"})
        if not isinstance(value, dict):
            raise MalformedMessage("The engine's answer has no shape.")
        return {str(key): int(number) for key, number in value.items()}

    async def _ask(self, message: dict[str, Any]) -> Any:
        link = self._serving()
        number = next(self._numbers)
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        link.send({**message, "id": number})
        link.replies[number] = reply
        try:
            return await reply
        finally:
            link.replies.pop(number, None)
            if reply.cancelled():
                link.send({"t": "cancel", "id": number})

    def _serving(self) -> "_Link":
        if self._link is None or self._state != "ready":
            if self._state == "failed":
                raise EngineDied("The engine died too often; it will be tried again.", hint="See the server's log.")
            raise self._loading()
        return self._link

    def _loading(self) -> EngineLoading:
        return EngineLoading("The model is being loaded.", progress=self._progress, hint="Try again in a moment.")

    # From nothing to ready.

    async def _bring_up(self) -> None:
        """One rung of the ladder after the other, each in an engine of its own, until one serves.

        Raises: MalformedModel, WrongUse; NotTrusted when the libraries are not those of the first start.
        """
        self._tell("loading", "")
        self._progress = 0.0
        failure = MalformedModel("The engine died while it loaded the model.", hint="The file may be damaged.")
        digest = await self._blocking(lambda: library_digest(library_dir()))
        if self._info is not None and digest != self._info.sha256:
            raise NotTrusted("The engine's libraries were changed.", expected=self._info.sha256, got=digest)
        take = open_measured if self._config.measured_files else seal_weights
        with await self._blocking(functools.partial(take, self._config.model, expected=self._sha256)) as weights:
            for variant in self._rungs:
                settings = replace(self._config.loop, variant=variant)
                start = functools.partial(spawn, self._config.mode, weights.fd, settings)
                link = await _Link.open(await self._blocking(start), self._note_progress)
                try:
                    model = self._describe(await self._loaded(link), weights)
                except (MalformedModel, MalformedMessage) as error:
                    failure = MalformedModel(error.message, hint=error.hint)
                    reason = await self._finish(link)
                    _log.warning("engine variant %s: %s (%s)", variant, error.message, reason)
                    if link.final:
                        break
                    continue
                except asyncio.CancelledError:
                    await self._finish(link)
                    raise
                self._sha256 = weights.sha256
                self._rungs = self._rungs[self._rungs.index(variant) :]  # what failed here once is not tried again
                self._info = EngineInfo(digest, variant, model, settings.slots)
                self._link = link
                self._tell("ready", variant)
                return
        raise failure

    def _describe(self, fields: Any, weights: Weights) -> ModelInfo:
        return wire.decode_model(
            fields, name=self._config.name, sha256=weights.sha256, size=weights.size, created=weights.modified
        )

    def _note_progress(self, share: float) -> None:
        self._progress = share

    async def _loaded(self, link: "_Link") -> Any:
        """What the engine says of its model. Raises: MalformedModel (refused, died or hung)."""
        while True:
            signs: list[asyncio.Future[Any]] = [link.ready, link.closed]
            await asyncio.wait(signs, timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
            if link.ready.done():
                return link.ready.result()
            if link.closed.done():
                raise MalformedModel("The engine died while it loaded the model.", hint="The file may be damaged.")
            if link.silent_for(busy=True) > self._config.load_timeout:
                raise MalformedModel("The engine hung while it loaded the model.", hint="The file may be damaged.")

    # From ready to dead and back.

    async def _keep(self) -> None:
        """Notice the engine's end, or that it hangs; fail what it was doing; start the next one."""
        while True:
            link = self._link
            if link is not None:
                hung = await self._until_over(link)
                if self._config.mode == "thread":
                    os._exit(EXIT_HUNG if hung else EXIT_DIED)
                self._link = None
                self._tell("loading", "")
                reason = "it hung" if hung else ""
                ended = await self._finish(link)
                _log.error("engine died: %s", reason or ended)
                self._crashes.append(time.monotonic())
            await self._pause()
            try:
                await self._bring_up()
            except (CloisterError, OSError) as error:
                self._crashes.append(time.monotonic())
                _log.error("engine not restarted: %s", type(error).__name__)

    async def _until_over(self, link: "_Link") -> bool:
        """True: it hangs. False: it is gone."""
        tick = min(1.0, self._config.hang_timeout / 4)
        while not link.closed.done():
            await asyncio.wait([link.closed], timeout=tick)
            if link.silent_for(busy=bool(link.streams or link.replies)) > self._config.hang_timeout:
                return not link.closed.done()
        return False

    async def _pause(self) -> None:
        """Nothing after the first crash; twice as long after each further one within a minute."""
        recent = [at for at in self._crashes if at > time.monotonic() - _CRASH_WINDOW]
        delay = min(_LONGEST_DELAY, 0.25 * 2 ** (len(recent) - 1)) if len(recent) > 1 else 0.0
        if len(recent) >= _CRASH_LOOP:
            delay = _LONGEST_DELAY
            self._tell("failed", f"it died {len(recent)} times within {_CRASH_WINDOW:.0f} s")
        await asyncio.sleep(delay)

    async def _finish(self, link: "_Link") -> str:
        link.fail(EngineDied("The engine died; it is being restarted.", hint="Ask again in a moment."))
        if self._link is link:
            self._link = None
        link.close()
        return await self._blocking(link.running.end)

    def _tell(self, state: str, detail: str) -> None:
        self._state = state
        _log.info("engine %s %s", state, detail)
        if self._on_state is not None:
            self._on_state(state, detail)

    async def _blocking(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


class _Link(asyncio.Protocol):
    """The conversation with one engine. What it says is foreign: anything unexpected ends it."""

    def __init__(self, running: Running, on_progress: Callable[[float], None]) -> None:
        self.running = running
        self.streams: dict[int, asyncio.Queue[Event | CloisterError]] = {}
        self.replies: dict[int, asyncio.Future[Any]] = {}
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[Any] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self.final = False
        """The engine read the file and refused it: no other variant would do better."""
        self._on_progress = on_progress
        self._reader = wire.FrameReader(wire.MAX_EVENT)
        self._transport: asyncio.Transport | None = None
        self._leaving = bytearray()
        self._beat = -1
        self._alive_at = time.monotonic()

    @staticmethod
    async def open(running: Running, on_progress: Callable[[float], None]) -> "_Link":
        link = _Link(running, on_progress)
        running.connection.setblocking(False)  # noqa: FBT003
        await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=running.connection)
        return link

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._reader.feed(data):
                self._receive(message)
        except (MalformedMessage, TypeError, ValueError, KeyError):
            self.close()

    def _receive(self, message: dict[str, Any]) -> None:
        match message.get("t"):
            case "events":
                for item in message["e"]:
                    number, event = wire.decode_event(item)
                    self._deliver(number, event)
            case "reply":
                reply = self.replies.get(message["id"])
                if reply is not None and not reply.done():
                    if "error" in message:
                        reply.set_exception(wire.decode_error(message["error"]))
                    else:
                        reply.set_result(message["value"])
            case "progress":
                self._on_progress(min(max(wire.real(message["share"]), 0.0), 1.0))
            case "ready" if not self.ready.done():
                self.ready.set_result(message["model"])
            case "refused" if not self.ready.done():
                error = wire.decode_error(message["error"])
                if not isinstance(error, MalformedModel):
                    raise MalformedMessage("An engine that refuses its model for no known reason.")
                self.final = message["another"] is not True
                self.ready.set_exception(error)
            case _:
                raise MalformedMessage("An engine message of no known kind.")

    def _deliver(self, number: int, event: Event | CloisterError) -> None:
        stream = self.streams.get(number)
        if stream is None:  # cancelled meanwhile
            return
        if isinstance(event, CloisterError):
            del self.streams[number]
        stream.put_nowait(event)

    def send(self, message: dict[str, Any]) -> None:
        """Raises: WrongUse when it cannot be said."""
        try:
            data = wire.frame(message)
        except (TypeError, ValueError, RecursionError) as error:
            raise WrongUse("The request holds something that is no JSON.") from error
        if len(data) > wire.MAX_REQUEST:
            raise WrongUse("The request is too long.", expected=f"{wire.MAX_REQUEST} bytes", got=str(len(data)))
        if not (self.streams or self.replies):
            self._alive_at = time.monotonic()
        if not self._leaving:
            self._leave(_TURNS)
        self._leaving += data

    def _leave(self, turns: int) -> None:
        """After so many turns of the loop."""
        if turns:
            asyncio.get_running_loop().call_soon(self._leave, turns - 1)
            return
        data = bytes(self._leaving)
        self._leaving.clear()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def silent_for(self, *, busy: bool) -> float:
        """Seconds since the last sign of life; an engine without work owes none."""
        beat = read_beat(self.running.beat)
        if beat != self._beat or not busy:
            self._beat = beat
            self._alive_at = time.monotonic()
        return time.monotonic() - self._alive_at

    def fail(self, error: CloisterError) -> None:
        for stream in self.streams.values():
            stream.put_nowait(error)
        self.streams.clear()
        for reply in self.replies.values():
            if not reply.done():
                reply.set_exception(error)
        if self.ready.done() and not self.ready.cancelled():
            self.ready.exception()  # seen, so that asyncio does not report it as forgotten

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
