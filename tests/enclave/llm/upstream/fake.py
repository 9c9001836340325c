"""Upstreams of our own: one that speaks as vLLM and SGLang do, and one that sends whatever bytes it is told to."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

from cloister.enclave.llm.upstream import Address, UpstreamConfig, UpstreamEngine
from cloister.enclave.llm.upstream.exchange import Limits

CHATML = (
    "{% if tools %}{{ '<|im_start|>system\n<tools>' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{ '</tools> <tool_call>{…}</tool_call><|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKERS = {"<|im_start|>": 256, "<|im_end|>": 257}
BLOCK = 16
"""Tokens that are cached together."""


def tokens_of(text: str) -> list[int]:
    """Bytes, and every marker as its control token: a tokenizer of Hugging Face's always parses them."""
    found: list[int] = []
    while text:
        marker = next((marker for marker in MARKERS if text.startswith(marker)), None)
        found += [MARKERS[marker]] if marker else list(text[0].encode())
        text = text[len(marker or text[0]) :]
    return found


def text_of(tokens: Sequence[int]) -> str:
    names = {number: marker.encode() for marker, number in MARKERS.items()}
    return b"".join(names.get(token, bytes([token % 256])) for token in tokens).decode(errors="replace")


def write_folder(folder: Path, template: str | None = CHATML, **config: Any) -> Path:
    """A model's folder, as far as it is about words."""
    added = {str(number): {"content": marker, "special": True} for marker, number in MARKERS.items()}
    known = {"added_tokens_decoder": added, "eos_token": "<|im_end|>", "bos_token": None, "chat_template": template}
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(known | config))
    return folder


