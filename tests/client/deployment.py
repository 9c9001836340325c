"""A whole deployment on loopback: the real gateway, keys, evidence and verifier around a small app."""

import asyncio
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Self

import uvicorn
from tests.verify.world import CONFIG, ENGINE, MEASUREMENT, MODEL, OWNER

from cloister.channel.keys import KeyRing
from cloister.enclave.gateway import Gateway
from cloister.evidence.binding import report_data
from cloister.evidence.document import Document, Item
from cloister.evidence.launch import App, LaunchConfig
from cloister.evidence.statement import EngineStatement, ModelStatement, Statement
from cloister.sim import Device
from cloister.sim.measure import Measurement
from cloister.verify import Policy

Scope = dict[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

HANG = 60.0
"""Seconds after which a test gives up on what must happen. However slow the machine, nothing takes that long."""

LAUNCH = LaunchConfig(
    owner_key=OWNER, deployment="acme-chat", release=3, app=App("llm", "66" * 32), models=(MODEL,), config_sha256=CONFIG
)


def chunk(text: str, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None, **more}
    event = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "demo", "choices": [choice]}
    return b"data: " + json.dumps(event).encode() + b"\n\n"


@dataclass
class InnerApp:
    """Answers a little like the API inside; `seen` is what reached it, `ended` how streams of `/v1/endless` ended."""

    seen: list[dict[str, Any]] = field(default_factory=list)
    running: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive()).get("body", b"")
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        said = {"method": scope["method"], "path": scope["path"], "query": scope["query_string"].decode()}
        self.seen.append({**said, "headers": headers, "body": body, "client": scope["client"]})
        match scope["path"]:
            case "/v1/chat/completions":
                await self._chat(json.loads(body), send)
            case "/v1/endless":
                await self._endless(send)
            case "/v1/breaks-early":
                raise RuntimeError(body.decode())
            case "/v1/breaks-late":
                await _start(send, 200, b"text/event-stream")
                await send({"type": "http.response.body", "body": chunk("half"), "more_body": True})
                await asyncio.sleep(0.1)
                raise RuntimeError(body.decode())
            case _:
                await _json(send, 200, {**said, "length": len(body), "sha256": hashlib.sha256(body).hexdigest()})

    async def _chat(self, asked: dict[str, Any], send: Send) -> None:
        words = asked["messages"][-1]["content"].split()
        if words == ["fail"]:
            error = {"message": "No such thing.", "type": "invalid_request_error", "param": None, "code": "no_such"}
            await _json(send, 400, {"error": error})
        elif asked.get("stream"):
            await _start(send, 200, b"text/event-stream; charset=utf-8")
            for word in words:
                await send({"type": "http.response.body", "body": chunk(word + " "), "more_body": True})
                await asyncio.sleep(0.002)
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
        else:
            message = {"role": "assistant", "content": " ".join(words)}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            answer = {"id": "c1", "object": "chat.completion", "created": 1, "model": "demo", "choices": [choice]}
            await _json(send, 200, answer)

    async def _endless(self, send: Send) -> None:
        await _start(send, 200, b"text/event-stream")
        self.running.set()
        try:
            while True:
                await send({"type": "http.response.body", "body": chunk("and "), "more_body": True})
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            self.ended.set()
            raise


