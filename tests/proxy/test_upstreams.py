"""Several enclaves behind one proxy: each by itself, and each asked for its own models only."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import httpx2
import pytest
from tests.client.deployment import Deployment, Served
from tests.verify.world import ENGINE, MODEL

from cloister.client import AsyncSession
from cloister.evidence.binding import report_data
from cloister.evidence.document import Document, Item
from cloister.evidence.launch import launch_digest
from cloister.evidence.statement import EngineStatement, ModelStatement, Statement
from cloister.proxy import ProxyConfig, Upstream, create_proxy
from cloister.proxy.upstreams import Upstreams
from cloister.sim import Device


class Named(Deployment):
    """One whose statement names models of its own, and whose API lists them. `seen`: paths, bodies and keys."""

    def __init__(self, device: Device, *models: str) -> None:
        self.models = models
        self.seen: list[tuple[str, dict[str, Any], str]] = []
        super().__init__(device, self._api)

    async def _api(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive()).get("body", b"")
        headers = dict(scope["headers"])
        keys = [value.decode() for name, value in scope["headers"] if name in (b"authorization", b"x-api-key")]
        self.seen.append((scope["path"], json.loads(body or b"{}"), " ".join(keys)))
        data = [{"id": name, "object": "model"} for name in self.models]
        told = {"object": "list", "data": data} if scope["path"] == "/v1/models" else {"said": body.decode()}
        if b"anthropic-version" in headers and scope["path"] == "/v1/models":
            told = {"data": data, "has_more": False, "first_id": self.models[0], "last_id": self.models[-1]}
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": json.dumps(told).encode()})

    async def attest(self, nonce: bytes) -> bytes:
        self.attested += 1
        launch = self.launch.encode()
        statement = Statement(
            purpose="serve",
            aud=(),
            launch_sha256=launch_digest(launch).hex(),
            iat=int(self.now()),
            exp=int(self.ring.expires_at),
            ohttp_keys=self.ring.ohttp_keys,
            receipt_key=bytes(32),
            engine=EngineStatement(ENGINE, "avx2"),
            models=tuple(ModelStatement(name, MODEL, "q8_0") for name in self.models),
        ).encode()
        with self.device.launch(self.measurement, launch_digest(launch)) as enclave:
            evidence = enclave.report(report_data(nonce, statement))
        items = {"statement": Item("application/json", statement), "launch": Item("application/json", launch)}
        return Document({**items, **evidence}).encode()

    def bodies(self) -> list[dict[str, Any]]:
        return [body for path, body, _ in self.seen if path == "/v1/chat/completions"]


@dataclass
class Pair:
    http: httpx2.Client
    one: Named
    two: Named

    def ask(self, model: Any, **more: Any) -> httpx2.Response:
        return self.http.post("/v1/chat/completions", json={"model": model, "messages": [], **more})


@pytest.fixture
def pair(device: Device) -> Iterator[Pair]:
    """`one` has small and shared, `two` has large, shared and org/deep."""
    one, two = Named(device, "small", "shared"), Named(device, "large", "shared", "org/deep")
    with ExitStack() as running:
        upstreams = [
            Upstream(
                name,
                AsyncSession(running.enter_context(Served(each.gateway)).url, policy=each.policy, pin_measurement=True),
                key,
            )
            for name, each, key in (("one", one, ""), ("two", two, "ck-two"))
        ]
        served = running.enter_context(
            Served(None, port_of=lambda port: create_proxy(upstreams, ProxyConfig(port=port)))
        )
        yield Pair(running.enter_context(httpx2.Client(base_url=served.url, trust_env=False, timeout=60)), one, two)


def test_a_request_goes_to_the_enclave_whose_model_it_names(pair: Pair) -> None:
    for model in ("small", "large", "org/deep"):
        assert pair.ask(model).status_code == 200
    assert [body["model"] for body in pair.one.bodies()] == ["small"]
    assert [body["model"] for body in pair.two.bodies()] == ["large", "org/deep"]


def test_a_name_that_two_have_is_asked_for_with_the_enclaves(pair: Pair) -> None:
    refused = pair.ask("shared")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "model_ambiguous")
    assert "one/shared or two/shared" in refused.json()["error"]["hint"]
    assert pair.ask("two/shared", temperature=0.25).status_code == 200
    assert pair.ask("one/small").status_code == 200
    assert pair.two.bodies() == [{"model": "shared", "messages": [], "temperature": 0.25}]
    assert pair.one.bodies() == [{"model": "small", "messages": []}]


def test_no_enclave_draws_in_what_is_meant_for_another_by_its_models_name(pair: Pair) -> None:
    pair.one.models = ("small", "two/large", "one/own")
    assert pair.ask("two/large").status_code == 200
    assert pair.ask("one/own").status_code == 200
    assert [body["model"] for body in pair.two.bodies()] == ["large"]
    assert [body["model"] for body in pair.one.bodies()] == ["one/own"]


@pytest.mark.parametrize("model", ["default", "", None, 7, ["large"]])
def test_what_names_no_model_goes_to_the_first(pair: Pair, model: Any) -> None:
    assert pair.ask(model).status_code == 200
    assert pair.http.post("/tokenize", json={"content": "a"}).status_code == 200
    assert [path for path, _, _ in pair.one.seen] == ["/v1/chat/completions", "/tokenize"]
    assert pair.two.seen == []


def test_what_is_no_json_goes_to_the_first(pair: Pair) -> None:
    sent = {"content-type": "application/json"}
    for content in (b"{", b"\xff", b"[" * 50_000, b"[]"):
        pair.http.post("/v1/chat/completions", content=content, headers=sent)
    assert pair.two.seen == []
    assert pair.two.attested == 0


def test_a_model_that_nobody_has_is_not_found(pair: Pair) -> None:
    refused = pair.ask("nobody/has-it")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    told = pair.http.post("/v1/messages", json={"model": "none"}).json()
    assert (told["type"], told["error"]["type"]) == ("error", "not_found_error")
    assert pair.one.seen == pair.two.seen == []


def test_one_model_is_looked_up_where_it_is(pair: Pair) -> None:
    for model in ("org%2Fdeep", "org/deep", "two/shared"):
        assert pair.http.get(f"/v1/models/{model}").status_code == 200
    assert [path for path, _, _ in pair.two.seen] == ["/v1/models/org/deep"] * 2 + ["/v1/models/shared"]
    assert pair.one.seen == []


def test_models_are_listed_together_and_clashes_told_apart(pair: Pair) -> None:
    told = pair.http.get("/v1/models").json()
    assert [one["id"] for one in told["data"]] == ["small", "one/shared", "large", "two/shared", "org/deep"]
    assert "left_out" not in told
    page = pair.http.get("/v1/models", headers={"anthropic-version": "2023-06-01"}).json()
    assert (page["first_id"], page["last_id"], len(page["data"])) == ("small", "org/deep", 5)
    for model in (one["id"] for one in told["data"]):
        assert pair.ask(model).status_code == 200


def test_each_gets_its_own_key_and_the_tools_where_it_has_none(pair: Pair) -> None:
    pair.http.headers.update({"authorization": "Bearer sk-tool", "x-api-key": "sk-tool"})
    for model in ("small", "large"):
        pair.ask(model)
    assert ([key for *_, key in pair.one.seen], [key for *_, key in pair.two.seen]) == (
        ["Bearer sk-tool sk-tool"],
        ["Bearer ck-two"],
    )


def test_one_that_is_blocked_keeps_no_other_from_answering(pair: Pair) -> None:
    """And what was meant for it goes nowhere else."""
    pair.two.launch = replace(pair.two.launch, deployment="another")
    assert pair.ask("small").status_code == 200
    for model in ("large", "two/large"):
        refused = pair.ask(model)
        assert refused.status_code in (404, 502)
    assert pair.ask("two/large").json()["error"]["code"] == "enclave_not_trusted"
    listed = pair.http.get("/v1/models").json()
    assert [one["id"] for one in listed["data"]] == ["small", "shared"]
    assert listed["left_out"] == {"two": "enclave_not_trusted"}
    assert [body["model"] for body in pair.one.bodies()] == ["small"]
    assert pair.two.seen == []


def test_one_that_changes_later_is_blocked_by_itself(pair: Pair) -> None:
    assert pair.ask("large").status_code == 200
    pair.two.measurement = replace(pair.two.measurement, code=f"sha256:{'99' * 32}")
    pair.two.renew_keys()
    assert pair.ask("large").json()["error"]["code"] == "enclave_not_trusted"
    assert pair.ask("large").json()["error"]["code"] == "enclave_not_trusted", "its models stay its own"
    assert pair.ask("small").status_code == 200
    assert len(pair.two.bodies()) == 1


def test_the_verification_of_all_is_as_good_as_the_worst(pair: Pair) -> None:
    answer = pair.http.get("/verification?explain")
    told = answer.json()
    assert (answer.status_code, told["verdict"]) == (200, "simulated")
    assert [model["name"] for model in told["upstreams"]["two"]["models"]] == ["large", "shared", "org/deep"]
    assert told["upstreams"]["one"]["explained"]["word"] == "SIMULATED"
    one = pair.http.get("/verification?upstream=one").json()
    assert one == {key: told["upstreams"]["one"][key] for key in one}
    pair.two.launch = replace(pair.two.launch, deployment="another")
    answer = pair.http.get("/verification?fresh")
    told = answer.json()
    assert (answer.status_code, told["verdict"]) == (502, "not-verified")
    assert told["upstreams"]["one"]["verdict"] == "simulated"
    assert told["upstreams"]["two"]["verdict"] == "not-verified"
    assert told["upstreams"]["two"]["error"]["code"] == "enclave_not_trusted"
    assert pair.http.get("/verification?upstream=two").status_code == 502
    assert pair.http.get("/verification?upstream=three").status_code == 404


def test_the_status_names_each(pair: Pair) -> None:
    pair.ask("two/large")
    told = pair.http.get("/").json()["upstreams"]
    assert (told["one"]["verdict"], told["two"]["verdict"]) == ("not verified yet", "simulated")
    assert told["two"]["models"] == ["large", "shared", "org/deep"]


def test_names_are_ones_own(device: Device) -> None:
    session = AsyncSession("http://127.0.0.1:1", policy=Deployment(device).policy)
    for upstreams in ([], [Upstream("a", session), Upstream("a", session)]):
        with pytest.raises(ValueError, match="names of their own"):
            Upstreams(upstreams)
