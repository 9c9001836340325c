"""/v1/models: the one model, in the shape that the caller's dialect knows."""

from datetime import UTC, datetime
from typing import Any

from cloister.enclave.llm import sse
from cloister.enclave.llm.engine import EngineInfo
from cloister.enclave.llm.envelope import ANTHROPIC
from cloister.enclave.llm.service import Call

__all__ = ["MODELS_PATH", "model", "models"]

MODELS_PATH = "/v1/models/"


async def models(call: Call) -> None:
    """One page, whatever page was asked for."""
    told = _told(call, call.service.serving())
    if call.reply.dialect is ANTHROPIC:
        page: dict[str, Any] = {"data": [told], "has_more": False, "first_id": told["id"], "last_id": told["id"]}
    else:
        page = {"object": "list", "data": [told]}
    await call.reply.json(200, sse.compact(page).encode("ascii"))


async def model(call: Call) -> None:
    """By its name, which may hold slashes, or by its alias."""
    info = call.service.serving(call.path.removeprefix(MODELS_PATH))
    await call.reply.json(200, sse.compact(_told(call, info)).encode("ascii"))


def _told(call: Call, info: EngineInfo) -> dict[str, Any]:
    told = _anthropic(info) if call.reply.dialect is ANTHROPIC else _openai(info)
    own = {
        "sha256": info.model.sha256,
        "quantization": info.model.quantization,
        "context_length": info.model.context_length,
    }
    return told | own


def _openai(info: EngineInfo) -> dict[str, Any]:
    return {"id": info.model.name, "object": "model", "created": info.model.created, "owned_by": "cloister"}


def _anthropic(info: EngineInfo) -> dict[str, Any]:
    created = datetime.fromtimestamp(info.model.created, UTC)
    return {
        "type": "model",
        "id": info.model.name,
        "display_name": info.model.name,
        "created_at": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
        "deprecated_at": None,
        "retires_at": None,
        "line": None,
        "capabilities": None,
        "max_input_tokens": info.model.context_length,
        "max_tokens": info.model.context_length,
    }
