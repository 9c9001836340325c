"""The host's HTTP API: bundles up, apps started, watched and stopped. JSON both ways; errors are problem details."""

import asyncio
import base64
import binascii
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any, get_args

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from cloister import __version__
from cloister.errors import CloisterError, WrongUse
from cloister.host.access import Access, ConsoleSessions
from cloister.host.backend import HostBackend
from cloister.host.bundles import Appending, Bundles
from cloister.host.fleet import Deployment, Fleet
from cloister.host.metrics import render
from cloister.host.page import Page
from cloister.host.problems import problem, problem_of
from cloister.host.resources import TIERS, Capacity, Resources
from cloister.host.store import Restart, Store

__all__ = ["Host", "create_host"]

_MAX_BODY = 1 << 20
_MAX_TOKEN = 4 << 10  # of the one body that strangers may send
_BLOCK = 1 << 20  # bytes handed to the disk at once
_IDLE = 30.0  # seconds in which a body must go on
_LONGEST_WAIT = 25.0  # seconds that a question for new log lines may stay open
_POLL = 0.25
_REMOVED = "removed"  # no token's digest


@dataclass(frozen=True, slots=True)
class Host:
    """What the API is a door to."""

    store: Store
    bundles: Bundles
    fleet: Fleet
    backend: HostBackend
    capacity: Capacity
    sessions: ConsoleSessions


def create_host(host: Host) -> Access:
    """An ASGI app. Every route but the few of `access.PUBLIC` asks for a token."""
    doors = _Doors(host)
    page = Page()

    async def file(request: Request) -> Response:
        return page.get(request.url.path)

    routes = [
        Route("/healthz", doors.healthz, methods=["GET"]),
        Route("/metrics", doors.metrics, methods=["GET"]),
        *(Route(path, file, methods=["GET"]) for path in page.paths),
        Route("/console/session", doors.begin_session, methods=["POST"]),
        Route("/v1/console", doors.console, methods=["POST"]),
        Route("/v1/host", doors.describe_host, methods=["GET"]),
        Route("/v1/uploads", doors.begin_upload, methods=["POST"]),
        Route("/v1/uploads/{sha256}", doors.upload, methods=["GET"]),
        Route("/v1/uploads/{sha256}", doors.append, methods=["PATCH"]),
        Route("/v1/apps", doors.apps, methods=["GET"]),
        Route("/v1/apps", doors.deploy, methods=["POST"]),
        Route("/v1/apps/{name}", doors.app, methods=["GET"]),
        Route("/v1/apps/{name}", doors.remove, methods=["DELETE"]),
        Route("/v1/apps/{name}/stop", doors.stop, methods=["POST"]),
        Route("/v1/apps/{name}/restart", doors.restart, methods=["POST"]),
        Route("/v1/apps/{name}/expiry", doors.expire, methods=["PUT"]),
        Route("/v1/apps/{name}/logs", doors.logs, methods=["GET"]),
        Route("/v1/apps/{name}/samples", doors.samples, methods=["GET"]),
    ]
    handlers: dict[Any, Callable[[Request, Any], Awaitable[Response]]] = {
        CloisterError: _failed,
        HTTPException: _refused,
        ClientDisconnect: _gone,
        TimeoutError: _slow,
    }
    return Access(Starlette(routes=routes, exception_handlers=handlers), host.store, host.sessions)


async def _failed(_request: Request, error: Any) -> Response:
    return problem_of(error)


async def _refused(_request: Request, error: Any) -> Response:
    kind = "NotFound" if error.status_code == 404 else "WrongUse"
    return problem(error.status_code, kind, str(error.detail), headers=error.headers)


async def _gone(_request: Request, _error: Any) -> Response:
    return Response(status_code=400)  # nobody is there to read it


async def _slow(_request: Request, _error: Any) -> Response:
    return problem(408, "WrongUse", "The request's body stood still for too long.")


