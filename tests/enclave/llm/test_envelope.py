import json

import pytest

from cloister.enclave.llm.envelope import Refused, problem
from cloister.errors import (
    ConnectionFailed,
    ContextLengthExceeded,
    EngineDied,
    EngineLoading,
    MalformedModel,
    QueueFull,
    Unauthorized,
    WrongUse,
)


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (Refused(404, "model_not_found", "m", param="model"), 404, "invalid_request_error", "model_not_found"),
        (Refused(503, "queue_timeout", "m"), 503, "server_error", "queue_timeout"),
        (
            ContextLengthExceeded(limit=1, prompt=2, requested=3),
            400,
            "invalid_request_error",
            "context_length_exceeded",
        ),
        (Unauthorized("m"), 401, "invalid_request_error", "invalid_api_key"),
        (QueueFull("m", retry_after=3), 429, "rate_limit_error", "queue_full"),
        (EngineLoading("m", progress=0.5), 503, "server_error", "model_loading"),
        (EngineDied("m"), 503, "server_error", "engine_died"),
        (MalformedModel("m"), 400, "invalid_request_error", "chat_template_failed"),
        (WrongUse("m"), 400, "invalid_request_error", "invalid_request"),
        (ConnectionFailed("m"), 500, "server_error", "internal_error"),
        (RuntimeError("m"), 500, "server_error", "internal_error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_each_error_has_its_status_type_and_code(error: Exception, status: int, kind: str, code: str) -> None:
    found = problem(error)
    body = json.loads(found.encode())["error"]
    assert (found.status, body["type"], body["code"]) == (status, kind, code)
    assert {"message", "type", "param", "code"} <= set(body)


@pytest.mark.parametrize("error", [ContextLengthExceeded(limit=1, prompt=2, requested=3), MalformedModel("m")])
def test_what_is_wrong_with_a_prompt_names_the_routes_own_field(error: Exception) -> None:
    assert (problem(error).param, problem(error, "query").param) == ("messages", "query")


@pytest.mark.parametrize("error", [QueueFull("m", retry_after=3), EngineLoading("m"), EngineDied("m")])
def test_what_may_pass_says_when_to_come_back(error: Exception) -> None:
    assert int(dict(problem(error).headers)[b"retry-after"]) > 0


@pytest.mark.parametrize("error", [RuntimeError("CANARY"), ConnectionFailed("CANARY"), EngineDied("CANARY")])
def test_errors_within_keep_their_words_to_themselves(error: Exception) -> None:
    assert b"CANARY" not in problem(error).encode()
