"""The opened request, as the app inside sees it."""

import json
from collections.abc import MutableMapping, Sequence
from typing import Any
from urllib.parse import unquote

from cloister.channel import bhttp
from cloister.channel.freshness import check_date, http_date
from cloister.channel.ohttp import AUTHORITY
from cloister.enclave.gateway.problems import DATE_TYPE
from cloister.errors import ClockSkew, MalformedMessage

__all__ = ["Fields", "date_problem", "failure", "is_timely", "scope_of"]


Fields = Sequence[tuple[bytes, bytes]]


def scope_of(request: bhttp.Request, state: MutableMapping[str, Any] | None) -> dict[str, Any]:
    """The ASGI scope. Nothing of the outer request is in it: no address of a client, no outer header. The authority is
    `enclave.invalid`, but for requests by TLS, which name the enclave as their client does."""
    raw_path, _, query = request.path.partition("?")
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": request.method.upper(),
        "scheme": "https",
        "path": unquote(raw_path),
        "raw_path": raw_path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": _headers(request),
        "client": None,
        "server": (AUTHORITY, 443),
    }
    if state is not None:
        scope["state"] = state
    return scope


def is_timely(request: bhttp.Request, now: float) -> bool:
    """Whether the inner `Date`, if there is one, is a date and within tolerance."""
    try:
        check_date(request.headers, now)
    except (ClockSkew, MalformedMessage):
        return False
    return True


def date_problem(now: float) -> tuple[int, Fields, bytes]:
    body = json.dumps({"type": DATE_TYPE, "title": "The request's Date is missing or too far off.", "status": 400})
    return 400, [(b"content-type", b"application/problem+json"), (b"date", http_date(now))], body.encode()


def failure() -> tuple[int, Fields, bytes]:
    """Said, sealed, when the inner app broke before it answered: OpenAI's error shape, and no detail."""
    error = {"message": "The app inside failed.", "type": "server_error", "param": None, "code": "internal_error"}
    return 500, [(b"content-type", b"application/json")], json.dumps({"error": error}).encode()


def _headers(request: bhttp.Request) -> list[tuple[bytes, bytes]]:
    fields = [field for field in request.headers if field[0] not in (b"host", b"content-length")]
    fields.append((b"host", request.authority.encode("latin-1")))
    if request.content:
        fields.append((b"content-length", str(len(request.content)).encode()))
    return fields
