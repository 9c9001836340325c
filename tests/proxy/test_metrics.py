"""/metrics: counts, sizes, times and what is verified; nothing of what was said."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from tests.cli.conftest import wait_for
from tests.client.deployment import HANG, Deployment, InnerApp, Served

from cloister.proxy.metrics import Histogram

CANARY = "zanzibar-quetzal-7741"
_SAMPLE = re.compile(r'[a-z_]+(\{[a-z]+="[^"\\\n]*"(,[a-z]+="[^"\\\n]*")*\})? [0-9.e+-]+')


@pytest.fixture
def http(proxy: Served) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=proxy.url, trust_env=False) as client:
        yield client


def samples(http: httpx2.Client) -> dict[str, float]:
    answer = http.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = {}
    for line in answer.text.splitlines():
        if not line.startswith("#"):
            assert _SAMPLE.fullmatch(line), line
            name, _, value = line.rpartition(" ")
            found[re.sub(r'upstream="[^"]*"', "upstream", name)] = float(value)
    return found


def test_counts_what_was_answered_and_how_much(http: httpx2.Client) -> None:
    before = samples(http)
    assert before["cloister_proxy_upstream_verified{upstream}"] == 0
    content = b'{"model": "demo"}'
    answer = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    looks = [before]  # the client sees an answer's end before the proxy is done with it

    def settled() -> bool:
        looks.append(samples(http))
        return looks[-1]["cloister_proxy_running"] == 1  # the look at the metrics itself

    wait_for(settled)
    now, answers = looks[-1], len(looks)  # the looks but the last, and the answer
    assert now['cloister_proxy_requests_total{route="/v1/completions"}'] == 1
    assert now["cloister_proxy_request_bytes_total"] == len(content)
    assert now["cloister_proxy_response_bytes_total"] > before["cloister_proxy_response_bytes_total"] + len(
        answer.content
    )
    assert now['cloister_proxy_responses_total{status="200"}'] == answers
    assert now["cloister_proxy_answer_seconds_count"] == now["cloister_proxy_head_seconds_count"] == answers
    assert now['cloister_proxy_answer_seconds_bucket{le="+Inf"}'] == answers
    assert now["cloister_proxy_upstream_verified{upstream}"] == now["cloister_proxy_upstream_simulated{upstream}"] == 1
    assert now["cloister_proxy_upstream_verified_until_seconds{upstream}"] > 1.7e9


def test_counts_refusals_cancels_and_breaks(http: httpx2.Client, deployment: Deployment) -> None:
    assert isinstance(deployment.app, InnerApp)
    with http.stream("POST", "/v1/endless", json={}) as answer:
        next(answer.iter_bytes())
    assert deployment.app.ended.wait(HANG)
    with http.stream("POST", "/v1/breaks-late", json={}) as answer, pytest.raises(httpx2.RemoteProtocolError):
        answer.read()
    http.post("/v1/echo", content=b"{}", headers={"content-type": "text/plain"})
    wait_for(lambda: samples(http)["cloister_proxy_running"] == 1)
    deployment.launch = replace(deployment.launch, deployment="another")
    deployment.renew_keys()
    assert http.get("/v1/models").status_code == 502
    now = samples(http)
    assert (now["cloister_proxy_cancelled_total"], now["cloister_proxy_broken_total"]) == (1, 1)
    assert now['cloister_proxy_refused_total{code="media_type"}'] == 1
    assert now['cloister_proxy_refused_total{upstream,code="enclave_not_trusted"}'] == 1
    assert now["cloister_proxy_upstream_verified{upstream}"] == 0


def test_holds_nothing_that_was_said(http: httpx2.Client, deployment: Deployment) -> None:
    chat: Any = {"model": CANARY, "messages": [{"role": "user", "content": CANARY}], CANARY: CANARY}
    http.post("/v1/chat/completions", json=chat)
    http.post("/v1/chat/completions", json={**chat, "stream": True})
    http.post("/v1/breaks-early", json=chat)
    http.get(f"/v1/models/{CANARY}?{CANARY}={CANARY}", headers={CANARY: CANARY, "authorization": f"Bearer {CANARY}"})
    http.get(f"/{CANARY}")
    http.request(CANARY.replace("-", "").upper(), "/v1/models")
    http.post("/v1/echo", content=CANARY, headers={"content-type": CANARY})
    http.get(f"/verification?upstream={CANARY}")
    assert isinstance(deployment.app, InnerApp)
    assert len(deployment.app.seen) == 4
    text = http.get("/metrics").text
    assert CANARY not in text
    assert CANARY.split("-")[0] not in text.lower()
    assert "demo" not in text, "the model's name"
    routes = set(re.findall(r'route="([^"]+)"', text))
    assert routes == {"/v1/chat/completions", "/v1/models", "other"}


def test_a_histograms_buckets_add_up() -> None:
    times = Histogram()
    for seconds in (0.0, 0.01, 0.02, 5.0, 1000.0):
        times.add(seconds)
    counted = {labels["le"]: value for name, labels, value in times.samples("x") if name == "x_bucket"}
    assert (counted["0.01"], counted["0.03"], counted["3.0"], counted["10.0"], counted["+Inf"]) == (2, 3, 3, 4, 5)
    assert ("x_sum", {}, 1005.03) in [*times.samples("x")]
