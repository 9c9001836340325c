import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from tests.cli.conftest import Enclave
from typer.testing import Result

Run = Callable[..., Result]
Start = Callable[..., tuple[subprocess.Popen[str], str, str]]


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Start]:
    """Starts the proxy as a process; gives the process, its base address and the curl line it printed."""
    processes = []

    def start(*arguments: str) -> tuple[subprocess.Popen[str], str, str]:
        command = [
            sys.executable,
            "-c",
            "from cloister.cli.main import main; main()",
            "connect",
            *arguments,
            "--port",
            "0",
        ]
        environment = {**os.environ, "HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
        )
        processes.append(process)
        assert process.stdout
        ready, curl = process.stdout.readline(), process.stdout.readline()
        assert ready.startswith("ready http://127.0.0.1:")
        return process, ready.split()[1], curl

    yield start
    for process in processes:
        process.kill()
        process.communicate()


QUESTION = {"model": "default", "messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.timeout(120)
def test_verifies_then_serves_until_ctrl_c(enclave: Enclave, connect: Start) -> None:
    process, base, curl = connect(enclave.url, *enclave.trusted)
    answer = httpx2.post(f"{base}/chat/completions", json=QUESTION).json()
    assert answer["choices"][0]["message"]["content"] == "You said hello."
    assert curl.startswith(f"curl {base}/chat/completions ")
    json.loads(curl[curl.index("{") : curl.rindex("}") + 1])
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130
    assert error.startswith("SIMULATED  sim, deployment laptop")
    assert "Traceback" not in error


@pytest.mark.timeout(120)
def test_first_use_is_said_before_anything_is_served(
    run: Run, enclave: Enclave, connect: Start, tmp_path: Path
) -> None:
    policy = tmp_path / "p.toml"
    assert run("policy", "init", "--from", enclave.url, "-o", policy, *enclave.trusted).exit_code == 0
    accepted = tmp_path / "accepted.toml"
    accepted.write_text(policy.read_text().replace('trust = "first-use"\n', ""))
    for file, said in ((policy, True), (accepted, False)):
        process, _, _ = connect(enclave.url, "--policy", str(file))
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
        assert ("FIRST USE" in error) == said, error


@pytest.mark.timeout(120)
def test_its_own_key_goes_in_place_of_the_tools(start_enclave: Callable[..., Enclave], connect: Start) -> None:
    enclave = start_enclave(api_key="ck-right")
    _, base, _ = connect(enclave.url, *enclave.trusted, "--api-key", "ck-right")
    headers = {"Authorization": "Bearer sk-dummy"}
    assert httpx2.post(f"{base}/chat/completions", json=QUESTION, headers=headers).status_code == 200


@pytest.mark.timeout(120)
def test_the_web_chats_address_opens_it_once_and_then_another_is_shown(
    enclave: Enclave, connect: Start, tmp_path: Path
) -> None:
    process, base, _ = connect(enclave.url, *enclave.trusted)
    assert process.stdout
    address, _, token = process.stdout.readline().removeprefix("web chat ").strip().partition("#")
    origin = base.removesuffix("/v1")
    assert address == f"{origin}/chat"
    assert httpx2.get(address).headers["content-type"].startswith("text/html")
    with httpx2.Client(base_url=origin) as browser:
        bound = {"x-cloister-binding": browser.post("/chat/session", json={"token": token}).json()["binding"]}
        assert browser.get("/chat/key", headers=bound).status_code == 200
    assert httpx2.post(f"{origin}/chat/session", json={"token": token}).status_code == 401
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    (told,) = [line for line in error.splitlines() if line.startswith("web chat, for another browser: ")]
    assert told.partition("#")[2] not in ("", token)


def test_serves_nothing_when_the_enclave_is_not_trusted(run: Run, enclave: Enclave) -> None:
    ran = run("connect", enclave.url, "--port", "0")
    assert (ran.exit_code, ran.stdout) == (3, "")


def test_a_taken_port_is_wrong_use(run: Run, enclave: Enclave) -> None:
    port = enclave.url.rpartition(":")[2]
    assert run("connect", enclave.url, "--port", port, *enclave.trusted).exit_code == 2
