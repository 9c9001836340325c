"""The OpenAPI 3.1 document. A request's fields, types and bounds are those that its own parser asks for: each is run
over a recorder, so that no second list of them can grow old."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from cloister import __version__
from cloister.enclave.llm.anthropic import ROLES as ANTHROPIC_ROLES
from cloister.enclave.llm.anthropic import parse_count, parse_messages
from cloister.enclave.llm.embeddings import parse_embeddings
from cloister.enclave.llm.envelope import ANTHROPIC, DIALECTS, Dialect
from cloister.enclave.llm.fields import MAX_TOKEN_ID, Fields
from cloister.enclave.llm.requests import ROLES, parse_chat, parse_completion, parse_generate
from cloister.enclave.llm.responses import parse_response
from cloister.enclave.llm.service import ApiConfig
from cloister.enclave.llm.tokens import parse_detokenize, parse_tokenize

__all__ = ["OPERATIONS", "Entry", "Operation", "Recorder", "document", "request_schema"]

Schema = Mapping[str, Any]


class Recorder(Fields):
    """A JSON object that notes which fields a parser asks for, as what, and within which bounds.

    A field that is read as it stands may be of any type.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        super().__init__(values, where)
        self.noted: dict[str, dict[str, Any]] = {}
        self._inner: dict[str, Recorder] = {}
        self._raw: set[str] = set()

    def _note(self, name: str, kind: str, **more: Any) -> None:
        known = {key: value for key, value in more.items() if value is not None}
        self.noted.setdefault(name, {"type": [kind, "null"], **known})

    def schema(self) -> dict[str, Any]:
        properties = {name: {} if name in self._raw else noted for name, noted in self.noted.items()}
        for name, inner in self._inner.items():
            if name not in self._raw and inner.noted:
                properties[name] = {**inner.schema(), "type": ["object", "null"]}
        return {"type": "object", "properties": properties}

    def get(self, field: str) -> Any:
        self._note(field, "string")
        self._raw.add(field)
        return super().get(field)

    def text(self, field: str) -> str | None:
        self._note(field, "string")
        return Fields(self.values).text(field)

    def flag(self, field: str, *, default: bool = False) -> bool:
        self._note(field, "boolean", default=default)
        return Fields(self.values).flag(field, default=default)

    def integer(self, field: str, low: int, high: int) -> int | None:
        self._note(field, "integer", minimum=low, maximum=high)
        return Fields(self.values).integer(field, low, high)

    def number(self, field: str, default: float, low: float, high: float) -> float:
        self._note(field, "number", minimum=low, maximum=high, default=default)
        return Fields(self.values).number(field, default, low, high)

    def array(self, field: str) -> Sequence[Any]:
        self._note(field, "array")
        return Fields(self.values).array(field)

    def object(self, field: str) -> Fields:
        self._note(field, "object")
        values = Fields(self.values).object(field).values
        return self._inner.setdefault(field, Recorder(values, f"{self.name(field)}."))


@dataclass(frozen=True, slots=True)
class Operation:
    """`read` parses the body; `sample` is the least that it takes, and so names what is required.

    `either`: the types of fields that the parser takes in several. `within`: what the parser asks of the inside of a
    field. `answer`: what is surely in it; None: it is a stream.
    """

    summary: str
    answer: Schema | None
    read: Callable[[Fields], object] | None = None
    sample: Mapping[str, Any] = field(default_factory=dict)
    either: Mapping[str, Sequence[str]] = field(default_factory=dict)
    within: Mapping[str, Schema] = field(default_factory=dict)
    parameters: Sequence[Schema] = ()
    streams: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """A route, as far as it is described."""

    method: str
    path: str
    dialect: Dialect | None
    keyless: bool


def _object(**properties: Schema) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def _parameter(name: str, where: str, about: str, *, required: bool = True) -> Schema:
    return {"name": name, "in": where, "required": required, "description": about, "schema": {"type": "string"}}


TEXT: Schema = {"type": "string"}
MAYBE: Schema = {"type": ["string", "null"]}
COUNT: Schema = {"type": "integer", "minimum": 0}
TOKENS: Schema = {"type": "array", "items": COUNT}


def _constant(value: str) -> Schema:
    return {"const": value}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