async def _start(send: Send, status: int, media_type: bytes, *more: tuple[bytes, bytes]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", media_type), *more]})


async def _json(send: Send, status: int, value: dict[str, Any]) -> None:
    body = json.dumps(value).encode()
    await _start(send, status, b"application/json", (b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.body", "body": body, "more_body": False})


class Deployment:
    """`offset`: seconds that the enclave's clock is ahead. `launch` and `measurement` may be swapped while it runs."""

    def __init__(self, device: Device, app: Asgi | None = None, *, offset: float = 0.0, **options: Any) -> None:
        self.device = device
        self.launch = LAUNCH
        self.measurement: Measurement = MEASUREMENT
        self.offset = offset
        self.app = app or InnerApp()
        self._first_epoch = 0
        self.ring = KeyRing(self.now(), entropy=self._entropy)
        self.attested = 0
        self.gateway = Gateway(self.app, self.ring, self.attest, clock=self.now, **options)

    def now(self) -> float:
        return time.time() + self.offset

    def _entropy(self, length: int) -> bytes:
        """Random but for the one byte that names a ring's first keys."""
        return bytes([self._first_epoch]) if length == 1 else os.urandom(length)

    def renew_keys(self, *, same_names: bool = False) -> None:
        """What a restart does: the old keys are gone at once; the new ones seldom have the same identifiers."""
        self._first_epoch += not same_names
        self.ring.__init__(self.now(), entropy=self._entropy)  # type: ignore[misc]

    @property
    def policy(self) -> Policy:
        return Policy(deployment="acme-chat", owner_key=OWNER, simulator_root=self.device.root_pem)

    async def attest(self, nonce: bytes) -> bytes:
        self.attested += 1
        launch = self.launch.encode()
        digest = hashlib.sha256(launch)
        statement = Statement(
            purpose="serve",
            aud=(),
            launch_sha256=digest.hexdigest(),
            iat=int(self.now()),
            exp=int(self.ring.expires_at),
            ohttp_keys=self.ring.ohttp_keys,
            receipt_key=bytes(32),
            engine=EngineStatement(ENGINE, "avx2"),
            models=(ModelStatement("demo", MODEL, "q8_0"),),
        ).encode()
        with self.device.launch(self.measurement, digest.digest()) as enclave:
            evidence = enclave.report(report_data(nonce, statement))
        items = {"statement": Item("application/json", statement), "launch": Item("application/json", launch)}
        return Document({**items, **evidence}).encode()


class Served:
    """An ASGI app on an ephemeral loopback port, in a thread."""

    def __init__(self, app: Any, *, port_of: Callable[[int], Any] | None = None) -> None:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.app = app if port_of is None else port_of(self.port)
        config = uvicorn.Config(
            self.app,
            log_config=None,
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            interface="asgi3",
            timeout_keep_alive=600,  # no client's idle connection is closed under its next request on a slow machine
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.002)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()


class Stage(Served):
    """One server for many tests, each of which shows its own app there: starting and stopping takes a while."""

    def __init__(self) -> None:
        self._shown: Asgi | None = None
        super().__init__(self._play)

    def show(self, app: Asgi) -> str:
        self._shown = app
        return self.url

    async def _play(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._shown is None or scope["type"] != "http":
            raise NotImplementedError
        await self._shown(scope, receive, send)


class Tampering:
    """Stands where the host stands: sees every sealed message whole, and may change it. `None` leaves it as it is."""

    def __init__(self, app: Asgi) -> None:
        self._app = app
        self.requests: list[bytes] = []
        self.responses: list[bytes] = []
        self.change_request: Callable[[bytes], bytes] | None = None
        self.change_response: Callable[[bytes], bytes] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        body = bytearray()
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.requests.append(bytes(body))
        changed = self.change_request(bytes(body)) if self.change_request else bytes(body)
        pending: list[Message] = [{"type": "http.request", "body": changed, "more_body": False}]

        async def changed_receive() -> Message:
            return pending.pop() if pending else await receive()

        answer = bytearray()

        async def collect(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
            else:
                answer.extend(message.get("body", b""))

        await self._app(scope, changed_receive, collect)
        self.responses.append(bytes(answer))
        changed = self.change_response(bytes(answer)) if self.change_response else bytes(answer)
        await send({"type": "http.response.body", "body": changed, "more_body": False})


class RecordingHop:
    """A TCP relay that keeps every byte that passes."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.seen = bytearray()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "RecordingHop":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _accept(self) -> None:
        pumps = []
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                break
            server = socket.create_connection(("127.0.0.1", self._target))
            for source, sink in ((client, server), (server, client)):
                pump = threading.Thread(target=self._pump, args=(source, sink), daemon=True)
                pump.start()
                pumps.append((pump, source))
        for pump, _ in pumps:
            pump.join()
        for _, source in pumps:
            source.close()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                self.seen += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return


def frames(message: bytes, head: int) -> list[bytes]:
    """A sealed message in its parts: the head of `head` bytes, each chunk with its length, the final mark and chunk."""
    parts, at = [message[:head]], head
    while at < len(message):
        size = 1 << (message[at] >> 6)
        length = int.from_bytes(message[at : at + size], "big") & ((1 << (8 * size - 2)) - 1)
        end = at + size + length if length else len(message)
        parts.append(message[at:end])
        at = end
    return parts
