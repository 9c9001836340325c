"""What every route shares: the engine, the queue, the tenants, the counters; and one call with its client."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TypeAlias, cast

from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from cloister.enclave.llm.connection import Reply, read_json_body
from cloister.enclave.llm.engine import Delta, Done, Embedded, Engine, EngineInfo, Event, GenerateRequest, Started
from cloister.enclave.llm.envelope import Refused
from cloister.enclave.llm.fields import Fields, parse_object
from cloister.enclave.llm.metrics import Metrics
from cloister.enclave.llm.queue import Queue, Ticket
from cloister.enclave.llm.tenants import ApiKey, Principal, Tenants, cache_scope
from cloister.errors import EngineDied, MalformedModel, QueueFull

__all__ = ["ApiConfig", "Call", "Service"]

_RESTART_POLL = 0.05  # seconds
_TOKENIZING = 2
"""Texts that are made tokens at the same time for nothing but that, and tokens text: every prompt waits for them."""

Answers: TypeAlias = AsyncGenerator[tuple[int, Event], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiConfig:
    """How the API is served. Keys are required unless told otherwise; `require_keys=False` opens it only where no keys
    are configured, and belongs in the statement's `insecure`."""

    api_keys: tuple[ApiKey, ...] = ()
    require_keys: bool = True
    alias: str = "default"
    """A second name for the one model."""
    max_waiting: int = 64
    """Answers that may wait for a slot."""
    wait_limit: float = 60.0
    """Seconds that a request waits for its first slot."""
    restart_wait: float = 10.0
    """Seconds that a request waits for an engine that died and is being restarted, before it is refused."""
    max_body: int = 8 << 20
    """Bytes of one request."""
    max_held: int = 128 << 20
    """Bytes of all requests that wait or are answered (4 for a token to be embedded); a principal's first is taken beyond
    them."""
    generate_tokens: int = 256
    """Tokens that /generate leaves for the answer where the caller does not say."""