_CHOICE = {"index": COUNT, "finish_reason": TEXT}
_USAGE = _object(prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT)
_HEAD = {"id": TEXT, "created": COUNT, "model": TEXT, "system_fingerprint": TEXT, "usage": _USAGE}
_CHAT = _object(
    **_HEAD,
    object=_constant("chat.completion"),
    choices=_list(_object(**_CHOICE, message=_object(role=_constant("assistant"), content=MAYBE))),
)
_COMPLETION = _object(**_HEAD, object=_constant("text_completion"), choices=_list(_object(**_CHOICE, text=TEXT)))
_OURS = {"id": TEXT, "sha256": TEXT, "quantization": TEXT, "context_length": COUNT}
_OPENAI_MODEL = _object(**_OURS, object=_constant("model"), created=COUNT, owned_by=TEXT)
_ANTHROPIC_MODEL = _object(
    **_OURS, type=_constant("model"), display_name=TEXT, created_at=TEXT, lifecycle=_constant("active")
)
_MODEL = {"anyOf": [_OPENAI_MODEL, _ANTHROPIC_MODEL]}
_MODELS = {
    "anyOf": [
        _object(object=_constant("list"), data=_list(_OPENAI_MODEL)),
        _object(data=_list(_ANTHROPIC_MODEL), has_more={"const": False}, first_id=TEXT, last_id=TEXT),
    ]
}
_TYPED = _list(_object(type=TEXT))
_RESPONSE = _object(
    id=TEXT,
    object=_constant("response"),
    created_at=COUNT,
    model=TEXT,
    status={"enum": ["completed", "incomplete"]},
    output=_TYPED,
    usage=_object(input_tokens=COUNT, output_tokens=COUNT, total_tokens=COUNT),
    store={"const": False},
)
_STOPS = ["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]
_MESSAGE = _object(
    id=TEXT,
    type=_constant("message"),
    role=_constant("assistant"),
    model=TEXT,
    content=_TYPED,
    stop_reason={"enum": _STOPS},
    stop_sequence=MAYBE,
    usage=_object(input_tokens=COUNT, output_tokens=COUNT, cache_read_input_tokens=COUNT),
)
_SPOKEN = _parameter("anthropic-version", "header", "Anthropic's shape and errors, where it is sent.", required=False)
_EMBEDDING = _object(object=_constant("embedding"), index=COUNT, embedding={"type": ["array", "string"]})
_EMBEDDINGS = _object(
    object=_constant("list"),
    model=TEXT,
    data=_list(_EMBEDDING),
    usage=_object(prompt_tokens=COUNT, total_tokens=COUNT),
)
_HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


def _turns(roles: Iterable[str], *content: str) -> Mapping[str, Schema]:
    properties = {"role": {"enum": list(roles)}, "content": {"type": list(content)}}
    turn = {"type": "object", "required": ["role"], "properties": properties}
    return {"messages": {"items": turn, "minItems": 1}}


_TURNS = _turns(ROLES, "string", "array", "null")
_ANTHROPIC_TURNS = _turns(ANTHROPIC_ROLES, "string", "array")
_TOKEN = {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}

OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("POST", "/v1/chat/completions"): Operation(
        "OpenAI: an answer to a conversation.",
        _CHAT,
        parse_chat,
        _HELLO,
        {"stop": ("string", "array"), "tool_choice": ("string", "object")},
        _TURNS,
        streams=True,
    ),
    ("POST", "/v1/completions"): Operation(
        "OpenAI: the continuation of a text.",
        _COMPLETION,
        parse_completion,
        {"prompt": "Once"},
        {"stop": ("string", "array"), "prompt": ("string", "array")},
        streams=True,
    ),
    ("POST", "/v1/embeddings"): Operation(
        "OpenAI: texts as directions, of length 1.",
        _EMBEDDINGS,
        parse_embeddings,
        {"input": "Hello"},
        {"input": ("string", "array")},
    ),
    ("POST", "/v1/responses"): Operation(
        "OpenAI: an answer to a conversation. Nothing is stored.",
        _RESPONSE,
        parse_response,
        {"input": "Hello"},
        {"input": ("string", "array"), "tool_choice": ("string", "object")},
        streams=True,
    ),
    ("POST", "/v1/messages"): Operation(
        "Anthropic: an answer to a conversation.",
        _MESSAGE,
        parse_messages,
        {**_HELLO, "max_tokens": 1},
        {"system": ("string", "array")},
        _ANTHROPIC_TURNS,
        streams=True,
    ),
    ("POST", "/v1/messages/count_tokens"): Operation(
        "Anthropic: the tokens of a prompt.",
        _object(input_tokens=COUNT),
        parse_count,
        _HELLO,
        {"system": ("string", "array")},
        _ANTHROPIC_TURNS,
    ),
    ("GET", "/v1/openapi.json"): Operation("This document.", _object(openapi=TEXT, info={}, paths={})),
    ("GET", "/v1/models"): Operation("The one model.", _MODELS, parameters=(_SPOKEN,)),
    ("GET", "/v1/models/"): Operation(
        "The one model, by its name or alias.",
        _MODEL,
        parameters=(_parameter("model", "path", "May hold slashes."), _SPOKEN),
    ),
    ("POST", "/tokenize"): Operation("A text's tokens.", _object(tokens=TOKENS), parse_tokenize, {"content": "Hello"}),
    ("POST", "/detokenize"): Operation(
        "The text of tokens.",
        _object(content=TEXT),
        parse_detokenize,
        {"tokens": [1]},
        within={"tokens": {"items": _TOKEN}},
    ),
    ("POST", "/generate"): Operation(
        "The original's: an answer to a text; streamed with `Accept: text/event-stream`.",
        _object(response=TEXT),
        partial(parse_generate, default_tokens=ApiConfig().generate_tokens),
        {"query": "Hello"},
        {"stop": ("string", "array")},
        streams=True,
    ),
    ("GET", "/generate"): Operation(
        "The original's: an answer to a text, streamed.",
        None,
        parameters=(_parameter("prompt", "query", "Base64 of UTF-8 text."),),
        streams=True,
    ),
    ("GET", "/health"): Operation("200 only when a model can answer.", _object(status=_constant("ok"))),
}