@dataclass(frozen=True)
class Asked:
    """A request as it came."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]


Send = Callable[[dict[str, Any]], Awaitable[None]]


@dataclass
class FakeVllm:
    """The parts of vLLM's server that are used. `owner` "sglang" makes it speak SGLang's variants.

    `pieces`: what it answers; an `asyncio.Event` in it is waited for, a `None` cuts the connection.
    """

    owner: str = "vllm"
    name: str = "acme/Toy-7B"
    pieces: Sequence[Any] = ("Hel", "lo")
    reason: str = "stop"
    context: int | None = 512
    width: int = 0
    status: int = 200
    token_ids: bool = True
    asked: list[Asked] = field(default_factory=list)
    running: int = 0
    left: int = 0
    """Answers whose client went away."""
    prefixes: dict[str, list[list[int]]] = field(default_factory=dict)

    @property
    def completions(self) -> list[dict[str, Any]]:
        return [asked.body for asked in self.asked if asked.path == "/v1/completions"]

    def prompts(self) -> list[str]:
        return [text_of(body["prompt"]) for body in self.completions]

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        data = b""
        while (message := await receive())["type"] == "http.request":
            data += message["body"]
            if not message.get("more_body"):
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        body = json.loads(data) if data else {}
        self.asked.append(Asked(scope["method"], scope["path"], headers, body))
        match scope["path"]:
            case "/v1/models":
                await reply(send, 200, {"object": "list", "data": [self._card()]})
            case "/tokenize":
                tokens = tokens_of(body["prompt"])
                await reply(send, 200, {"count": len(tokens), "max_model_len": self.context, "tokens": tokens})
            case "/detokenize":
                field = "text" if self.owner == "sglang" else "prompt"
                await reply(send, 200, {field: text_of(body["tokens"])})
            case "/v1/embeddings" if self.width:
                await reply(send, 200, self._embeddings(body))
            case "/v1/completions":
                await self._complete(body, receive, send)
            case _:
                await reply(send, 404, {"detail": "Not Found"})

    def _card(self) -> dict[str, Any]:
        card = {"id": self.name, "object": "model", "created": 1_700_000_000, "owned_by": self.owner, "root": "/m"}
        return card if self.context is None else {**card, "max_model_len": self.context}

    def _embeddings(self, body: dict[str, Any]) -> dict[str, Any]:
        inputs = [tokens_of(one) if isinstance(one, str) else one for one in body["input"]]
        data = [
            {"index": at, "object": "embedding", "embedding": [float(sum(one)), *[2.0] * (self.width - 1)]}
            for at, one in enumerate(inputs)
        ]
        total = sum(map(len, inputs))
        return {"object": "list", "data": data[::-1], "usage": {"prompt_tokens": total, "total_tokens": total}}

    def _cached(self, body: dict[str, Any]) -> int:
        """As automatic prefix caching does it: whole blocks, under one salt."""
        known = self.prefixes.setdefault(body["cache_salt"], [])
        best = max((common(body["prompt"][:-1], other) // BLOCK * BLOCK for other in known), default=0)
        known.append(body["prompt"])
        return best

    async def _complete(self, body: dict[str, Any], receive: Any, send: Send) -> None:
        if self.status != 200:
            error = {
                "message": f"refused: {body['prompt']}",
                "type": "BadRequestError",
                "param": None,
                "code": self.status,
            }
            await reply(send, self.status, {"error": error})
            return
        cached = self._cached(body)
        gone = asyncio.ensure_future(receive())
        self.running += 1
        try:
            answer = asyncio.ensure_future(self._stream(body, cached, send))
            await asyncio.wait([gone, answer], return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                self.left += 1
                answer.cancel()
            with suppress(asyncio.CancelledError):
                await answer
        finally:
            self.running -= 1
            gone.cancel()

    async def _stream(self, body: dict[str, Any], cached: int, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        count = 0
        for at, piece in enumerate(self.pieces):
            if isinstance(piece, asyncio.Event):
                await piece.wait()
                continue
            if piece is None:
                raise ConnectionError("cut on purpose")
            if isinstance(piece, bytes):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                continue
            ids = tokens_of(piece)
            count += len(ids)
            last = at == len(self.pieces) - 1
            await send(frame(self._chunk(piece, ids, self.reason if last else None)))
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count, "total_tokens": 0}
        usage["total_tokens"] = usage["prompt_tokens"] + count
        details = {"prompt_tokens_details": {"cached_tokens": cached}}
        await send(frame({**self._head(), "choices": [], "usage": {**usage, **details}}))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    def _head(self) -> dict[str, Any]:
        return {"id": "cmpl-1", "object": "text_completion", "created": 1_700_000_000, "model": self.name}

    def _chunk(self, text: str, ids: list[int], reason: str | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
        if self.token_ids:
            choice["token_ids"] = ids
        return {**self._head(), "choices": [choice], "usage": None}


def common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def frame(event: dict[str, Any]) -> dict[str, Any]:
    return {"type": "http.response.body", "body": f"data: {json.dumps(event)}\n\n".encode(), "more_body": True}


async def reply(send: Send, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


@dataclass
class Running:
    """A served app. `stop` cuts all its connections, as when its process is killed."""

    address: Address
    stop: Callable[[], Awaitable[None]]


@asynccontextmanager
async def served(app: Any, port: int = 0) -> AsyncIterator[Running]:
    listener = socket.create_server(("127.0.0.1", port))
    config = uvicorn.Config(app, lifespan="off", log_level="critical", access_log=False, timeout_graceful_shutdown=0)
    server = uvicorn.Server(config)
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))

    async def stop() -> None:
        server.should_exit = server.force_exit = True
        for connection in list(server.server_state.connections):
            connection.transport.abort()
        await serving
        listener.close()

    try:
        yield Running(Address("127.0.0.1", listener.getsockname()[1]), stop)
    finally:
        await stop()


@asynccontextmanager
async def says(*blocks: bytes, close: bool = True) -> AsyncIterator[Address]:
    """Answers every request with these bytes, whatever it is."""

    answering: set[asyncio.Task[Any]] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        answering.add(task)
        with suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            for block in blocks:
                writer.write(block)
                await writer.drain()
            if not close:
                await reader.read()
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield Address("127.0.0.1", server.sockets[0].getsockname()[1])
    if answering:
        await asyncio.wait(answering)


QUICK = Limits(connect=2.0, first=2.0, between=2.0)


@asynccontextmanager
async def engine_for(address: Address, **options: Any) -> AsyncIterator[UpstreamEngine]:
    engine = UpstreamEngine(UpstreamConfig(address, **{"poll": 0.02, "load_timeout": 5.0, **options}))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def events(body: bytes) -> Iterator[Any]:
    """Of a stream of ours, without its end mark."""
    blocks = body.decode("ascii").removesuffix("\n\n").split("\n\n")
    assert blocks.pop() == "data: [DONE]"
    return (json.loads(block.removeprefix("data: ")) for block in blocks)
