"""An enclave that was started with `--plaintext`: who gets an unsealed answer, and who is told of it."""

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.end_to_end.proxying import both_ways
from tests.end_to_end.tenants import ALICE, ALICE_HASH

from cloister.cli.local import LocalEnclave, Plan
from cloister.client import SealedTransport, Session
from cloister.enclave.boot import KeyHash
from cloister.errors import VerificationFailed, WrongUse
from cloister.models.download import resolve

ASK = {"model": "default", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
KEY = {"Authorization": f"Bearer {ALICE}"}


@pytest.fixture(scope="module")
def plain_plan(state: Path) -> Plan:
    return Plan.make(resolve("default"), slots=1, keys=(KeyHash("alice", ALICE_HASH),), plaintext=True)


@pytest.fixture(scope="module")
def plain(plain_plan: Plan) -> Iterator[LocalEnclave]:
    with LocalEnclave(plain_plan) as running:
        running.start()
        yield running


def post(enclave: LocalEnclave, **headers: str) -> httpx2.Response:
    with httpx2.Client(base_url=enclave.url, timeout=60, trust_env=False) as client:
        return client.post("/v1/completions", json=ASK, headers={**KEY, **headers})


def test_the_same_answer_with_and_without_the_seal(plain: LocalEnclave) -> None:
    with (
        Session(plain.url, policy=plain.policy) as session,
        httpx2.Client(transport=SealedTransport(session), base_url="http://enclave.invalid", timeout=60) as client,
    ):
        sealed = client.post("/v1/completions", json=ASK, headers=KEY).json()
        assert session.verify().statement.insecure == ("plaintext",)
    told = post(plain).json()
    assert told["choices"] == sealed["choices"]
    assert told["choices"][0]["text"]


def test_a_client_whose_policy_does_not_name_it_refuses_the_enclave(plain: LocalEnclave) -> None:
    strict = replace(plain.policy, tolerate_insecure=frozenset())
    with Session(plain.url, policy=strict) as session, pytest.raises(VerificationFailed) as caught:
        session.verify()
    assert "insecure.plaintext" in str(caught.value)


def test_api_keys_are_asked_for_as_ever(plain: LocalEnclave) -> None:
    answer = post(plain, Authorization="Bearer ck-wrong")
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}])
def test_web_pages_get_no_answer(plain: LocalEnclave, headers: dict[str, str]) -> None:
    answer = post(plain, **headers)
    assert (answer.status_code, answer.json()["type"].rpartition("/")[2]) == (403, "plaintext-refused")


def test_an_enclave_without_it_refuses(enclave: LocalEnclave) -> None:
    assert post(enclave).status_code == 403


def test_the_enclave_itself_does_not_start_where_others_could_listen(
    plain_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def everywhere(_host: str, _port: int) -> socket.socket:
        return socket.create_server(("0.0.0.0", 0))

    monkeypatch.setattr("cloister.cli.local.listen", everywhere)
    with LocalEnclave(plain_plan) as exposed, pytest.raises(WrongUse, match="loopback"):
        exposed.start()


def test_a_stream_arrives_unsealed_and_whole(plain: LocalEnclave) -> None:
    body: dict[str, Any] = {**ASK, "stream": True}
    with (
        httpx2.Client(base_url=plain.url, timeout=60, trust_env=False) as client,
        client.stream("POST", "/v1/completions", json=body, headers=KEY) as answer,
    ):
        lines = list(answer.iter_lines())
    assert lines[-2:] == ["data: [DONE]", ""]


@pytest.mark.parametrize("way", ["plaintext", "proxy"])
def test_a_client_that_leaves_stops_the_engine_and_frees_its_only_slot(plain: LocalEnclave, way: str) -> None:
    """Were it not stopped, the next one would wait until the long answer's end."""
    long: dict[str, Any] = {**ASK, "max_tokens": 1000, "logit_bias": {"2": -100}}
    with (
        both_ways(plain) as ways,
        httpx2.Client(base_url=ways[way], headers=KEY, timeout=120, trust_env=False) as client,
    ):

        def seconds(body: dict[str, Any]) -> tuple[float, int]:
            began = time.monotonic()
            answer = client.post("/v1/completions", json=body)
            return time.monotonic() - began, answer.json()["usage"]["completion_tokens"]

        whole, tokens = seconds(long)
        assert tokens == 1000
        with client.stream("POST", "/v1/completions", json={**long, "stream": True}) as answer:
            first = next(line for line in answer.iter_lines() if line.startswith("data: "))
            assert json.loads(first[6:])["choices"][0]["finish_reason"] is None
        after, tokens = seconds({**ASK, "max_tokens": 1})
    assert tokens == 1
    assert after < whole / 2, (after, whole)
