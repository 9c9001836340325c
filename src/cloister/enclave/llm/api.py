"""The ASGI app inside the sealed channel: a table of routes, each behind the tenants' keys unless it says otherwise."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.types import Receive, Scope, Send

from cloister.enclave.llm import anthropic, catalogue, embeddings, openai, openapi, original, responses, sse, tokens
from cloister.enclave.llm.connection import ClientGone, Reply
from cloister.enclave.llm.engine import Engine
from cloister.enclave.llm.envelope import ANTHROPIC, OPENAI, Dialect, Problem, Refused, problem
from cloister.enclave.llm.metrics import Metrics
from cloister.enclave.llm.queue import Queue
from cloister.enclave.llm.service import ApiConfig, Call, Service
from cloister.errors import CloisterError, EngineDied, WrongUse

__all__ = ["ROUTES", "Api", "ApiConfig", "Route", "create_api"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Route:
    """`path` ending in `/` stands for everything below it. `keyless` routes hold no user's data.

    `dialect`: how its callers are told of errors; None: as each of them seems to speak.
    """

    method: str
    path: str
    handler: Callable[[Call], Awaitable[None]]
    keyless: bool = False
    dialect: Dialect | None = OPENAI
    waits: bool = True
    """Whether it first waits for an engine that is being restarted."""

    def covers(self, path: str) -> bool:
        if self.path.endswith("/"):
            return path.startswith(self.path) and path != self.path
        return path == self.path


async def describe(call: Call) -> None:
    """The OpenAPI document of all routes."""
    entries = [openapi.Entry(route.method, route.path, route.dialect, keyless=route.keyless) for route in ROUTES]
    await call.reply.json(200, sse.compact(openapi.document(entries)).encode("ascii"))


ROUTES = (
    Route("POST", "/v1/chat/completions", openai.chat_completions),
    Route("POST", "/v1/completions", openai.completions),
    Route("POST", "/v1/embeddings", embeddings.embeddings),
    Route("POST", "/v1/responses", responses.responses),
    Route("POST", "/v1/messages", anthropic.messages, dialect=ANTHROPIC),
    Route("POST", "/v1/messages/count_tokens", anthropic.count_tokens, dialect=ANTHROPIC),
    Route("GET", "/v1/openapi.json", describe, waits=False),
    Route("GET", "/v1/models", catalogue.models, dialect=None),
    Route("GET", catalogue.MODELS_PATH, catalogue.model, dialect=None),
    Route("POST", "/tokenize", tokens.tokenize),
    Route("POST", "/detokenize", tokens.detokenize),
    Route("POST", "/generate", original.generate),
    Route("GET", "/generate", original.generate_from_query),
    Route("GET", "/health", original.health, keyless=True, waits=False),
)


class Api:
    """Failures become the error envelope of the route's dialect. Once a stream runs, one is told as an event and then raised, so that
    the server aborts the response and nobody takes a short answer for a whole one.

    Nothing of a request is logged; of an unexpected error, its type and place.
    """

    def __init__(self, engine: Engine, config: ApiConfig) -> None:
        self._service = Service(engine, config)

    @property
    def metrics(self) -> Metrics:
        return self._service.metrics

    @property
    def queue(self) -> Queue:
        return self._service.queue

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise WrongUse("the API speaks HTTP only")
        reply = Reply(send, _dialect(scope))
        self.metrics.requests += 1
        try:
            call = Call(self._service, scope, receive, reply)
            failure = await self._failure(call)
            if failure is not None and not reply.finished:
                await self._tell(reply, problem(failure, call.prompt_field))
        except ClientGone:
            self.metrics.cancelled += 1
        except asyncio.CancelledError:
            self.metrics.cancelled += 1
            raise
        finally:
            if reply.status is not None:
                self.metrics.responses[reply.status] += 1

    async def _failure(self, call: Call) -> Exception | None:
        """Serves the call. An error is returned, so that what is raised later has no context that could quote it."""
        try:
            await self._serve(call)
        except ClientGone:
            raise
        except CloisterError as error:
            return error
        except Exception as error:  # noqa: BLE001 - the process's edge: whatever it is, the client learns nothing of it
            log.error("unexpected %s at %s", type(error).__name__, _place(error))
            return error
        return None

    async def _serve(self, call: Call) -> None:
        route, allowed = _find(call.method, call.path)
        if route is None or not route.keyless:
            call.principal = self._service.tenants.identify(call.headers)
        if route is not None:
            if route.waits:
                await self._service.recovered()
            await route.handler(call)
        elif allowed:
            message = f"This route takes {' and '.join(allowed)} only."
            raise Refused(405, "method_not_allowed", message, headers=((b"allow", ", ".join(allowed).encode()),))
        else:
            raise Refused(404, "unknown_url", "There is no such route.")

    async def _tell(self, reply: Reply, failure: Problem) -> None:
        streaming = reply.status is not None
        await reply.problem(failure)
        if streaming:
            self.metrics.broken += 1
            raise EngineDied("the answer broke off")


def create_api(engine: Engine, config: ApiConfig) -> Api:
    """The ASGI app that stands inside the gateway. It neither starts nor closes the engine."""
    return Api(engine, config)


def _find(method: str, path: str) -> tuple[Route | None, tuple[str, ...]]:
    """The route, and which methods the path has."""
    there = [route for route in ROUTES if route.covers(path)]
    return next((route for route in there if route.method == method), None), tuple(route.method for route in there)


def _dialect(scope: Scope) -> Dialect:
    """The path's; where it has none of its own, what the caller seems to speak."""
    there = next((route.dialect for route in ROUTES if route.covers(scope["path"])), None)
    if there is not None:
        return there
    return ANTHROPIC if any(name == b"anthropic-version" for name, _ in scope["headers"]) else OPENAI


def _place(error: Exception) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "?" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