class _Doors:
    """One method for each route; what may block runs in a thread."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def healthz(self, _request: Request) -> Response:
        return _json({"status": "ok"})

    async def metrics(self, _request: Request) -> Response:
        host = self._host
        text = await run_in_threadpool(lambda: render(host.fleet.all(), host.bundles.stored))
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def describe_host(self, _request: Request) -> Response:
        host = self._host
        stored = await run_in_threadpool(lambda: host.bundles.stored)
        return _json(
            {
                "version": __version__,
                "backend": host.backend.name,
                "platform": host.backend.platform,
                "memory_bytes": host.capacity.memory_bytes,
                "cores": len(host.capacity.cpus),
                "bundle_bytes": stored,
                "tiers": {name: asdict(tier) for name, tier in TIERS.items()},
            }
        )

    async def console(self, request: Request) -> Response:
        tokens = await run_in_threadpool(self._host.store.tokens)
        opener = next((one.sha256 for one in tokens if one.name == request.state.by), _REMOVED)
        return _json({"path": f"/console#{self._host.sessions.token(opener)}"})

    async def begin_session(self, request: Request) -> Response:
        session = self._host.sessions.begin(_text(await _object(request, _MAX_TOKEN), "token"))
        if session is None:
            return problem(
                401,
                "Unauthorized",
                "This address was used already, or is too old.",
                hint="cloister host console makes another.",
            )
        return _json({"session": session})

    async def begin_upload(self, request: Request) -> Response:
        asked = await _object(request)
        upload = await run_in_threadpool(self._host.bundles.begin, _text(asked, "sha256"), _integer(asked, "size"))
        return _json(asdict(upload))

    async def upload(self, request: Request) -> Response:
        return _json(asdict(await run_in_threadpool(self._host.bundles.state, request.path_params["sha256"])))

    async def append(self, request: Request) -> Response:
        sha256 = request.path_params["sha256"]
        with self._host.bundles.appending(sha256, _offset(request)) as sink:
            await _pour(request, sink)
        return _json(asdict(await run_in_threadpool(self._host.bundles.finish, sha256)))

    async def apps(self, _request: Request) -> Response:
        return _json({"apps": await run_in_threadpool(self._host.fleet.all)})

    async def deploy(self, request: Request) -> Response:
        wanted = _deployment(await _object(request))
        return _json(await run_in_threadpool(self._host.fleet.deploy, wanted, request.state.by), 201)

    async def app(self, request: Request) -> Response:
        return _json(await run_in_threadpool(self._host.fleet.describe, request.path_params["name"]))

    async def remove(self, request: Request) -> Response:
        await run_in_threadpool(self._host.fleet.remove, request.path_params["name"])
        return Response(status_code=204)

    async def stop(self, request: Request) -> Response:
        return _json(await run_in_threadpool(self._host.fleet.stop, request.path_params["name"]))

    async def restart(self, request: Request) -> Response:
        return _json(await run_in_threadpool(self._host.fleet.restart, request.path_params["name"]))

    async def expire(self, request: Request) -> Response:
        at = _time(await _object(request), "expires_at")
        return _json(await run_in_threadpool(self._host.fleet.expire, request.path_params["name"], at))

    async def logs(self, request: Request) -> Response:
        """Lines after `after`; with `wait` (seconds), the answer waits for one."""
        name = request.path_params["name"]
        after, wait = _query(request, "after", 0), min(_query(request, "wait", 0), _LONGEST_WAIT)
        until = time.monotonic() + wait
        while True:
            await run_in_threadpool(self._host.store.app, name)
            lines = await run_in_threadpool(self._host.store.lines, name, after=after)
            if lines or time.monotonic() >= until:
                return _json({"lines": [asdict(line) for line in lines]})
            await asyncio.sleep(_POLL)

    async def samples(self, request: Request) -> Response:
        name = request.path_params["name"]
        await run_in_threadpool(self._host.store.app, name)
        found = await run_in_threadpool(self._host.store.samples, name)
        return _json({"samples": [asdict(sample) for sample in found]})


# Bodies


async def _pour(request: Request, sink: Appending) -> None:
    """The body into the sink, a block at a time, while the next one arrives. What arrived of one that breaks off is kept."""
    blocks = _blocks(request)
    writing: asyncio.Task[None] | None = None
    try:
        async for block in blocks:
            if writing is not None:
                await writing
            writing = asyncio.create_task(run_in_threadpool(_write, sink, block))
    finally:
        if writing is not None:
            await writing


def _write(sink: Appending, block: list[bytes]) -> None:
    for piece in block:
        sink.write(piece)


async def _blocks(request: Request) -> AsyncIterator[list[bytes]]:
    pieces: list[bytes] = []
    size = 0
    stream = request.stream()
    try:
        while True:
            async with asyncio.timeout(_IDLE):
                piece = await anext(stream, None)
            if piece is None:
                break
            pieces.append(piece)
            size += len(piece)
            if size >= _BLOCK:
                yield pieces
                pieces, size = [], 0
    except ClientDisconnect:
        yield pieces
        raise
    except TimeoutError:
        yield pieces
        raise WrongUse("The upload stood still for too long.", hint="Try again: it goes on.", step="upload") from None
    yield pieces


async def _object(request: Request, most: int = _MAX_BODY) -> dict[str, Any]:
    """Raises: WrongUse for what is no JSON object, or a large one."""
    body = bytearray()
    async with asyncio.timeout(_IDLE):
        async for piece in request.stream():
            body += piece
            if len(body) > most:
                raise WrongUse("The request's body is too large.", expected=f"at most {most} bytes")
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise WrongUse("The request's body is no JSON object.", step="request")
    return found


def _deployment(asked: dict[str, Any]) -> Deployment:
    restart = asked.get("restart", "always")
    if restart not in get_args(Restart):
        raise _wrong("restart", " or ".join(get_args(Restart)))
    return Deployment(
        name=_text(asked, "name"),
        launch=_bytes(asked, "launch"),
        config=_bytes(asked, "config"),
        bundle=_text(asked, "bundle") if asked.get("bundle") is not None else None,
        model=_text(asked, "model") if asked.get("model") is not None else None,
        resources=Resources(_integer(asked, "memory_bytes"), _integer(asked, "cores")),
        expires_at=_time(asked, "expires_at"),
        restart=restart,
        replace=asked.get("replace") is True,
    )


def _wrong(name: str, expected: str) -> WrongUse:
    return WrongUse(f"The request's {name!r} is missing, or of the wrong kind.", step="request", expected=expected)


def _text(asked: dict[str, Any], name: str) -> str:
    value = asked.get(name)
    if not isinstance(value, str) or len(value) > 4096:
        raise _wrong(name, "a string")
    return value


def _integer(asked: dict[str, Any], name: str) -> int:
    value = asked.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 53:
        raise _wrong(name, "a whole number")
    return value


def _time(asked: dict[str, Any], name: str) -> float | None:
    value = asked.get(name)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e11:
        raise _wrong(name, "Unix seconds, or null")
    return float(value)


def _bytes(asked: dict[str, Any], name: str) -> bytes:
    value = asked.get(name)
    try:
        return base64.b64decode(value if isinstance(value, str) else "!", validate=True)
    except (binascii.Error, ValueError) as error:
        raise _wrong(name, "Base64") from error


def _offset(request: Request) -> int:
    text = request.headers.get("upload-offset", "")
    if not text.isdecimal() or len(text) > 15:
        raise WrongUse("The header Upload-Offset says where the body begins.", step="upload", expected="bytes")
    return int(text)


def _query(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name, str(default))
    if not text.isdecimal() or len(text) > 15:
        raise _wrong(name, "a whole number")
    return int(text)


def _json(value: Any, status: int = 200) -> JSONResponse:
    return JSONResponse(value, status, headers={"cache-control": "no-store"})
