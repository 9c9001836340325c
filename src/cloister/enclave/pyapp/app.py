"""The front's side of a Python app: its process, and the ASGI app that hands requests over to it."""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import sys
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from starlette.types import Receive, Scope, Send

from cloister.enclave.pyapp import wire
from cloister.enclave.pyapp.egress import Dial, Egress, Target, dial, parse_targets
from cloister.enclave.pyapp.words import Tell, Words
from cloister.errors import EngineDied, QueueFull, WrongUse

__all__ = ["AppConfig", "PythonApp", "can_confine"]

_START = (
    "import sys, types; sys.pycache_prefix = '/dev/null'; own = sys.argv.pop(1)\n"
    "for name, path in (('cloister', []), ('cloister.enclave', []), ('cloister.enclave.pyapp', [own])):\n"
    "    sys.modules[name] = types.ModuleType(name); sys.modules[name].__path__ = path\n"
)
"""Isolated, without `site`, and of our package with these modules alone: what the app imports are the standard library, its
packages and its code."""
_RUN = _START + "from cloister.enclave.pyapp.child import main; main()"
_PROBE = (
    _START + "from cloister.enclave.pyapp.confinement import confine, drop_privileges\n"
    "confine(memory=None); drop_privileges()"
)
_OWN = str(Path(__file__).parent)
_START_SECONDS = 120.0
_STOP_SECONDS = 5.0
_LAST_WORDS_SECONDS = 1.0
_CRASH_WINDOW = 60.0
_CRASH_LOOP = 5
_LONGEST_DELAY = 30.0
_MOST_REQUESTS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class AppConfig:
    """`files`: section -> descriptor of its plaintext in memory, which stays the caller's. `confined`: the process must have
    a view of its own of files and network, or it does not run; then `egress` ("host", "host:port") is all that it reaches, and
    else anything. `memory` in MiB."""

    kind: Literal["asgi", "wsgi"]
    entry: str
    files: Mapping[str, int]
    confined: bool
    model: str = ""
    egress: tuple[str, ...] = ()
    memory: int | None = None
    cores: int | None = None
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    settings: Mapping[str, str] = field(default_factory=dict, repr=False)


async def can_confine() -> bool:
    """Whether this machine gives a process a view of its own: tried out, in a process that ends at once."""
    probe = await asyncio.create_subprocess_exec(*_argv(_PROBE), **_QUIET)
    return await probe.wait() == 0


def _argv(code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-B", "-c", code, _OWN]


_QUIET: dict[str, Any] = {
    "env": {"LANG": "C.UTF-8"},
    "stdin": asyncio.subprocess.DEVNULL,
    "stdout": asyncio.subprocess.DEVNULL,
    "stderr": asyncio.subprocess.DEVNULL,  # a traceback's words could quote a request
}

_PUBLIC: dict[str, Any] = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.STDOUT}


