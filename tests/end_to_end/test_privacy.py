"""What nobody but the person asking may see: in transit, across tenants, in logs and cores."""

import base64
import json
import re
import secrets
import subprocess
import sys
from pathlib import Path

import httpx2
from tests.end_to_end.tenants import ALICE, BOB

from cloister.cli.local import LocalEnclave, Plan, policy_for
from cloister.client import SealedTransport, Session
from cloister.host.relay import Relay
from cloister.models.download import resolve
from cloister.sim import Device

CANARY = "zanzibar-quetzal-7741"


def _client(url: str, plan: LocalEnclave, key: str = "none") -> httpx2.Client:
    transport = SealedTransport(Session(url, policy=plan.policy, reuse_cache=False))
    return httpx2.Client(
        transport=transport,
        base_url="http://enclave.invalid",
        headers={"authorization": f"Bearer {key}"},
        timeout=60,
    )


def test_a_recording_hop_sees_no_prompt_answer_model_path_or_key(keyed_enclave: LocalEnclave) -> None:
    relay = Relay(keyed_enclave.port)
    relay.start()
    try:
        with _client(f"http://127.0.0.1:{relay.port}", keyed_enclave, ALICE) as client:
            body = {"model": "tiny", "prompt": CANARY, "max_tokens": 32, "stream": False}
            whole = client.post("/v1/completions", json=body)
            stream = client.post("/v1/completions", json={**body, "stream": True})
        seen = b"".join(record.data for record in relay.take())
    finally:
        relay.stop()
    assert whole.status_code == stream.status_code == 200
    answer = whole.json()["choices"][0]["text"]
    assert len(seen) > 4000
    for secret in (CANARY, ALICE, "/v1/", "completions", '"tiny"', "data: {", answer[:12]):
        assert secret.encode() not in seen
    # The attestation document names the model in base64: that it is public does not make the request's copy visible.
    assert b"authorization" not in seen.lower()


def _ask(client: httpx2.Client, secret: str | None) -> dict[str, int]:
    headers = {"cloister-cache-secret": secret} if secret else {}
    body = {"model": "tiny", "prompt": [70 + n % 50 for n in range(400)], "max_tokens": 1}
    usage = client.post("/v1/completions", json=body, headers=headers).json()["usage"]
    return {"prompt": usage["prompt_tokens"], "cached": usage["prompt_tokens_details"]["cached_tokens"]}


def _secret() -> str:
    return base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()


def test_two_principals_share_no_cached_prefix(keyed_enclave: LocalEnclave) -> None:
    shared = _secret()
    with (
        _client(keyed_enclave.url, keyed_enclave, ALICE) as alice,
        _client(keyed_enclave.url, keyed_enclave, BOB) as bob,
    ):
        first = _ask(alice, shared)
        assert first["prompt"] == 400
        assert first["cached"] == 0
        assert _ask(bob, shared)["cached"] == 0
        assert _ask(alice, _secret())["cached"] == 0
        assert _ask(alice, None)["cached"] == 0
        assert _ask(alice, shared)["cached"] >= 300  # the same key and the same secret: only then


def test_an_unknown_key_is_refused(keyed_enclave: LocalEnclave) -> None:
    with _client(keyed_enclave.url, keyed_enclave, "ck-guessed") as client:
        assert client.get("/v1/models").status_code == 401


def test_no_canary_in_logs_errors_or_health(state: Path) -> None:
    """The enclave as a process of its own, everything it prints caught; asked well, badly, and while it dies."""
    script = (
        "import sys, os, json\n"
        "from cloister.cli.local import LocalEnclave, Plan\n"
        "from cloister.models.download import resolve\n"
        "with LocalEnclave(Plan.make(resolve('tiny'), slots=2)) as enclave:\n"
        "    enclave.start()\n"
        "    print(json.dumps([enclave.url, enclave.process.process.pid]), flush=True)\n"
        "    sys.stdin.read()\n"
    )
    ran = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert ran.stdout is not None
    assert ran.stdin is not None
    url, pid = json.loads(ran.stdout.readline())
    plan = Plan.make(resolve("tiny"), slots=2)
    policy = policy_for(plan, Device.open(state / "cloister" / "sim").root_pem)
    bodies = []
    with httpx2.Client(
        transport=SealedTransport(Session(url, policy=policy)), base_url="http://enclave.invalid", timeout=60
    ) as client:
        headers = {"authorization": f"Bearer {CANARY}", "x-api-key": CANARY}
        for body in (
            {"model": "default", "prompt": CANARY, "max_tokens": 4},
            {"model": CANARY, "prompt": CANARY},
            {"model": "default", "prompt": CANARY, "temperature": CANARY},
            {"model": "default", "messages": CANARY},
        ):
            answer = client.post("/v1/completions", json=body, headers=headers)
            if answer.status_code != 200:
                bodies.append(answer.text)
        bodies.append(client.post("/v1/chat/completions", content=CANARY, headers=headers).text)
        bodies.append(client.get(f"/v1/models/{CANARY}", headers=headers).text)
    limits = Path(f"/proc/{pid}/limits").read_text()
    bodies.extend(httpx2.get(f"{url}/{path}").text for path in ("healthz", "readyz", "metrics", CANARY))
    _out, err = ran.communicate("")
    assert re.search(r"Max core file size\s+0\s+0", limits)
    assert len(bodies) >= 9
    for text in (*bodies, err):
        assert CANARY not in text


def test_no_core_files_of_front_or_engine(enclave: LocalEnclave) -> None:
    process = enclave.process.process
    assert process is not None
    pids = [process.pid, *_children(process.pid)]
    assert len(pids) >= 2
    for pid in pids:
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert re.search(r"Max core file size\s+0\s+0", limits)


def _children(pid: int) -> list[int]:
    threads = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for thread in threads for child in (thread / "children").read_text().split()]
