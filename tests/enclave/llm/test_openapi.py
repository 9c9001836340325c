from typing import Any

import httpx2
import pytest
from jsonschema import Draft202012Validator
from tests.enclave.llm.conftest import ScriptedEngine
from tests.enclave.llm.test_api import BODIES, ask

from cloister.enclave.llm.api import ROUTES, Route
from cloister.enclave.llm.fields import Fields
from cloister.enclave.llm.openapi import OPERATIONS, Operation, Recorder, request_schema
from cloister.errors import WrongUse

pytestmark = pytest.mark.anyio

READ = [(path, operation) for (_, path), operation in OPERATIONS.items() if operation.read is not None]


async def described(http: httpx2.AsyncClient) -> Any:
    return (await http.get("/v1/openapi.json")).json()


def operation_of(document: Any, route: Route) -> Any:
    path = route.path + "{model}" if route.path.endswith("/") else route.path
    return document["paths"][path][route.method.lower()]


async def test_every_route_is_described_and_no_other(http: httpx2.AsyncClient) -> None:
    document = await described(http)
    assert document["openapi"] == "3.1.0"
    for route in ROUTES:
        assert operation_of(document, route)["summary"]
    assert sum(len(methods) for methods in document["paths"].values()) == len(ROUTES)
    assert {(route.method, route.path) for route in ROUTES} == set(OPERATIONS)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
async def test_real_answers_are_as_described(http: httpx2.AsyncClient, route: Route) -> None:
    document = await described(http)
    response = await ask(http, route)
    content = operation_of(document, route)["responses"]["200"]["content"]
    kind = response.headers["content-type"].partition(";")[0]
    assert kind in content
    if kind == "application/json":
        schema = content[kind]["schema"]
        Draft202012Validator.check_schema(schema)
        Draft202012Validator(schema).validate(response.json())


@pytest.mark.parametrize("route", [route for route in ROUTES if route.path != "/v1/openapi.json"])
async def test_real_errors_are_as_described(http: httpx2.AsyncClient, engine: ScriptedEngine, route: Route) -> None:
    document = await described(http)
    name = operation_of(document, route)["responses"]["default"]["$ref"].rpartition("/")[2]
    schema = document["components"]["responses"][name]["content"]["application/json"]["schema"]
    engine.ready = False
    Draft202012Validator(schema).validate((await ask(http, route)).json())


@pytest.mark.parametrize(("path", "operation"), READ)
def test_what_is_said_of_a_field_is_what_the_parser_does(path: str, operation: Operation) -> None:
    """A value that the schema refuses, the parser refuses too, at the bounds and beyond them."""
    read = operation.read
    assert read is not None
    schema = request_schema(operation)
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    assert validator.is_valid(BODIES[path])
    read(Fields(BODIES[path]))
    checked = 0
    for name, about in schema["properties"].items():
        wrong: list[Any] = [about["minimum"] - 1, about["maximum"] + 1] if "minimum" in about else []
        if "type" in about:
            wrong += [value for value in ("x", 1.5, [1.5], {"x": 1}, True) if not fits(value, about["type"])]
        for value in wrong:
            body = {**BODIES[path], name: value}
            assert not validator.is_valid(body), (name, value)
            with pytest.raises(WrongUse):
                read(Fields(body))
            checked += 1
        if "minimum" in about:
            assert validator.is_valid({**BODIES[path], name: about["maximum"]})
            read(Fields({**BODIES[path], name: about["minimum"]}))
    assert checked > 0
    for name in schema["required"]:
        body = {key: value for key, value in BODIES[path].items() if key != name}
        assert not validator.is_valid(body)
        with pytest.raises(WrongUse):
            read(Fields(body))


WITHIN: list[Any] = [
    [],
    [1],
    [{}],
    [{"role": "nobody", "content": "x"}],
    [{"role": "user", "content": 5}],
    [{"role": "user", "content": {}}],
    [-1],
    [2**31],
    ["x"],
]


@pytest.mark.parametrize(("path", "operation"), READ)
def test_what_is_said_of_the_inside_of_a_field_is_what_the_parser_does(path: str, operation: Operation) -> None:
    read = operation.read
    assert read is not None
    validator = Draft202012Validator(request_schema(operation))
    for name in operation.within:
        refused = [body for value in WITHIN if not validator.is_valid(body := {**BODIES[path], name: value})]
        assert len(refused) > 3, name
        for body in refused:
            with pytest.raises(WrongUse):
                read(Fields(body))


def fits(value: Any, kinds: list[str]) -> bool:
    return bool(Draft202012Validator({"type": kinds}).is_valid(value))


@pytest.mark.parametrize(("path", "operation"), READ)
def test_fields_of_several_types_are_those_that_the_parser_takes_as_they_are(path: str, operation: Operation) -> None:
    recorder = Recorder(BODIES[path])
    assert operation.read is not None
    operation.read(recorder)
    anything = {name for name, about in recorder.schema()["properties"].items() if about == {}}
    assert anything == set(operation.either)


async def test_every_body_has_an_example_that_is_taken(http: httpx2.AsyncClient) -> None:
    document = await described(http)
    examples = {
        path: methods["post"]["requestBody"]["content"]["application/json"]["example"]
        for path, methods in document["paths"].items()
        if "post" in methods
    }
    assert set(examples) == {path for path, _ in READ}
    for path, body in examples.items():
        assert (await http.post(path, json=body)).status_code == 200, path


async def test_bounds_and_defaults_are_told(http: httpx2.AsyncClient) -> None:
    document = await described(http)

    def field(path: str, name: str) -> Any:
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        return body["properties"][name]

    known = {"type": ["number", "null"], "minimum": 0, "default": 1.0}
    assert field("/v1/messages", "temperature") == {**known, "maximum": 1}
    assert field("/v1/responses", "temperature") == {**known, "maximum": 2}
    assert field("/v1/chat/completions", "stream_options")["properties"]["include_usage"]["type"] == ["boolean", "null"]
    assert field("/v1/messages", "max_tokens")["type"] == ["integer"]


async def test_only_health_goes_without_a_key(http: httpx2.AsyncClient) -> None:
    document = await described(http)
    free = [
        path for path, methods in document["paths"].items() for one in methods.values() if one.get("security") == []
    ]
    assert free == ["/health"]
    assert document["security"]