def request_schema(operation: Operation) -> dict[str, Any]:
    """The body's JSON schema, by what the route's parser asks of one."""
    if operation.read is None:
        return {}
    recorder = Recorder(operation.sample)
    operation.read(recorder)
    schema = recorder.schema()
    for name, kinds in operation.either.items():
        schema["properties"][name] = {"type": [*kinds, "null"]}
    for name, about in operation.within.items():
        schema["properties"][name] |= about
    for name in operation.sample:
        kinds = schema["properties"][name].get("type", [])
        schema["properties"][name] |= {"type": [kind for kind in kinds if kind != "null"]}
    return {**schema, "required": list(operation.sample)}


def _described(entry: Entry, operation: Operation) -> dict[str, Any]:
    content: dict[str, Any] = {} if operation.answer is None else {"application/json": {"schema": operation.answer}}
    if operation.streams:
        content["text/event-stream"] = {}  # OpenAPI 3.1 cannot say what one event of a stream is
    told: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {
            "200": {"description": "The answer.", "content": content},
            "default": {"$ref": f"#/components/responses/{_error_name(entry.dialect)}"},
        },
    }
    if operation.read is not None:
        body = {"application/json": {"schema": request_schema(operation), "example": operation.sample}}
        told["requestBody"] = {"required": True, "content": body}
    if operation.parameters:
        told["parameters"] = operation.parameters
    return {**told, "security": []} if entry.keyless else told


def _error_name(dialect: Dialect | None) -> str:
    return f"{'any' if dialect is None else dialect.name}_error"


def _error_schema(dialect: Dialect | None) -> Schema:
    if dialect is None:
        return {"anyOf": [_error_schema(one) for one in DIALECTS]}
    if dialect is ANTHROPIC:
        told = _object(type=_constant("error"), error=_object(type=TEXT, message=TEXT))
        return {**told, "properties": {**told["properties"], "request_id": TEXT}}  # a proxy's own errors have none
    return _object(error=_object(message=TEXT, type=TEXT, param=MAYBE, code=MAYBE))


def _error(dialect: Dialect | None) -> dict[str, Any]:
    return {"description": "What went wrong.", "content": {"application/json": {"schema": _error_schema(dialect)}}}


def document(entries: Sequence[Entry]) -> dict[str, Any]:
    """Describes these routes. Raises: KeyError for a route that `OPERATIONS` does not know."""
    paths: dict[str, dict[str, Any]] = {}
    for entry in entries:
        operation = OPERATIONS[entry.method, entry.path]
        path = entry.path + "{model}" if entry.path.endswith("/") else entry.path
        paths.setdefault(path, {})[entry.method.lower()] = _described(entry, operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "cloister",
            "version": __version__,
            "description": "A language model inside an enclave, reached through the channel that a client has verified.",
        },
        "security": [{"bearer": []}, {"key": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            },
            "responses": {_error_name(dialect): _error(dialect) for dialect in (*DIALECTS, None)},
        },
    }
