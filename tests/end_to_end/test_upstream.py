"""An enclave whose model runs behind an upstream, as `cloister serve --upstream` starts it: sealed, verified, and told."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
import uvicorn
from openai import OpenAI
from tests.cli.running import run
from tests.enclave.llm.upstream.fake import FakeVllm, write_folder

from cloister.cli.local import LocalEnclave, Plan
from cloister.cli.main import app
from cloister.cli.receipt import check
from cloister.client import SealedTransport, Session
from cloister.enclave.llm.upstream import model_digest
from cloister.errors import NotTrusted, VerificationFailed, WrongUse
from cloister.evidence.receipt import find_comment
from cloister.models.store import LocalModel

HELLO = [{"role": "user", "content": "Hello"}]


@contextmanager
def serving(fake: FakeVllm, port: int = 0) -> Iterator[int]:
    listener = socket.create_server(("127.0.0.1", port))
    config = uvicorn.Config(fake, lifespan="off", log_level="critical", access_log=False, timeout_graceful_shutdown=0)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        listener.close()


@pytest.fixture(scope="module")
def fake() -> FakeVllm:
    return FakeVllm(width=4)


@pytest.fixture(scope="module")
def upstream(fake: FakeVllm) -> Iterator[int]:
    with serving(fake) as port:
        yield port


def plan_of(fake: FakeVllm, port: int) -> Plan:
    return Plan.make(LocalModel(Path(), fake.name, "upstream"), slots=2, upstream=f"http://127.0.0.1:{port}")


@pytest.fixture(scope="module")
def enclave(
    state: Path, fake: FakeVllm, upstream: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalEnclave]:
    folder = write_folder(tmp_path_factory.mktemp("tokenizer"))
    with LocalEnclave(plan_of(fake, upstream), tokenizer=folder) as running:
        running.start()
        yield running


def test_answers_sealed_and_says_what_it_cannot_prove(enclave: LocalEnclave, fake: FakeVllm) -> None:
    before = len(fake.prompts())
    with Session(enclave.url, policy=enclave.policy) as session:
        http = httpx2.Client(transport=SealedTransport(session), timeout=60)
        with OpenAI(base_url="http://enclave.invalid/v1", api_key="none", http_client=http) as client:
            answer = client.chat.completions.create(model="default", messages=HELLO)  # type: ignore[arg-type]
            embedded = client.embeddings.create(model="default", input=["a", "b"])
        statement = session.verify().statement
    assert answer.choices[0].message.content == "Hello"
    assert [len(entry.embedding) for entry in embedded.data] == [4, 4]
    assert fake.prompts()[before:] == ["<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"]
    assert set(statement.insecure) == {"api-keys-off", "upstream"}
    assert statement.engine.variant == "upstream"
    (model,) = statement.models
    assert (model.name, model.sha256, model.quantization) == (fake.name, model_digest(fake.name), "unknown")


def test_a_streams_receipt_names_the_upstreams_digest(enclave: LocalEnclave, fake: FakeVllm) -> None:
    asked = json.dumps({"messages": HELLO, "stream": True}).encode()
    with (
        Session(enclave.url, policy=enclave.policy) as session,
        httpx2.Client(transport=SealedTransport(session), base_url="http://enclave.invalid", timeout=60) as client,
    ):
        verified = session.verify()
        headers = {"content-type": "application/json", "cloister-receipt": verified.statement_sha256}
        answer = client.post("/v1/chat/completions", content=asked, headers=headers)
    content, delivered = find_comment(answer.content)
    assert check(delivered, verified, asked, content).models == (model_digest(fake.name),)
    assert b'"content":"Hel"' in content
    for request, response in ((asked, content.replace(b"Hel", b"Hal")), (asked.replace(b"Hello", b"Hallo"), content)):
        with pytest.raises(NotTrusted):
            check(delivered, verified, request, response)


def test_who_does_not_tolerate_an_upstream_sends_nothing(enclave: LocalEnclave, fake: FakeVllm) -> None:
    strict = replace(enclave.policy, tolerate_insecure=frozenset({"api-keys-off"}))
    before = len(fake.completions)
    with Session(enclave.url, policy=strict) as session, pytest.raises(VerificationFailed) as refused:
        session.verify()
    assert refused.value.step == "insecure.upstream"
    assert len(fake.completions) == before


def test_readiness_follows_the_upstream(state: Path, fake: FakeVllm) -> None:
    def ready(url: str) -> int:
        return httpx2.get(f"{url}/readyz", timeout=10).status_code

    def until(url: str, status: int) -> None:
        end = time.monotonic() + 60
        while ready(url) != status:
            assert time.monotonic() < end
            time.sleep(0.05)

    with serving(fake) as port:
        enclave = LocalEnclave(plan_of(fake, port))
        enclave.start()
        assert ready(enclave.url) == 200
    with enclave:
        until(enclave.url, 503)
        with serving(fake, port):
            until(enclave.url, 200)


def test_an_enclave_takes_no_upstream_of_another_name(state: Path, fake: FakeVllm, upstream: int) -> None:
    other = Plan.make(LocalModel(Path(), "acme/Else", "upstream"), slots=2, upstream=f"http://127.0.0.1:{upstream}")
    with LocalEnclave(other) as running, pytest.raises(Exception, match="launch config"):
        running.start()


@pytest.mark.parametrize("url", ["http://10.0.0.1:8000", "https://127.0.0.1:1", "http://127.0.0.1:1/v1"])
def test_no_enclave_is_told_to_send_prompts_elsewhere(state: Path, fake: FakeVllm, url: str) -> None:
    plan = Plan.make(LocalModel(Path(), fake.name, "upstream"), slots=2, upstream=url)
    with LocalEnclave(plan) as running, pytest.raises(WrongUse, match="loopback"):
        running.start()
    refused = run(app, "serve", "--platform", "sim", "--upstream", url)
    assert (refused.exit_code, "loopback" in refused.stderr) == (2, True)


def test_the_command_refuses_a_model_beside_an_upstream_and_one_that_is_not_there(state: Path) -> None:
    refused = run(app, "serve", "tiny", "--platform", "sim", "--upstream", "http://127.0.0.1:9")
    assert (refused.exit_code, "the upstream's" in refused.stderr) == (2, True)
    refused = run(app, "serve", "--platform", "sim", "--upstream", "http://127.0.0.1:9")
    assert (refused.exit_code, "reached" in refused.stderr) == (5, True)
