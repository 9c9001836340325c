"""The `Engine` seam over an upstream: finds out what it is, keeps an eye on it, and asks it for tokens and answers."""

import asyncio
import contextlib
import logging
import math
import struct
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cloister.enclave.llm.engine import Embedded, EngineInfo, Event, GenerateRequest, ModelInfo, Started
from cloister.enclave.llm.llama.loop import Job
from cloister.enclave.llm.llama.prepare import Preparer
from cloister.enclave.llm.llama.wire import printable
from cloister.enclave.llm.reasoning import thinking_of
from cloister.enclave.llm.toolcalls import MARKERS, call_form_of
from cloister.enclave.llm.upstream.address import Address, model_digest
from cloister.enclave.llm.upstream.completions import CompletionReader
from cloister.enclave.llm.upstream.exchange import Limits, ask, nonsense, opened
from cloister.enclave.llm.upstream.flavours import (
    Kind,
    cache_salt,
    completion_body,
    detokenize_body,
    detokenized,
    kind_of,
    tokenize_body,
)
from cloister.enclave.llm.upstream.prompts import (
    UpstreamWords,
    Vocabulary,
    candidates,
    from_folder,
    from_properties,
)
from cloister.errors import CloisterError, EngineDied, EngineLoading, QueueFull, WrongUse
from cloister.evidence.manifest import manifest_digest

__all__ = ["VARIANT", "UpstreamConfig", "UpstreamEngine", "find_model"]

_log = logging.getLogger("cloister.engine")
_T = TypeVar("_T")

VARIANT = "upstream"
"""What the statement calls such an engine: no library of ours computes."""
_MOST_CONTEXT = 1 << 24
_MOST_WIDTH = 1 << 16
_BATCH = 64
"""Texts that are embedded in one request."""
_START_PAUSE = 0.5
_ANSWER = Limits()
_LOOK = Limits(first=30.0, between=30.0, size=16 << 20)


@dataclass(frozen=True, slots=True)
class UpstreamConfig:
    """`context`: tokens of a conversation, 0 for the upstream's own. `tokenizer`: the model's folder, where the upstream does
    not tell its chat template. `slots`: answers at the same time. `load_timeout`: seconds until it must answer at all;
    `poll`: between two looks at it.
    """

    address: Address
    slots: int = 16
    context: int = 0
    tokenizer: Path | None = None
    load_timeout: float = 900.0
    poll: float = 2.0
    limits: Limits = _ANSWER
    look: Limits = _LOOK
    """For everything but answers."""


@dataclass(frozen=True, slots=True)
class _Found:
    """What `/v1/models` says of the one model that is asked."""

    name: str
    kind: Kind
    created: int
    context: int
    parameters: int


async def find_model(address: Address, *, look: Limits = _LOOK) -> str:
    """The name of the model that the upstream serves. Raises: EngineDied, EngineLoading, WrongUse."""
    return (await _find(address, look)).name


