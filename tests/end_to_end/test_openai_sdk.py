"""The `openai` SDK, unchanged, through the sealed transport, through the local proxy, and in plaintext on loopback."""

import concurrent.futures
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam
from tests.enclave.llm.llama.random_encoder import encoded, words, write_encoder
from tests.end_to_end.answers import PLACE, caching, same
from tests.end_to_end.proxying import both_ways, running_proxy

from cloister.cli.local import LocalEnclave, Plan
from cloister.client import SealedTransport, Session
from cloister.models.download import resolve

TOOLS = [{"type": "function", "function": {"name": name, "parameters": PLACE.schema}} for name in ("place", "town")]
UNENDING = {"2": -100}
"""Where a model may go on, it does: 2 ends its answer."""
QUESTION = "What does attestation prove?"
ASK: list[ChatCompletionMessageParam] = [{"role": "user", "content": QUESTION}]


@pytest.fixture(params=["transport", "proxy", "plaintext"])
def client(request: pytest.FixtureRequest, enclave: LocalEnclave) -> Iterator[OpenAI]:
    if request.param == "transport":
        with Session(enclave.url, policy=enclave.policy) as session:
            http = httpx2.Client(transport=SealedTransport(session), timeout=60)
            with OpenAI(base_url="http://enclave.invalid/v1", api_key="none", http_client=http) as one:
                yield one
    elif request.param == "plaintext":
        plain: LocalEnclave = request.getfixturevalue("plain_enclave")
        with OpenAI(base_url=f"{plain.url}/v1", api_key="none", timeout=60) as one:
            yield one
    else:
        with (
            running_proxy(enclave) as port,
            OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60) as one,
        ):
            yield one


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="default", messages=ASK, max_tokens=24, temperature=0)
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 24


def test_stream_with_usage(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="default",
        messages=ASK,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    whole = client.chat.completions.create(model="default", messages=ASK, max_tokens=24, temperature=0)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0


def test_responses_whole_and_streamed(client: OpenAI) -> None:
    whole = client.responses.create(
        model="default", input="What does attestation prove?", max_output_tokens=24, temperature=0
    )
    with client.responses.stream(
        model="default", input="What does attestation prove?", max_output_tokens=24, temperature=0
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")
    assert final.output_text == whole.output_text != ""
    assert whole.usage is not None
    assert 0 < whole.usage.output_tokens <= 24
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="default", input="And?", previous_response_id=whole.id)
    assert caught.value.param == "previous_response_id"


def test_error_is_typed_and_counts_tokens(client: OpenAI) -> None:
    long: list[ChatCompletionMessageParam] = [{"role": "user", "content": "many words " * 9000}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="default", messages=long)
    assert caught.value.code == "context_length_exceeded"
    assert "4096" in caught.value.message


def test_unknown_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-nothing", messages=ASK)


def test_cancel_leaves_the_enclave_answering(client: OpenAI) -> None:
    with client.chat.completions.create(model="default", messages=ASK, max_tokens=500, stream=True) as stream:
        next(iter(stream))
    assert client.chat.completions.create(model="default", messages=ASK, max_tokens=4).choices


def test_sixteen_streams_all_finish_while_one_is_cancelled(client: OpenAI) -> None:
    def run(number: int) -> str:
        stream = client.completions.create(
            model="default", prompt=f"{number}. Once upon a time", max_tokens=64, stream=True
        )
        if number == 0:
            next(iter(stream))
            stream.close()
            return "cancelled"
        return [chunk.choices[0].finish_reason for chunk in stream if chunk.choices][-1] or ""

    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(17) as pool:
        ended = list(pool.map(run, range(17)))
    assert ended[0] == "cancelled"
    assert set(ended[1:]) <= {"stop", "length"}
    assert time.monotonic() - began < 120


def asked_at(address: str) -> dict[str, Any]:
    """What one program asks, and what it saw of the answers that does not change from one time to the next."""
    http: Any = {"timeout": 60, "max_retries": 0, "default_headers": caching()}
    with OpenAI(base_url=f"{address}/v1", api_key="none", **http) as client:

        def create(**more: Any) -> Any:
            return client.chat.completions.create(model="default", messages=ASK, temperature=0, **more)

        def called(choice: Any, *, parallel: bool, **more: Any) -> Any:
            return create(max_tokens=200, tools=TOOLS, tool_choice=choice, parallel_tool_calls=parallel, **more)

        place = {"type": "function", "function": {"name": "place"}}
        form = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE.schema, "strict": True}}
        response: Any = client.responses.create(model="default", input=QUESTION, max_output_tokens=24, temperature=0)
        return {
            "whole": read(create(max_tokens=24)),
            "streamed": gathered(create(max_tokens=24, stream=True, stream_options={"include_usage": True})),
            "forced": read(called(place, parallel=True)),
            "streamed call": gathered(
                called(place, parallel=True, stream=True, stream_options={"include_usage": True})
            ),
            "one": read(called("required", parallel=False, logit_bias=UNENDING)),
            "several": read(called("required", parallel=True, logit_bias=UNENDING)),
            "typed": read(create(max_tokens=200, response_format=form)),
            "response": (response.status, response.output_text, response.usage.output_tokens),
        }


