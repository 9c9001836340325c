"""What an error becomes on the host's API: RFC 9457 problem details, and the error's own class and words."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from cloister.errors import (
    CloisterError,
    Conflict,
    HostFull,
    Malformed,
    NotFound,
    Unauthorized,
    WrongUse,
)

__all__ = ["problem", "problem_of"]

_STATUS: tuple[tuple[type[CloisterError], int], ...] = (  # the first that fits
    (Unauthorized, 401),
    (NotFound, 404),
    (Conflict, 409),
    (Malformed, 422),
    (HostFull, 507),
    (WrongUse, 400),
)


def problem(
    status: int, error: str, detail: str, *, headers: Mapping[str, str] | None = None, **more: Any
) -> JSONResponse:
    """`error`: the name of a class of `cloister.errors`. `more`: its hint, step, expected and got, where it has them."""
    told = {"type": "about:blank", "status": status, "error": error, "detail": detail}
    told |= {name: value for name, value in more.items() if value}
    sent = {"cache-control": "no-store", **(headers or {})}
    return JSONResponse(told, status, media_type="application/problem+json", headers=sent)


def problem_of(error: CloisterError) -> JSONResponse:
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
    return problem(
        status,
        type(error).__name__,
        error.message,
        hint=error.hint,
        step=error.step,
        expected=error.expected,
        got=error.got,
    )