class UpstreamEngine:
    """See `Engine`. What the upstream says is foreign, though it is part of what is trusted: every answer is read strictly,
    and none that is cut short counts.

    `on_state` as in `LlamaEngine`.
    """

    def __init__(self, config: UpstreamConfig, *, on_state: Callable[[str, str], None] | None = None) -> None:
        self._config = config
        self._on_state = on_state
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="upstream-prepare")
        self._info: EngineInfo | None = None
        self._kind: Kind = "vllm"
        self._words: UpstreamWords | None = None
        self._preparer: Preparer | None = None
        self._ready = False
        self._doubted = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineLoading("The upstream is not there yet.", hint="Try again in a moment.")
        return self._info

    @property
    def ready(self) -> bool:
        return self._ready

    async def start(self) -> None:
        """Waits for the upstream to answer. Raises: EngineDied when it never does; WrongUse when it cannot be used."""
        found = await self._first_look()
        self._kind = found.kind
        embedding = await self._width(found.name)
        vocabulary = await self._vocabulary()
        context = self._context(found, await self._own_context())
        loop = asyncio.get_running_loop()
        words = await self._in_thread(lambda: self._make_words(found.name, vocabulary, context, loop))
        if words is not None:
            self._words, self._preparer = words, Preparer(words)
        elif not embedding:
            hint = "vLLM, SGLang (since 0.5.2) and llama-server have it."
            raise WrongUse("The upstream makes no tokens of a text: it has no /tokenize.", hint=hint)
        template = vocabulary.template if words is not None else None
        model = ModelInfo(
            name=found.name,
            sha256=model_digest(found.name),
            quantization="unknown",
            architecture=found.kind,
            parameters=found.parameters,
            size=0,
            context_length=context,
            has_chat_template=template is not None,
            created=found.created,
            calls=call_form_of(template),
            thinking=thinking_of(template),
            embedding=embedding,
            generates=words is not None,
        )
        self._info = EngineInfo(manifest_digest({}).hex(), VARIANT, model, self._config.slots)
        self._tell(ready=True)
        self._keeper = asyncio.create_task(self._keep())

    async def close(self) -> None:
        self._ready = False
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
            self._keeper = None
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        """See `Engine.generate`. Leaving early closes the upstream's connection, which ends its work too; who only counts a
        prompt leaves before any is begun."""
        job = await self._prepare(request)
        yield Started(len(job.prompt), 0, job.truncated)
        reader = CompletionReader(len(job.prompt), grammar=job.grammar, whole=not job.sampling.stop)
        try:
            async with opened(
                self._config.address, "POST", "/v1/completions", self._body(job), limits=self._config.limits
            ) as response:
                if response.status != 200:
                    raise _refusal(response.status)
                async with aclosing(response.pieces()) as pieces:
                    async for piece in pieces:
                        for delta in reader.feed(piece):
                            yield delta
                        if reader.finished:
                            break
                for event in reader.finish():
                    yield event
        except EngineDied:
            self._doubted.set()
            raise

    async def embed(self, inputs: Sequence[str | Sequence[int]]) -> list[Embedded]:
        """See `Engine.embed`."""
        self._check_ready()
        found: list[Embedded] = []
        for at in range(0, len(inputs), _BATCH):
            found += await self._embed(
                [text if isinstance(text, str) else list(text) for text in inputs[at : at + _BATCH]]
            )
        return found

    async def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """See `Engine.tokenize`."""
        self._check_ready()
        if self._words is None:
            raise WrongUse("This upstream makes no tokens of a text.")
        pieces = self._words.pieces(text, parse_special=parse_special)
        if len(pieces) == 1:
            return await self._tokens(self.info.model.name, text, add_special, parse_special)
        found = [token for piece in pieces for token in await self._tokens(self.info.model.name, piece, False, False)]  # noqa: FBT003
        return [self._words.bos, *found] if add_special and self._words.adds_bos else found

    async def detokenize(self, tokens: Sequence[int]) -> bytes:
        """See `Engine.detokenize`."""
        self._check_ready()
        body = detokenize_body(self._kind, self.info.model.name, tokens)
        text = detokenized(self._kind, await self._look("/detokenize", body))
        if not isinstance(text, str):
            raise nonsense()
        return text.encode(errors="replace")

    # Finding out what it is.

    async def _first_look(self) -> _Found:
        loop = asyncio.get_running_loop()
        until = loop.time() + self._config.load_timeout
        while True:
            try:
                return await _find(self._config.address, self._config.look)
            except (EngineDied, EngineLoading):
                if loop.time() > until:
                    raise EngineDied(
                        "The upstream does not answer.", hint="Start it first; its log says more."
                    ) from None
                await asyncio.sleep(_START_PAUSE)

    async def _width(self, name: str) -> int:
        """How long its embeddings are; 0 when it gives none."""
        body = {"model": name, "input": ["a"], "encoding_format": "float", "cache_salt": cache_salt(None)}
        status, answer = await ask(self._config.address, "POST", "/v1/embeddings", body, limits=self._config.look)
        return len(_vectors(answer, 1)[0]) // 4 if status == 200 else 0

    async def _vocabulary(self) -> Vocabulary:
        if self._config.tokenizer is not None:
            return from_folder(self._config.tokenizer)
        if self._kind != "llama-server":
            return Vocabulary()
        return from_properties(await self._properties())

    async def _properties(self) -> Mapping[str, Any]:
        status, answer = await ask(self._config.address, "GET", "/props", limits=self._config.look)
        return answer if status == 200 and isinstance(answer, dict) else {}

    async def _own_context(self) -> int:
        """Of one of llama-server's slots; 0 elsewhere."""
        if self._kind != "llama-server":
            return 0
        settings = (await self._properties()).get("default_generation_settings")
        return _number(settings.get("n_ctx")) if isinstance(settings, dict) else 0

    def _context(self, found: _Found, own: int) -> int:
        known = [length for length in (self._config.context, own or found.context) if length]
        if not known:
            raise WrongUse("The upstream does not say how long a conversation may be.", hint="Say it with --context.")
        return min(known)

    def _make_words(
        self, name: str, vocabulary: Vocabulary, context: int, loop: asyncio.AbstractEventLoop
    ) -> UpstreamWords | None:
        """In the thread. None where the upstream has no tokenizer to be asked."""

        def tokenize(text: str, add_special: bool, parse_special: bool) -> list[int]:
            work = self._tokens(name, text, add_special, parse_special)
            return asyncio.run_coroutine_threadsafe(work, loop).result()

        try:
            if self._kind == "llama-server":
                vocabulary = _with_controls(vocabulary, tokenize)
            return UpstreamWords(vocabulary, tokenize, context_length=context, parses_only=self._kind != "llama-server")
        except WrongUse:
            return None

    # Watching it.

    async def _keep(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.poll):
                    await self._doubted.wait()
            self._doubted.clear()
            self._tell(ready=await self._is_the_same())

    async def _is_the_same(self) -> bool:
        try:
            found = await _find(self._config.address, self._config.look)
        except CloisterError:
            return False
        return found.name == self.info.model.name and found.kind == self._kind

    def _tell(self, *, ready: bool) -> None:
        if ready == self._ready:
            return
        self._ready = ready
        _log.info("upstream %s", "ready" if ready else "away")
        if self._on_state is not None:
            self._on_state("ready" if ready else "loading", VARIANT)

    def _check_ready(self) -> None:
        self.info  # noqa: B018 (raises until it was there once)
        if not self._ready:
            raise EngineDied("The upstream is away.", hint="Ask again in a moment.")

    # Asking it.

    async def _prepare(self, request: GenerateRequest) -> Job:
        self._check_ready()
        words, preparer = self._words, self._preparer
        if words is None or preparer is None:
            raise WrongUse("This model gives embeddings only.")

        def prepare() -> Job:
            words.begin()
            return preparer.prepare(0, request)

        return await self._in_thread(prepare)

    def _body(self, job: Job) -> dict[str, Any]:
        model = self.info.model
        room = model.context_length - len(job.prompt)
        wanted = job.sampling.max_tokens
        return completion_body(
            self._kind,
            job.sampling,
            model=model.name,
            prompt=job.prompt,
            room=room if wanted is None else min(room, wanted),
            scope=job.scope,
            markers=self._words is not None and not {*MARKERS}.isdisjoint(self._words.control_texts),
        )

    async def _embed(self, inputs: list[Any]) -> list[Embedded]:
        model = self.info.model
        body = {"model": model.name, "input": inputs, "encoding_format": "float", "cache_salt": cache_salt(None)}
        answer = await self._look("/v1/embeddings", body, limits=self._config.limits)
        vectors = _vectors(answer, len(inputs))
        if any(len(vector) != 4 * model.embedding for vector in vectors):
            raise nonsense()
        usage = answer.get("usage")
        total = _number(usage.get("prompt_tokens")) if isinstance(usage, dict) else 0
        counts = [total - (len(vectors) - 1) * (total // len(vectors)), *[total // len(vectors)] * (len(vectors) - 1)]
        return [Embedded(*item) for item in zip(vectors, counts, strict=True)]

    async def _tokens(self, name: str, text: str, add_special: bool, parse_special: bool) -> list[int]:
        body = tokenize_body(self._kind, name, text, add_special=add_special, parse_special=parse_special)
        tokens = (await self._look("/tokenize", body)).get("tokens")
        if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
            raise nonsense()
        return tokens

    async def _look(self, path: str, body: Mapping[str, Any], *, limits: Limits | None = None) -> Mapping[str, Any]:
        try:
            status, answer = await ask(self._config.address, "POST", path, body, limits=limits or self._config.look)
            if status != 200:
                raise _refusal(status)
            if not isinstance(answer, dict):
                raise nonsense()
        except EngineDied:
            self._doubted.set()
            raise
        return answer

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


async def _find(address: Address, look: Limits) -> _Found:
    status, answer = await ask(address, "GET", "/v1/models", limits=look)
    if status != 200:
        raise _refusal(status)
    data = answer.get("data") if isinstance(answer, dict) else None
    first = data[0] if isinstance(data, list) and data else None
    if not isinstance(first, dict) or not isinstance(first.get("id"), str) or not first["id"]:
        raise WrongUse("The upstream names no model.", hint="Is it OpenAI-compatible?")
    told = first.get("meta")
    meta: Mapping[str, Any] = told if isinstance(told, dict) else {}
    return _Found(
        name=printable(first["id"], 200),
        kind=kind_of(first.get("owned_by")),
        created=_number(first.get("created")),
        context=_number(first.get("max_model_len")) or _number(meta.get("n_ctx_train")),
        parameters=_number(meta.get("n_params"), 1 << 60),
    )


def _refusal(status: int) -> CloisterError:
    """What an upstream's no means. Its own words may quote what it was sent, so they are dropped."""
    if status in (401, 403):
        return WrongUse("The upstream asks for a key.", hint="Start it without: only this enclave can reach it.")
    if status in (404, 405, 501):
        return WrongUse("The upstream's model does not do this.")
    if status == 429:
        return QueueFull("The upstream has too much to do.")
    if status == 503:
        return EngineLoading("The upstream is loading its model.", hint="Try again in a moment.")
    if 400 <= status < 500:
        return WrongUse("The upstream refused this request.")
    return EngineDied("The upstream failed.", hint="See its own log.")


def _with_controls(vocabulary: Vocabulary, tokenize: Callable[[str, bool, bool], list[int]]) -> Vocabulary:
    """Those of the candidates that are one token where markers are parsed, and something else where they are not."""
    found = tuple(
        text
        for text in candidates(vocabulary)
        if len(parsed := tokenize(text, False, True)) == 1 and parsed != tokenize(text, False, False)  # noqa: FBT003
    )
    return Vocabulary(vocabulary.template, vocabulary.bos, vocabulary.eos, found)


def _number(value: object, top: int = _MOST_CONTEXT << 8) -> int:
    """A whole number within bounds; 0 for anything else."""
    return value if type(value) is int and 0 <= value <= top else 0


def _vectors(answer: Any, count: int) -> list[bytes]:
    """Of length 1, in the order of what was asked, as 32-bit floats, little-endian. Raises: EngineDied."""
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, list) or len(data) != count:
        raise nonsense()
    found: dict[int, bytes] = {}
    for entry in data:
        numbers = entry.get("embedding") if isinstance(entry, dict) else None
        if not isinstance(numbers, list) or not 0 < len(numbers) <= _MOST_WIDTH:
            raise nonsense()
        if not all(type(number) in (int, float) for number in numbers):
            raise nonsense()
        found[_number(entry.get("index"))] = _unit(numbers)
    if sorted(found) != list(range(count)):
        raise nonsense()
    return [found[at] for at in range(count)]


def _unit(numbers: Sequence[float]) -> bytes:
    try:
        length = math.hypot(*numbers)
        if not 0 < length < math.inf:
            raise nonsense()
        return struct.pack(f"<{len(numbers)}f", *(number / length for number in numbers))
    except OverflowError as error:
        raise nonsense() from error