def read(answer: Any) -> dict[str, Any]:
    (choice,) = answer.choices
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
    return outcome(choice.message.content, calls, choice.finish_reason, answer.usage)


def gathered(stream: Any) -> dict[str, Any]:
    """A stream's pieces, put together as the whole answer is."""
    *chunks, last = stream
    deltas = [chunk.choices[0].delta for chunk in chunks]
    pieces = [piece for delta in deltas for piece in delta.tool_calls or ()]
    calls = [(piece.function.name, "") for piece in pieces if piece.function.name]
    for piece in pieces:
        name, so_far = calls[piece.index]
        calls[piece.index] = name, so_far + (piece.function.arguments or "")
    text = "".join(delta.content or "" for delta in deltas)
    return outcome(text or None, calls, chunks[-1].choices[0].finish_reason, last.usage)


def outcome(text: str | None, calls: list[tuple[str, str]], reason: str, usage: Any) -> dict[str, Any]:
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    counts = usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens, usage.completion_tokens
    return {"text": text, "calls": calls, "reason": reason, "usage": counts}


def test_one_enclave_answers_the_same_both_ways(plain_enclave: LocalEnclave) -> None:
    """Text, reason and usage; forced calls and a form, which keep to their schema by either way."""
    with both_ways(plain_enclave) as ways:
        seen = same({way: asked_at(address) for way, address in ways.items()})
    assert seen["whole"] == seen["streamed"]
    assert seen["whole"]["text"]
    assert 0 < seen["whole"]["usage"][2] <= 24
    assert seen["response"] == ("completed", seen["whole"]["text"], seen["whole"]["usage"][2])
    (prompt, cached, _), (again, kept, _) = (seen[kind].pop("usage") for kind in ("forced", "streamed call"))
    assert (prompt, cached, kept > 0) == (again, 0, True)
    assert seen["forced"] == seen["streamed call"]
    assert [name for name, _ in seen["forced"]["calls"]] == ["place"]
    assert len(seen["one"]["calls"]) == 1 < len(seen["several"]["calls"])
    for kind, reason in (("forced", "tool_calls"), ("one", "tool_calls"), ("several", "length")):
        assert seen[kind]["reason"] == reason
        for name, arguments in seen[kind]["calls"]:
            assert name in ("place", "town")
            PLACE.validate(json.loads(arguments))
    assert seen["typed"]["reason"] == "stop"
    PLACE.validate(json.loads(seen["typed"]["text"]))


def test_embeddings_are_the_same_both_ways_and_what_the_weights_say(state: Path, tmp_path: Path) -> None:
    weights = write_encoder(tmp_path / "encoder.gguf")
    texts = ["hello world", "the same again and once more the same"]
    seen: dict[str, Any] = {}
    with LocalEnclave(Plan.make(resolve(str(tmp_path / "encoder.gguf")), slots=2, plaintext=True)) as enclave:
        enclave.start()
        with both_ways(enclave) as ways:
            for way, address in ways.items():
                with OpenAI(base_url=f"{address}/v1", api_key="none", timeout=60, max_retries=0) as client:
                    packed = client.embeddings.create(model="default", input=texts)
                    listed = client.embeddings.create(model="default", input=texts, encoding_format="float")
                answers = [[entry.embedding for entry in answer.data] for answer in (packed, listed)]
                seen[way] = *answers, packed.usage.prompt_tokens
    packed_vectors, listed_vectors, tokens = same(seen)
    assert packed_vectors == listed_vectors
    assert tokens == sum(len(words(text)) for text in texts)
    for found, text in zip(packed_vectors, texts, strict=True):
        np.testing.assert_allclose(found, encoded(weights, words(text)), atol=2e-3)
