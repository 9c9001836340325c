"""The `anthropic` SDK, unchanged, through the sealed transport, through the local proxy, and in plaintext on loopback."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic import Anthropic
from anthropic.types import MessageParam
from tests.end_to_end.answers import PLACE, caching, same
from tests.end_to_end.proxying import both_ways, running_proxy
from tests.end_to_end.tenants import ALICE

from cloister.cli.local import LocalEnclave
from cloister.client import SealedTransport, Session

ASK: list[MessageParam] = [{"role": "user", "content": "What does attestation prove?"}]
COLD = {"temperature": 0}


@pytest.fixture(params=["transport", "proxy", "plaintext"])
def client(request: pytest.FixtureRequest, enclave: LocalEnclave) -> Iterator[Anthropic]:
    if request.param == "transport":
        with Session(enclave.url, policy=enclave.policy) as session:
            http = httpx2.Client(transport=SealedTransport(session), timeout=60)
            with Anthropic(base_url="http://enclave.invalid", api_key="none", http_client=http) as one:
                yield one
    elif request.param == "plaintext":
        plain: LocalEnclave = request.getfixturevalue("plain_enclave")
        with Anthropic(base_url=plain.url, api_key="none", timeout=60) as one:
            yield one
    else:
        with (
            running_proxy(enclave) as port,
            Anthropic(base_url=f"http://127.0.0.1:{port}", api_key="none", timeout=60) as one,
        ):
            yield one


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def read(message: anthropic.types.Message) -> int:
    """The prompt's tokens, anew and from what was kept of this client's earlier prompts."""
    return message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)


def test_message_whole_and_streamed(client: Anthropic) -> None:
    whole = client.messages.create(model="default", max_tokens=24, messages=ASK, system="Be brief.", extra_body=COLD)
    with client.messages.stream(
        model="default", max_tokens=24, messages=ASK, system="Be brief.", extra_body=COLD
    ) as stream:
        streamed = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert streamed == text_of(final) == text_of(whole) != ""
    assert whole.stop_reason == final.stop_reason
    assert whole.stop_reason in ("end_turn", "max_tokens")
    assert 0 < final.usage.output_tokens <= 24
    assert read(final) == read(whole) > 0


def test_counted_tokens_are_those_of_the_answer(client: Anthropic) -> None:
    counted = client.messages.count_tokens(model="default", messages=ASK).input_tokens
    answer = client.messages.create(model="default", max_tokens=4, messages=ASK)
    assert counted == read(answer)
    long: list[MessageParam] = [{"role": "user", "content": "many words " * 9000}]
    assert client.messages.count_tokens(model="default", messages=long).input_tokens > 9000


def test_a_stop_sequence_is_named(client: Anthropic) -> None:
    whole = text_of(client.messages.create(model="default", max_tokens=24, messages=ASK, extra_body=COLD))
    stop = whole.split()[2]
    answer = client.messages.create(
        model="default", max_tokens=24, messages=ASK, stop_sequences=[stop], extra_body=COLD
    )
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
    assert text_of(answer) == whole[: whole.index(stop)]


def test_a_forced_tool_is_called(client: Anthropic) -> None:
    answer = client.messages.create(
        model="default",
        max_tokens=200,
        messages=ASK,
        tools=[
            {
                "name": "answer",
                "input_schema": {
                    "type": "object",
                    "properties": {"sure": {"type": "boolean"}},
                    "required": ["sure"],
                    "additionalProperties": False,
                },
            }
        ],
        tool_choice={"type": "tool", "name": "answer"},
        extra_body=COLD,
    )
    (call,) = answer.content
    assert call.type == "tool_use"
    assert call.input in ({"sure": True}, {"sure": False})
    assert answer.stop_reason == "tool_use"


def asked_at(address: str) -> dict[str, Any]:
    """What one program asks, and what it saw of the answers that does not change from one time to the next."""
    http: Any = {"timeout": 60, "max_retries": 0, "default_headers": caching()}
    with Anthropic(base_url=address, api_key="none", **http) as client:
        asked: Any = {"model": "default", "messages": ASK, "extra_body": COLD}
        names = ("place", "town")
        tools = [{"name": name, "description": "Somewhere.", "input_schema": PLACE.schema} for name in names]
        forced: Any = {**asked, "max_tokens": 200, "tools": tools, "tool_choice": {"type": "tool", "name": "place"}}
        one = {"type": "any", "disable_parallel_tool_use": True}
        form = {"output_config": {"format": {"type": "json_schema", "schema": PLACE.schema}}}
        with client.messages.stream(**asked, max_tokens=24) as stream:
            pieces = list(stream.text_stream)
            streamed = outcome(stream.get_final_message())
        with client.messages.stream(**forced) as stream:
            parts = [event.partial_json for event in stream if event.type == "input_json"]
            streamed_call = outcome(stream.get_final_message())
        return {
            "whole": outcome(client.messages.create(**asked, max_tokens=24)),
            "streamed": streamed,
            "pieces": pieces,
            "forced": outcome(client.messages.create(**forced)),
            "streamed call": streamed_call,
            "parts": parts,
            "one": outcome(client.messages.create(**{**forced, "tool_choice": one})),
            "typed": outcome(client.messages.create(**{**asked, "max_tokens": 200, "extra_body": {**COLD, **form}})),
        }


def outcome(message: anthropic.types.Message) -> dict[str, Any]:
    calls = [(block.name, block.input) for block in message.content if block.type == "tool_use"]
    usage = read(message), message.usage.output_tokens
    return {"text": text_of(message), "calls": calls, "reason": message.stop_reason, "usage": usage}


def test_one_enclave_answers_the_same_both_ways(plain_enclave: LocalEnclave) -> None:
    """Text, reason and usage; forced calls, whole and in pieces, and a form, which keep to their schema by either way."""
    with both_ways(plain_enclave) as ways:
        seen = same({way: asked_at(address) for way, address in ways.items()})
    assert seen["whole"] == seen["streamed"]
    assert seen["whole"]["text"] == "".join(seen["pieces"]) != ""
    assert len(seen["pieces"]) > 1
    for kind in ("forced", "streamed call"):
        assert (seen[kind]["reason"], seen[kind]["usage"][1] > 0) == ("tool_use", True)
    ((name, given),) = seen["forced"]["calls"]
    assert seen["streamed call"]["calls"] == [(name, given)]
    assert (name, json.loads("".join(seen["parts"]))) == ("place", given)
    assert len(seen["parts"]) > 1
    ((name, freely),) = seen["one"]["calls"]
    assert name in ("place", "town")
    assert seen["one"]["reason"] == "tool_use"
    assert seen["typed"]["reason"] == "end_turn"
    for value in (given, freely, json.loads(seen["typed"]["text"])):
        PLACE.validate(value)


def test_the_model_is_listed_and_found(client: Anthropic) -> None:
    (listed,) = client.models.list()
    found = client.models.retrieve("default")
    assert found == listed
    assert found.max_input_tokens == 4096


def test_errors_are_typed(client: Anthropic) -> None:
    long: list[MessageParam] = [{"role": "user", "content": "many words " * 9000}]
    with pytest.raises(anthropic.BadRequestError, match="4096"):
        client.messages.create(model="default", max_tokens=10, messages=long)
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="claude-nothing", max_tokens=10, messages=ASK)


def test_keys_are_sent_as_the_sdk_sends_them(keyed_enclave: LocalEnclave) -> None:
    with Session(keyed_enclave.url, policy=keyed_enclave.policy) as session:
        http = httpx2.Client(transport=SealedTransport(session), timeout=60)
        mine = Anthropic(base_url="http://enclave.invalid", api_key=ALICE, http_client=http)
        assert mine.messages.create(model="default", max_tokens=4, messages=ASK).content
        with pytest.raises(anthropic.AuthenticationError):
            mine.with_options(api_key="ck-wrong").messages.create(model="default", max_tokens=4, messages=ASK)
