"""The proxy's own errors, as the caller's API words them: Anthropic's on Anthropic's routes, OpenAI's elsewhere.

Beside what each API knows stands what a person needs: a hint, and of a verification that failed each factor with what was
expected and what was found, and the lines of a policy that would accept it.
"""

from typing import Any, Literal, TypeAlias

from cloister.client.policy_change import policy_change
from cloister.errors import (
    ChannelBroken,
    CloisterError,
    Malformed,
    NotTrusted,
    PlaintextRefused,
    TruncatedResponse,
    Unreachable,
    VerificationFailed,
    WrongUse,
)
from cloister.proxy.guard import Refusal
from cloister.proxy.reply import Reply, json_reply
from cloister.verify import Factor

__all__ = ["Dialect", "code_of", "dialect_of", "envelope", "failure", "refusal"]

Dialect: TypeAlias = Literal["openai", "anthropic"]

# The most special first. None is retried by an SDK: the enclave may have run the request.
_CODES: tuple[tuple[type[CloisterError], int, str], ...] = (
    (VerificationFailed, 502, "enclave_not_trusted"),
    (TruncatedResponse, 502, "answer_truncated"),
    (PlaintextRefused, 502, "plaintext_refused"),
    (ChannelBroken, 502, "channel_broken"),
    (NotTrusted, 502, "enclave_not_trusted"),
    (Malformed, 502, "malformed"),
    (Unreachable, 502, "enclave_unreachable"),
    (WrongUse, 400, "wrong_use"),
)
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
}
"""Anthropic's; of the others, 5xx is `api_error` and 4xx `invalid_request_error`."""


def dialect_of(scope: dict[str, Any]) -> Dialect:
    """By the route; on the one that both have (/v1/models), by the header that Anthropic's clients always send."""
    path = scope["path"]
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return "anthropic"
    shared = path == "/v1/models" or path.startswith("/v1/models/")
    return "anthropic" if shared and any(name == b"anthropic-version" for name, _ in scope["headers"]) else "openai"


def code_of(error: CloisterError) -> tuple[int, str]:
    """Status and code."""
    if isinstance(error, WrongUse) and error.step == "size":
        return 413, "too_large"
    return next(((status, code) for kind, status, code in _CODES if isinstance(error, kind)), (500, "internal_error"))


def refusal(refused: Refusal, dialect: Dialect, *more: tuple[bytes, bytes]) -> Reply:
    said = {"message": refused.message, "code": refused.code, "hint": refused.hint}
    return json_reply(refused.status, _envelope(refused.status, said, dialect), *refused.headers, *more)


def failure(error: CloisterError, dialect: Dialect) -> Reply:
    return json_reply(code_of(error)[0], envelope(error, dialect))


def envelope(error: CloisterError, dialect: Dialect = "openai") -> dict[str, Any]:
    status, code = code_of(error)
    said: dict[str, Any] = {"message": error.message, "code": code, "hint": error.hint}
    said |= {"step": error.step, "expected": error.expected, "got": error.got}
    if isinstance(error, VerificationFailed):
        factors = [factor for factor in error.factors if isinstance(factor, Factor)]
        said["factors"] = [factor.to_json() for factor in factors if factor.verdict == "fail"]
        said["policy_change"] = policy_change(factors)
    return _envelope(status, said, dialect)


def _envelope(status: int, said: dict[str, Any], dialect: Dialect) -> dict[str, Any]:
    if dialect == "anthropic":
        kind = _TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, **said}}
    return {"error": {"message": said["message"], "type": "proxy_error", "param": None, **said}}
