"""`tinfoil-ehbp`, unchanged, against a real enclave that was started with EHBP: on the key that the client verified."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import httpx2
import pytest
from ehbp import Client, EHBPTransport
from tests.end_to_end.tenants import ALICE, ALICE_HASH

from cloister.cli.local import LocalEnclave, Plan
from cloister.client import SealedTransport, Session
from cloister.enclave.boot import KeyHash
from cloister.enclave.llm.api import ROUTES
from cloister.errors import VerificationFailed
from cloister.models.download import resolve

ASK = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
KEY = {"Authorization": f"Bearer {ALICE}"}


@pytest.fixture(scope="module")
def speaking(state: Path) -> Iterator[LocalEnclave]:
    plan = Plan.make(resolve("tiny"), slots=2, keys=(KeyHash("alice", ALICE_HASH),), ehbp=True)
    with LocalEnclave(plan) as running:
        running.start()
        yield running


@pytest.fixture(scope="module")
def key(speaking: LocalEnclave) -> str:
    with Session(speaking.url, policy=speaking.policy) as session:
        verified = session.verify()
    assert verified.statement.insecure == ("ehbp",)
    assert verified.statement.ehbp_key is not None
    return verified.statement.ehbp_key.hex()


@pytest.fixture
def client(speaking: LocalEnclave, key: str) -> Iterator[Client]:
    http = httpx.Client(trust_env=False, timeout=60)
    with Client.with_public_key_hex(speaking.url, key, http_client=http) as one:
        yield one


def test_the_published_key_is_the_attested_one(speaking: LocalEnclave, key: str) -> None:
    with Client.discover(speaking.url, http_client=httpx.Client(trust_env=False)) as client:
        assert client.server_identity.public_key_hex() == key


def test_a_client_whose_policy_does_not_name_ehbp_refuses_the_enclave(speaking: LocalEnclave) -> None:
    strict = replace(speaking.policy, tolerate_insecure=frozenset())
    with Session(speaking.url, policy=strict) as session, pytest.raises(VerificationFailed) as caught:
        session.verify()
    assert "insecure.ehbp" in str(caught.value)


def test_an_answer_and_a_stream_say_the_same(client: Client) -> None:
    whole = client.post("/v1/completions", json_body=ASK, headers=KEY)
    assert whole.status_code == 200
    text = whole.json()["choices"][0]["text"]
    assert text
    with client.stream("POST", "/v1/completions", json_body={**ASK, "stream": True}, headers=KEY) as answer:
        lines = b"".join(answer).decode().splitlines()
    assert "data: [DONE]" in lines
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(choice["text"] for event in events for choice in event["choices"]) == text


def test_the_transport_does_too(speaking: LocalEnclave, key: str) -> None:
    with httpx.Client(transport=EHBPTransport.from_public_key_hex(key), base_url=speaking.url, timeout=60) as client:
        assert client.post("/v1/completions", json=ASK, headers=KEY).json()["usage"]["completion_tokens"] == 8


def test_who_has_no_api_key_is_told_so_sealed(client: Client) -> None:
    refused = client.post("/v1/completions", json_body=ASK)
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    assert refused.headers["ehbp-response-nonce"]


def test_every_route_that_takes_a_body_is_there_and_no_other(speaking: LocalEnclave, client: Client) -> None:
    for route in ROUTES:
        if route.method == "POST":
            answer = client.post(route.path, json_body={}, headers=KEY)
            assert "ehbp-response-nonce" in answer.headers, route.path
        elif (route.path, "POST") not in {(one.path, one.method) for one in ROUTES}:
            assert client.post(route.path, json_body={}, headers=KEY).status_code == 403, route.path


def test_the_sealed_channel_works_beside_it(speaking: LocalEnclave) -> None:
    with (
        Session(speaking.url, policy=speaking.policy) as session,
        httpx2.Client(transport=SealedTransport(session), base_url="http://enclave.invalid", timeout=60) as client,
    ):
        assert client.post("/v1/completions", json=ASK, headers=KEY).json()["usage"]["completion_tokens"] == 8


def test_an_enclave_started_without_it_speaks_none(enclave: LocalEnclave) -> None:
    assert httpx.get(f"{enclave.url}/.well-known/hpke-keys", trust_env=False).status_code == 403
    with Session(enclave.url, policy=enclave.policy) as session:
        assert session.verify().statement.ehbp_key is None