class Service:
    def __init__(self, engine: Engine, config: ApiConfig) -> None:
        self.engine = engine
        self.config = config
        self.tenants = Tenants(config.api_keys, require_keys=config.require_keys)
        self.queue = Queue(config.max_waiting)
        self._tokenizing = Queue(config.max_waiting)
        self._tokenizing.slots = _TOKENIZING
        self._held: Counter[str] = Counter()
        """Bytes, of each principal's requests."""
        self.metrics = Metrics()

    def serving(self, model: str | None = None) -> EngineInfo:
        """What answers now, if it goes by that name.

        Raises:
            EngineLoading: no model yet.
            EngineDied: the engine is being restarted.
            Refused: 404, another model was asked for.
        """
        info = self.engine.info
        if not self.engine.ready:
            raise EngineDied("the engine is not ready")
        if model is not None and model not in (info.model.name, self.config.alias):
            message = "This enclave serves one model; /v1/models names it."
            raise Refused(404, "model_not_found", message, param="model")
        return info

    async def recovered(self) -> None:
        """Returns once the engine is ready, or has had its time. A model that was never loaded is not waited for."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self.config.restart_wait
        while not self.engine.ready and loop.time() < until:
            self.engine.info  # noqa: B018 (raises while the model is loaded for the first time)
            await asyncio.sleep(_RESTART_POLL)

    async def answers(self, principal: Principal, requests: Sequence[GenerateRequest], size: int = 0) -> Answers:
        """The events of all requests, each with its request's index, as they come. Closing it stops them all.

        `size`: bytes of the body that they came in.

        Raises:
            QueueFull, Refused: no place in the queue, or none in time; 400 for a model that continues no texts.
            EngineDied: also when an answer just stops: a short answer is never taken for a whole one.
        """
        if not self.engine.info.model.generates:
            message = "This model gives embeddings and continues no texts: /v1/embeddings takes its requests."
            raise Refused(400, "unsupported_model", message, param="model")
        self.queue.slots = self.engine.info.slots
        with self._holding(principal, size):
            tickets = self.queue.admit(principal.name, len(requests))
            try:
                streams = [self._answer(*item) for item in zip(range(len(requests)), requests, tickets, strict=True)]
                async with aclosing(streams[0] if len(streams) == 1 else _merge(streams)) as merged:
                    async for item in merged:
                        yield item
            finally:
                for ticket in tickets:
                    ticket.release()

    @contextmanager
    def _holding(self, principal: Principal, size: int) -> Iterator[None]:
        """Raises: QueueFull: too much is held already."""
        name = principal.name
        if self._held[name] and self._held.total() + size > self.config.max_held:
            raise QueueFull("Too many long requests are waiting.", retry_after=self.queue.retry_after)
        self._held[name] += size
        try:
            yield
        finally:
            self._held[name] -= size
            if not self._held[name]:
                del self._held[name]

    async def _answer(self, index: int, request: GenerateRequest, ticket: Ticket) -> Answers:
        # Only the first answer of a request can time out: once one runs, the others are on their way.
        await ticket.wait(None if index else self.config.wait_limit)
        await self.recovered()  # it may have died meanwhile
        started, done = False, None
        events = cast("AsyncGenerator[Event, None]", self.engine.generate(request))  # the seam promises `aclose`
        try:
            async with aclosing(events):
                async for event in events:
                    started = True
                    if isinstance(event, Started):
                        self.metrics.prompt_tokens += event.prompt_tokens
                    elif isinstance(event, Delta):
                        self.metrics.completion_tokens += event.tokens
                    elif isinstance(event, Done):
                        done = event
                        continue
                    yield index, event
        except MalformedModel:
            if not started:  # the chat template failed on what it was given
                raise
            raise Refused(500, "model_failed", "The model failed while it answered.") from None
        finally:
            ticket.release()
        if done is None:
            raise EngineDied("the answer stopped without its end")
        self.metrics.cached_tokens += done.cached_tokens
        yield index, done

    async def embeddings(self, principal: Principal, inputs: Sequence[str | Sequence[int]]) -> list[Embedded]:
        """One for each input, in a single place of the queue.

        Raises:
            QueueFull, Refused: no place in the queue, or none in time; 400 for a model that gives none; 500 where one has
                no direction.
        """
        info = self.engine.info
        if not info.model.embedding:
            message = "This model continues texts and gives no embeddings. A model that does is one with a pooling."
            raise Refused(400, "unsupported_model", message, param="model")
        self.queue.slots = info.slots
        size = sum(len(one) if isinstance(one, str) else 4 * len(one) for one in inputs)
        with self._holding(principal, size):
            ticket = self.queue.admit(principal.name, 1)[0]
            try:
                await ticket.wait(self.config.wait_limit)
                await self.recovered()
                found = await self.engine.embed(inputs)
            except MalformedModel:
                raise Refused(500, "model_failed", "The model computed no finite embedding of a text.") from None
            finally:
                ticket.release()
        self.metrics.prompt_tokens += sum(embedded.tokens for embedded in found)
        return found

    @asynccontextmanager
    async def tokenizing(self, principal: Principal) -> AsyncIterator[None]:
        """A turn at the tokenizer, which does not wait for answers. Raises: QueueFull, Refused: no place, or none in time."""
        ticket = self._tokenizing.admit(principal.name, 1)[0]
        try:
            await ticket.wait(self.config.wait_limit)
            await self.recovered()
            yield
        finally:
            ticket.release()


async def _merge(streams: Sequence[Answers]) -> Answers:
    """Side by side, in the order in which events come; the first failure ends all."""
    items: asyncio.Queue[tuple[int, Event] | asyncio.Task[None]] = asyncio.Queue()

    async def pump(stream: Answers) -> None:
        async with aclosing(stream):
            async for item in stream:
                items.put_nowait(item)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    for task in tasks:
        task.add_done_callback(items.put_nowait)
    running = len(tasks)
    try:
        while running:
            item = await items.get()
            if isinstance(item, asyncio.Task):
                running -= 1
                item.result()
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Call:
    """One request: who asks, what, and where the answer goes."""

    def __init__(self, service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
        self.service = service
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: bytes = scope["query_string"]
        self.headers = Headers(scope=scope)
        self.receive = receive
        self.reply = reply
        self.principal = Principal()
        self.size = 0
        """Bytes of the body, once it was read."""
        self.prompt_field = "messages"
        """What this route calls the prompt, for errors that name it."""

    async def fields(self) -> Fields:
        """The body's JSON object. Raises `Refused` (400, 413, 415) and `ClientGone`."""
        body = await read_json_body(self.headers, self.receive, self.service.config.max_body)
        self.size = len(body)
        return parse_object(body)

    def answers(self, requests: Sequence[GenerateRequest]) -> Answers:
        return self.service.answers(self.principal, requests, self.size)

    def scope(self) -> bytes | None:
        """Whose cached prefixes may be reused. Raises `Refused` (400)."""
        return cache_scope(self.headers, self.principal)
