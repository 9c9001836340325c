"""The `openai` SDK, unchanged, through the sealed transport, through the local proxy, and in plaintext on loopback."""

import concurrent.futures
import time
from collections.abc import Iterator

import httpx2
import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam
from tests.end_to_end.proxying import running_proxy

from cloister.cli.local import LocalEnclave
from cloister.client import SealedTransport, Session

ASK: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What does attestation prove?"}]


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
