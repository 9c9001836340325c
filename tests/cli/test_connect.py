import json
import os
import shlex
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
from tests.cli.conftest import MODEL, Enclave
from tests.client.deployment import Deployment, InnerApp, Served
from typer.testing import Result

from cloister.cli.connect import sixth
from cloister.cli.ownkey import curl_option, take_key, text_of
from cloister.errors import WrongUse
from cloister.evidence.launch import App
from cloister.host.process import listen
from cloister.sim import Device

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


@pytest.mark.timeout(120)
def test_a_required_key_is_made_once_and_shown_once_with_settings_that_work(
    enclave: Enclave, connect: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    file = tmp_path / ".local" / "state" / "cloister" / "proxy.key"
    shown = []
    for _ in range(2):
        process, base, curl = connect(enclave.url, *enclave.trusted, "--require-key")
        ran = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, timeout=60, check=True)
        assert json.loads(ran.stdout)["choices"][0]["message"]["content"]
        key = file.read_text().strip()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert httpx2.post(f"{base}/chat/completions", json=QUESTION).json()["error"]["code"] == "proxy_key"
        headers = {"Authorization": f"Bearer {key}"}
        assert httpx2.post(f"{base}/chat/completions", json=QUESTION, headers=headers).status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stderr is not None
        told, noted = process.stdout.read(), process.stderr.read()  # `communicate` would lose what was read ahead
        shown.append((f"key {key}" in told.splitlines(), key in curl + noted, str(file) in noted))
    assert shown == [(True, False, True), (False, False, True)]


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_elsewhere_than_on_linux_the_proxy_asks_for_a_key_by_itself(
    platform: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert take_key(platform="linux") is None
    assert not list(tmp_path.iterdir())
    key = take_key(platform=platform)
    assert key is not None
    assert text_of(key) == (tmp_path / "cloister" / "proxy.key").read_text().strip()
    assert (text_of(None), curl_option(None)) == ("", "")


@pytest.mark.timeout(120)
def test_an_app_of_somebodys_own_gets_an_address_for_its_pages_and_no_web_chat(tmp_path: Path, connect: Start) -> None:
    device = Device.open(tmp_path / "device")
    (tmp_path / "root.pem").write_bytes(device.root_pem)
    own = Deployment(device, InnerApp())
    own.launch = replace(own.launch, app=App("asgi", "66" * 32))
    addresses = []
    with Served(own.gateway) as served:
        for _ in range(2):
            process, base, told = connect(served.url, "--dangerously-trust-simulator", str(tmp_path / "root.pem"))
            assert told.startswith("app http://")
            host = told.removeprefix("app http://").strip().rstrip("/")
            assert httpx2.get(f"{base}/chat", headers={"accept": "*/*"}).json()["path"] == "/chat"
            assert httpx2.get(f"{base}/", headers={"host": host}).json()["path"] == "/"
            addresses.append(host.partition(":")[0])
            process.send_signal(signal.SIGINT)
            assert process.communicate()[0] == ""
    assert addresses[0] == addresses[1], "cookies and bookmarks outlive the command"


def test_an_apps_pages_are_not_offered_where_somebody_else_listens_on_the_other_loopback() -> None:
    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        try:
            other = listen("::1", port)
        except WrongUse:
            assert sixth(port) == [], "a machine without ::1"
            return
        with other, pytest.raises(WrongUse):
            sixth(port)
    (ours,) = sixth(port)
    ours.close()


def test_serves_nothing_when_the_enclave_is_not_trusted(run: Run, enclave: Enclave) -> None:
    ran = run("connect", enclave.url, "--port", "0")
    assert (ran.exit_code, ran.stdout) == (3, "")


def test_a_blocked_enclave_is_shown_with_the_lines_that_would_accept_it(
    run: Run, enclave: Enclave, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(
        f'version = 1\ndeployment = "other"\ndangerously_trust_simulator = "{enclave.root}"\n'
        'dangerously_tolerate_insecure = ["api-keys-off"]\n'
    )
    ran = run("connect", enclave.url, "--port", "0", "--policy", policy)
    assert (ran.exit_code, ran.stdout) == (3, "")
    assert "expected: other" in ran.stderr
    assert "got:      laptop" in ran.stderr
    assert ran.stderr.partition("with that policy.\n")[2] == 'deployment = "laptop"\n'


def test_a_taken_port_is_wrong_use(run: Run, enclave: Enclave) -> None:
    port = enclave.url.rpartition(":")[2]
    assert run("connect", enclave.url, "--port", port, *enclave.trusted).exit_code == 2


@pytest.mark.timeout(120)
def test_several_enclaves_answer_side_by_side_and_one_that_is_blocked_stops_no_other(
    start_enclave: Callable[..., Enclave], connect: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOISTER_API_KEY_OPEN", "ck-none")
    monkeypatch.setenv("CLOISTER_API_KEY_SHUT", "ck-right")
    policy = tmp_path / "other.toml"
    policy.write_text(f'version = 1\ndeployment = "other"\ndangerously_trust_simulator = "{tmp_path / "root.pem"}"\n')
    one, two = start_enclave(), start_enclave(api_key="ck-right")
    addresses = [f"open={one.url}", f"shut={two.url}"]
    process, base, _ = connect(*addresses, *one.trusted)
    assert process.stdout
    assert process.stdout.readline().startswith(f"models  curl {base}/models  (open ")
    for name, enclave in (("open", one), ("shut", two)):
        body = {**QUESTION, "model": f"{name}/{MODEL.name}"}
        assert httpx2.post(f"{base}/chat/completions", json=body).status_code == 200
        assert len(enclave.model.requests) == 1
    assert httpx2.get(base.replace("/v1", "/chat")).status_code == 404
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1].count("SIMULATED  sim") == 2
    process, base, _ = connect(*addresses, *one.trusted, "--policy-of", f"shut={policy}")
    body = {**QUESTION, "model": f"shut/{MODEL.name}"}
    refused = httpx2.post(f"{base}/chat/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (502, "enclave_not_trusted")
    assert httpx2.post(f"{base}/chat/completions", json=QUESTION).status_code == 200
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert "BLOCKED" in error
    assert "failed: deployment" in error
    assert 'deployment = "laptop"' in error
    assert len(two.model.requests) == 1


def test_nothing_is_served_when_all_are_blocked(run: Run, enclave: Enclave, nowhere: str) -> None:
    ran = run("connect", f"a={enclave.url}", f"b={nowhere}", "--port", "0")
    assert (ran.exit_code, ran.stdout) == (3, "")


@pytest.mark.parametrize(
    "words",
    [
        ["a={0}", "a={0}"],
        ["{0}", "{0}"],
        ["a={0}", "b={0}", "--api-key", "ck-one"],
        ["a={0}", "b={0}", "--policy-of", "c=p.toml"],
        ["a={0}", "b={0}", "--policy-of", "p.toml"],
        ["a=ftp://x"],
        [],
    ],
)
def test_what_cannot_be_told_apart_is_wrong_use(run: Run, enclave: Enclave, words: list[str]) -> None:
    ran = run("connect", *(word.format(enclave.url) for word in words), "--port", "0", *enclave.trusted)
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert "ck-one" not in ran.output
    assert enclave.gateway.paths == []


def test_a_service_starts_the_same_again(run: Run, enclave: Enclave, tmp_path: Path) -> None:
    policy = tmp_path / "a policy's 100%.toml"
    url = "https://chat.example/#owner=ed25519:" + "A" * 43 + "&deployment=acme-chat"
    ran = run(
        "connect", url, "--policy", policy, "--port", "8500", "--require-pq", "--api-key", "ck-x", "--print-service"
    )
    assert ran.exit_code == 0
    assert "ck-x" not in ran.output
    command = next(line for line in ran.stdout.splitlines() if line.startswith("ExecStart="))
    assert "100%%.toml" in command, "systemd has words of its own behind one"
    words = [word.replace("%%", "%") for word in shlex.split(command.removeprefix("ExecStart="))]
    assert Path(words[0]).name == "cloister"
    assert words[1:] == ["connect", url, "--port", "8500", "--policy", str(policy), "--require-pq"]
    assert enclave.gateway.paths == []


def test_a_service_for_several_names_each(run: Run, tmp_path: Path) -> None:
    words = ["connect", "a=https://a.example", "https://b.example:8443", "--policy-of", "a=p.toml", "--print-service"]
    ran = run(*words, "--dangerously-trust-simulator", "root.pem")
    (command,) = [line for line in ran.stdout.splitlines() if line.startswith("ExecStart=")]
    assert shlex.split(command)[1:] == [
        *("connect", "a=https://a.example", "https://b.example:8443", "--port", "8484"),
        *("--policy-of", f"a={Path.cwd() / 'p.toml'}", "--dangerously-trust-simulator", str(Path.cwd() / "root.pem")),
    ]


@pytest.mark.parametrize("url", ["https://a.example/\nExecStartPre=/bin/true", "https://a.example/\x1b[2J"])
def test_no_address_writes_a_line_of_its_own(run: Run, url: str) -> None:
    ran = run("connect", url, "--print-service")
    assert (ran.exit_code, ran.stdout) == (2, "")
