"""Which status, code and words each error becomes, in each dialect. No message repeats what a client sent."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cloister.errors import (
    CloisterError,
    ContextLengthExceeded,
    EngineDied,
    EngineLoading,
    MalformedModel,
    QueueFull,
    Unauthorized,
    WrongUse,
)

__all__ = ["ANTHROPIC", "DIALECTS", "OPENAI", "Dialect", "Problem", "Refused", "problem", "retry_after"]

SERVER_ERROR = "server_error"
INVALID_REQUEST = "invalid_request_error"
RESTART = 2
"""Seconds after which an engine that loads, or is being restarted, is worth another try."""


class Refused(WrongUse):
    """The API says no: `status` and `code` as OpenAI's clients know them, `param` the field at fault."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = headers


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as it goes out."""

    status: int
    code: str
    message: str
    kind: str = INVALID_REQUEST
    param: str | None = None
    headers: tuple[tuple[bytes, bytes], ...] = ()
    extra: tuple[tuple[str, int | float], ...] = ()

    def encode(self) -> bytes:
        error: dict[str, Any] = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error | dict(self.extra)}, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one family of clients is told of errors. `id_header`: where it looks for a request's id; empty: nowhere."""

    name: str
    body: Callable[[Problem, str], bytes]
    """An error's JSON, given the request's id."""
    statuses: Mapping[int, int]
    """Its own number for a status."""
    id_header: bytes = b""

    def status(self, found: Problem) -> int:
        return self.statuses.get(found.status, found.status)


def _openai_body(found: Problem, _request_id: str) -> bytes:
    return found.encode()


ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}


def _anthropic_body(found: Problem, request_id: str) -> bytes:
    status = ANTHROPIC.status(found)
    kind = ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else INVALID_REQUEST)
    error = {"type": kind, "message": found.message}
    return json.dumps({"type": "error", "error": error, "request_id": request_id}, separators=(",", ":")).encode()


OPENAI = Dialect("openai", _openai_body, {})
ANTHROPIC = Dialect("anthropic", _anthropic_body, {503: 529}, b"request-id")
"""https://docs.anthropic.com/en/api/errors: what is too busy, or not there yet, is 529."""
DIALECTS = (OPENAI, ANTHROPIC)


def retry_after(seconds: int) -> tuple[tuple[bytes, bytes], ...]:
    return ((b"retry-after", str(seconds).encode()),)


def problem(error: Exception, prompt_field: str = "messages") -> Problem:
    """What the client is told. Anything that is not cloister's own error becomes a bare 500.

    `prompt_field`: where the route's requests hold the prompt.
    """
    match error:
        case Refused():
            kind = INVALID_REQUEST if error.status < 500 else SERVER_ERROR
            return Problem(error.status, error.code, error.message, kind, error.param, error.headers)
        case ContextLengthExceeded():
            counts = (("limit", error.limit), ("prompt_tokens", error.prompt), ("requested_tokens", error.requested))
            return Problem(400, "context_length_exceeded", error.message, param=prompt_field, extra=counts)
        case Unauthorized():
            return Problem(401, "invalid_api_key", error.message, headers=((b"www-authenticate", b"Bearer"),))
        case QueueFull():
            return Problem(429, "queue_full", error.message, "rate_limit_error", headers=retry_after(error.retry_after))
        case CloisterError():
            return _engine_problem(error, prompt_field)
    return Problem(500, "internal_error", "Something failed inside the enclave.", SERVER_ERROR)


def _engine_problem(error: CloisterError, prompt_field: str) -> Problem:
    match error:
        case EngineLoading():
            progress = round(error.progress, 3)
            message = f"The model is loading ({progress:.0%})."
            return Problem(
                503,
                "model_loading",
                message,
                SERVER_ERROR,
                headers=retry_after(RESTART),
                extra=(("progress", progress),),
            )
        case EngineDied():
            message = "The engine stopped while answering and is being restarted."
            return Problem(503, "engine_died", message, SERVER_ERROR, headers=retry_after(RESTART))
        case MalformedModel():
            # The template's own words may quote the messages it was given, so they stay inside.
            message = "The model's chat template refused these messages, or took too long over them."
            return Problem(400, "chat_template_failed", message, param=prompt_field)
        case WrongUse():
            return Problem(400, "invalid_request", error.message)
    return Problem(500, "internal_error", "Something failed inside the enclave.", SERVER_ERROR)
