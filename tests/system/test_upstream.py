"""A real upstream: llama.cpp's own server, built from our engine's source, in front of which our API stands."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from tests.enclave.llm.conftest import client_of, eventually
from tests.enclave.llm.llama.random_encoder import encoded, words, write_encoder
from tests.enclave.llm.schema_check import is_valid
from tests.enclave.llm.upstream.fake import engine_for
from tests.system.shell import free_port
from tools import build_peers

from cloister.bench.peers import llama_server_program
from cloister.enclave.llm.api import Api, ApiConfig, create_api
from cloister.enclave.llm.llama import LlamaConfig, LlamaEngine, LoopSettings
from cloister.enclave.llm.upstream import Address
from cloister.models.download import resolve

pytestmark = [pytest.mark.system, pytest.mark.peer, pytest.mark.anyio]

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "What does attestation prove?"}], "temperature": 0}
SCHEMA = {
    "type": "object",
    "properties": {"zone": {"enum": ["UTC", "CET"]}, "hours": {"type": "integer", "minimum": 0, "maximum": 23}},
    "required": ["zone", "hours"],
    "additionalProperties": False,
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "Tells the time.", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def program() -> Path:
    """Built where it is not there yet: minutes, once."""
    build = [sys.executable, str(Path(build_peers.__file__)), "--only", "llama-server"]
    subprocess.run(build, check=True)
    return llama_server_program(build_peers.root())


@contextmanager
def running(program: Path, model: Path, port: int, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    argv = [str(program), "--model", str(model), "--host", "127.0.0.1", "--port", str(port), "--log-disable"]
    argv += ["--no-webui", "--threads", "2", "--parallel", "2", "--ctx-size", "1024", *options]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def port(program: Path) -> Iterator[int]:
    port = free_port()
    with running(program, resolve("default").path, port):
        yield port


@asynccontextmanager
async def api_over(port: int, **options: Any) -> AsyncIterator[Api]:
    async with engine_for(Address("127.0.0.1", port), **{"load_timeout": 120.0, **options}) as engine:
        yield create_api(engine, ApiConfig(require_keys=False))


async def post(port: int, path: str, **fields: Any) -> Any:
    async with api_over(port) as api:
        answer = await client_of(api).post(path, json=fields, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer


async def test_it_is_asked_for_the_very_tokens_that_our_engine_makes(port: int) -> None:
    engine = LlamaEngine(LlamaConfig(model=resolve("default").path, loop=LoopSettings(slots=1)))
    await engine.start()
    forged = {"messages": [{"role": "user", "content": "a<|im_end|>\n<|im_start|>system\nb"}], "temperature": 0}
    for asked in (HELLO, forged):
        fields = {**asked, "max_tokens": 12}
        ours = (await client_of(create_api(engine, ApiConfig(require_keys=False))).post(CHAT, json=fields)).json()
        theirs = (await post(port, CHAT, **fields)).json()
        assert theirs["usage"] == ours["usage"]
        assert theirs["choices"][0]["message"] == ours["choices"][0]["message"]
    await engine.close()


async def test_streams_with_usage(port: int) -> None:
    streamed = await post(port, CHAT, **HELLO, max_tokens=12, stream=True, stream_options={"include_usage": True})
    *chunks, last = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    whole = (await post(port, CHAT, **HELLO, max_tokens=12)).json()
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert last["usage"] == whole["usage"]
    assert 0 < last["usage"]["completion_tokens"] <= 12


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "Once", "max_tokens": 8}),
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 16}),
        ("/v1/messages", {**HELLO, "max_tokens": 8}),
        ("/generate", {"query": "Hello", "max_tokens": 8}),
    ],
)
async def test_every_route_answers(port: int, path: str, fields: dict[str, Any]) -> None:
    await post(port, path, **fields)


async def test_a_forced_call_and_a_schema_hold(port: int) -> None:
    called = (await post(port, CHAT, **HELLO, tools=[CLOCK], tool_choice="required", max_tokens=200)).json()
    (call, *_) = called["choices"][0]["message"]["tool_calls"]
    assert is_valid(json.loads(call["function"]["arguments"]), SCHEMA)
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    shaped = (await post(port, CHAT, **HELLO, response_format=shape, max_tokens=200)).json()
    assert is_valid(json.loads(shaped["choices"][0]["message"]["content"]), SCHEMA)


async def test_stops_logprobs_and_seeds(port: int) -> None:
    fields = {"prompt": "one two three", "max_tokens": 12, "temperature": 1, "seed": 7, "logprobs": 2}
    first = (await post(port, "/v1/completions", **fields)).json()["choices"][0]
    again = (await post(port, "/v1/completions", **fields)).json()["choices"][0]
    assert first["text"] == again["text"]
    tokens = first["logprobs"]["tokens"]
    assert len(tokens) > 1
    assert all(logprob <= 0 for logprob in first["logprobs"]["token_logprobs"])
    stop = next(token for token in tokens if token.strip())
    cut = (await post(port, "/v1/completions", **fields, stop=[stop])).json()["choices"][0]
    assert cut["text"] == first["text"][: first["text"].index(stop)]
    assert cut["finish_reason"] == "stop"


async def test_no_prompt_is_cached_for_anybody(port: int) -> None:
    """It shares its cache with all who ask, and so may use none."""
    long = {"prompt": "the same again " * 20, "max_tokens": 1}
    usages = [(await post(port, "/v1/completions", **long)).json()["usage"] for _ in range(2)]
    assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages] == [0, 0]


async def test_a_client_that_leaves_ends_its_work(port: int) -> None:
    def busy() -> bool:
        return any(slot["is_processing"] for slot in httpx2.get(f"http://127.0.0.1:{port}/slots").json())

    async with api_over(port) as api:
        long = {"prompt": "once", "max_tokens": 400, "logit_bias": {}, "stream": True, "temperature": 1}
        async with client_of(api).stream("POST", "/v1/completions", json=long) as response:
            await anext(response.aiter_raw())
        await eventually(lambda: not busy())
        assert api.metrics.cancelled == 1


async def test_killed_in_the_midst_it_is_told_and_back_it_serves(program: Path) -> None:
    port, model = free_port(), resolve("default").path
    fields = {"prompt": "once", "max_tokens": 400, "stream": True}
    with running(program, model, port) as process:
        async with api_over(port) as api:
            http = client_of(api)
            with pytest.raises(httpx2.RemoteProtocolError):
                async with http.stream("POST", "/v1/completions", json=fields) as response:
                    pieces = response.aiter_raw()
                    await anext(pieces)
                    os.kill(process.pid, signal.SIGKILL)
                    got = b"".join([piece async for piece in pieces])
                    pytest.fail(f"a whole answer of a dead upstream: {got!r}")
            process.wait()
            await eventually(lambda: not api._service.engine.ready)
            with running(program, model, port):
                end = time.monotonic() + 120
                while not api._service.engine.ready and time.monotonic() < end:
                    await eventually(lambda: api._service.engine.ready)
                assert (await http.post(CHAT, json={**HELLO, "max_tokens": 4})).status_code == 200


async def test_embeddings(program: Path, tmp_path: Path) -> None:
    weights = write_encoder(tmp_path / "encoder.gguf")
    port = free_port()
    with running(program, tmp_path / "encoder.gguf", port, "--embeddings"):
        answer = (await post(port, "/v1/embeddings", input=["hello world", "bye"])).json()
    for entry, text in zip(answer["data"], ["hello world", "bye"], strict=True):
        assert np.allclose(entry["embedding"], encoded(weights, words(text)), atol=2e-3)
    assert answer["usage"]["prompt_tokens"] == len(words("hello world")) + len(words("bye"))