class PythonApp:
    """An ASGI app that runs in a process of its own, started again when it dies. `tell`: where its own words go, if it
    publishes them; without it they go nowhere. `dial`: what its connections are made by."""

    def __init__(self, config: AppConfig, tell: Tell | None = None, dial: Dial = dial) -> None:
        self._config = config
        self._tell = tell
        self._dial = dial
        self._running: _Running | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._requests = 0

    @property
    def ready(self) -> bool:
        return self._running is not None

    @property
    def pid(self) -> int:
        """The process that serves now; 0 when there is none."""
        return self._running.process.pid if self._running is not None else 0

    async def start(self) -> None:
        """Returns when the app has been imported and its lifespan has begun.

        Raises: WrongUse when it cannot start or be confined; EngineDied when that takes too long; OSError when the machine
        has no room for it.
        """
        self._running = await _Running.start(self._config, self._tell, self._dial)
        self._keeper = asyncio.create_task(self._keep())

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
            self._keeper = None
        if self._running is not None:
            running, self._running = self._running, None
            await running.stop()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises: EngineDied when the answer broke off, QueueFull."""
        if scope["type"] != "http":
            raise WrongUse("An app inside speaks HTTP only.")
        if self._running is None:
            raise EngineDied("The app is being started again.", hint="Try again in a moment.")
        if self._requests >= _MOST_REQUESTS:
            raise QueueFull("Too many requests run at once.")
        self._requests += 1
        try:
            await self._exchange(self._running.hand_over(), scope, receive, send)
        finally:
            self._requests -= 1

    async def _exchange(self, sock: socket.socket, scope: Scope, receive: Receive, send: Send) -> None:
        reader, writer = await asyncio.open_connection(sock=sock)
        asking = asyncio.create_task(_ask(writer, scope, receive))
        try:
            await _answer(reader, send)
        finally:
            asking.cancel()
            await asyncio.wait([asking])
            writer.close()

    async def _keep(self) -> None:
        """Starts the app again whenever it has died; ever later when it dies too often."""
        crashes: deque[float] = deque(maxlen=_CRASH_LOOP)
        loop = asyncio.get_running_loop()
        while self._running is not None:
            await self._running.process.wait()
            dead, self._running = self._running, None
            try:
                await dead.stop()
            except asyncio.CancelledError:
                await dead.stop()  # nobody else knows of it, and what it leaves holds code and secrets
                raise
            while self._running is None:
                crashes.append(loop.time())
                often = len(crashes) == _CRASH_LOOP and loop.time() - crashes[0] < _CRASH_WINDOW
                await asyncio.sleep(_LONGEST_DELAY if often else 0.1 * len(crashes))
                with contextlib.suppress(WrongUse, EngineDied, OSError):  # the last: there is no room for it just now
                    self._running = await _Running.start(self._config, self._tell, self._dial)


async def _ask(writer: asyncio.StreamWriter, scope: Scope, receive: Receive) -> None:
    with contextlib.suppress(OSError):
        writer.write(wire.frame(wire.REQUEST, wire.encode_scope(scope)))
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            writer.write(wire.frames(message.get("body", b"")))
            await writer.drain()
            more = message.get("more_body", False)
        writer.write(wire.frame(wire.END))
        await writer.drain()


async def _answer(reader: asyncio.StreamReader, send: Send) -> None:
    while found := await wire.read(reader):
        kind, payload = found
        if kind == wire.HEAD:
            try:
                status, headers = wire.decode_head(payload)
            except (ValueError, KeyError, TypeError):
                break
            await send({"type": "http.response.start", "status": status, "headers": headers})
        elif kind == wire.BODY:
            await send({"type": "http.response.body", "body": payload, "more_body": True})
        else:
            await send({"type": "http.response.body", "body": b""})
            return
    raise EngineDied("The app's answer broke off.")


@dataclass(slots=True)
class _Running:
    """One process, and this side's ends of its two sockets."""

    process: asyncio.subprocess.Process
    events: socket.socket
    requests: socket.socket
    folder: str
    egress: Egress
    telling: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, config: AppConfig, tell: Tell | None, dial: Dial) -> "_Running":
        """Raises: WrongUse, EngineDied, OSError."""
        targets = parse_targets(config.egress) if config.confined else ()
        events, their_events = socket.socketpair()
        requests, their_requests = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        folder = "" if config.confined else tempfile.mkdtemp(prefix=f"cloister-app-{os.getpid()}-", dir="/dev/shm")
        try:
            with their_events, their_requests:
                given = (their_events.fileno(), their_requests.fileno())
                process = await asyncio.create_subprocess_exec(
                    *_argv(_RUN),
                    *map(str, given),
                    pass_fds=(*given, *config.files.values()),
                    **(_QUIET if tell is None else _QUIET | _PUBLIC),
                )
        except BaseException:
            events.close()
            requests.close()
            if folder:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        running = cls(process, events, requests, folder, Egress(dial))
        if tell is not None and process.stdout is not None:
            running.telling = asyncio.create_task(_pass_on(process.stdout, tell))
        try:
            events.settimeout(0)
            requests.settimeout(0)
            async with asyncio.timeout(_START_SECONDS):
                await running.begin(config, targets)
        except BaseException as error:
            await running.stop()
            if isinstance(error, TimeoutError):
                hint = "Try it with `cloister test`."
                raise EngineDied("The app did not start in time.", step="app", hint=hint) from None
            raise
        return running

    async def begin(self, config: AppConfig, targets: Sequence[Target]) -> None:
        setup = json.dumps(
            {
                "kind": config.kind,
                "entry": config.entry,
                "files": dict(config.files),
                "confined": config.confined,
                "folder": self.folder,
                "model": config.model,
                "ways": [(target.address, target.port, target.host) for target in targets],
                "memory": config.memory,
                "cores": config.cores,
                "secrets": dict(config.secrets),
                "settings": dict(config.settings),
            }
        ).encode()
        with contextlib.suppress(OSError):
            await asyncio.get_running_loop().sock_sendall(self.events, len(setup).to_bytes(4, "big") + setup)
        event = await self._next_event()
        if targets and event.get("event") == "confined":
            await self._let_out(targets)
            event = await self._next_event()
        if event.get("event") != "ready":
            raise _failure(event)

    async def _next_event(self) -> dict[str, Any]:
        """What it says next; nothing, when it has ended."""
        told = b""
        with contextlib.suppress(OSError, ValueError):
            while not told.endswith(b"\n") and (more := await asyncio.get_running_loop().sock_recv(self.events, 1)):
                told += more
            event = json.loads(told)
            return event if isinstance(event, dict) else {}
        return {}

    async def _let_out(self, targets: Sequence[Target]) -> None:
        """What it has sent before it said so: a listener for each target. Raises: WrongUse."""
        listeners: list[socket.socket] = []
        try:
            handed = socket.recv_fds(self.requests, 1, len(targets))[1]
            listeners = [socket.socket(fileno=descriptor) for descriptor in handed]
            await self.egress.serve(targets, listeners)
        except (OSError, ValueError) as error:
            for listener in listeners:
                listener.close()
            raise WrongUse("The app's connections cannot be taken.", step="egress") from error

    def hand_over(self) -> socket.socket:
        """This side's end of a request's socket. Raises: QueueFull, EngineDied."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self.requests, [b"r"], [theirs.fileno()])
            except OSError as error:
                ours.close()
                if isinstance(error, BlockingIOError):
                    raise QueueFull("Too many requests wait for the app.") from None
                raise EngineDied("The app is being started again.") from None
        ours.settimeout(0)
        return ours

    async def stop(self) -> None:
        """Asks by closing, then kills."""
        self.requests.close()
        self.events.close()
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await self.process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()
        await self.egress.close()
        if self.telling is not None:  # a program that it started may hold the pipe
            await asyncio.wait([self.telling], timeout=_LAST_WORDS_SECONDS)
            self.telling.cancel()
        if self.folder:
            await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)


async def _pass_on(stream: asyncio.StreamReader, tell: Tell) -> None:
    """Until it ends. Everything is read, told or not: an app must not stand still because it says too much."""
    loop = asyncio.get_running_loop()
    words = Words(loop.time())
    while data := await stream.read(1 << 16):
        for line in words.feed(data, loop.time()):
            tell(line)
    for line in words.end(loop.time()):
        tell(line)


def _failure(event: Mapping[str, Any]) -> WrongUse:
    """In words, of what the child told: its exception's class and place, no more."""
    kind, place, name = (str(event.get(key, ""))[:200] for key in ("error", "place", "name"))
    what = (f"{kind}: {name}" if name else kind or "it ended") + (f", {place}" if place else "")
    hint = "Try it with `cloister test`."
    if kind == "ModuleNotFoundError":
        hint = "Is it in the app's folder, or among its requirements?"
    elif kind in ("OSError", "PermissionError") and not place:
        hint = "This machine gives the app no view of its own of files and network."
    return WrongUse(f"The app could not start ({what}).", step="app", hint=hint)
