"""An enclave that was started with `--tls`: the certificate that `cloister verify --save-cert` saves, and what works with it."""

import json
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
from tests.cli.running import run
from tests.end_to_end.tenants import ALICE, ALICE_HASH
from tests.system.shell import tool

from cloister.cli.certificate import keep_certificate
from cloister.cli.local import LocalEnclave, Plan, write_root
from cloister.cli.main import app
from cloister.cli.sealed import LocalApp, config_for
from cloister.client import SealedTransport, Session
from cloister.enclave.boot import KeyHash
from cloister.errors import VerificationFailed
from cloister.models.download import resolve
from cloister.owner.appfile import read_appfile
from cloister.owner.package import package
from cloister.owner.provision import contents, provision

ASK = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
KEY = {"Authorization": f"Bearer {ALICE}"}


@pytest.fixture(scope="module")
def speaking(state: Path) -> Iterator[LocalEnclave]:
    plan = Plan.make(resolve("tiny"), slots=2, keys=(KeyHash("alice", ALICE_HASH),), tls=True)
    with LocalEnclave(plan) as running:
        running.start()
        yield running


@pytest.fixture(scope="module")
def trusted(speaking: LocalEnclave, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options of a client that tolerates TLS."""
    policy = tmp_path_factory.mktemp("policy") / "policy.toml"
    policy.write_text(
        f'version = 1\ndeployment = "local"\nowner_key = "{speaking.plan.owner}"\n'
        f'dangerously_trust_simulator = "{write_root(speaking.device)}"\ndangerously_tolerate_insecure = ["tls"]\n'
    )
    return ["--policy", str(policy)]


@pytest.fixture(scope="module")
def certificate(speaking: LocalEnclave, trusted: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("certificate") / "cert.pem"
    saved = run(app, "verify", speaking.url, *trusted, "--save-cert", str(path))
    assert saved.exit_code == 0, saved.output
    assert f"curl --cacert {path} {speaking.tls_origins[1]}/v1/models" in saved.stderr
    return path


def client(certificate: Path) -> httpx2.Client:
    return httpx2.Client(verify=ssl.create_default_context(cafile=str(certificate)), timeout=60, trust_env=False)


def test_the_statement_names_the_key_the_listener_and_the_weakness(speaking: LocalEnclave) -> None:
    with Session(speaking.url, policy=speaking.policy) as session:
        verified = session.verify()
    assert verified.statement.insecure == ("tls",)
    assert verified.statement.tls_spki is not None
    assert verified.statement.aud == speaking.tls_origins
    assert verified.to_json()["tls_spki"] == verified.statement.tls_spki


def test_a_client_whose_policy_does_not_name_it_refuses_the_enclave(speaking: LocalEnclave, tmp_path: Path) -> None:
    strict = replace(speaking.policy, tolerate_insecure=frozenset())
    with Session(speaking.url, policy=strict) as session, pytest.raises(VerificationFailed) as caught:
        session.verify()
    assert "insecure.tls" in str(caught.value)
    path = tmp_path / "cert.pem"
    root = ["--dangerously-trust-simulator", str(write_root(speaking.device))]
    refused = run(app, "verify", speaking.url, *root, "--save-cert", str(path))
    assert refused.exit_code == 3
    assert not path.exists()


def test_the_same_answer_with_and_without_the_seal(speaking: LocalEnclave, certificate: Path) -> None:
    with (
        Session(speaking.url, policy=speaking.policy) as session,
        httpx2.Client(transport=SealedTransport(session), base_url="http://enclave.invalid", timeout=60) as sealed,
    ):
        expected = sealed.post("/v1/completions", json=ASK, headers=KEY).json()["choices"]
    with client(certificate) as plain:
        for origin in speaking.tls_origins:
            assert plain.post(f"{origin}/v1/completions", json=ASK, headers=KEY).json()["choices"] == expected
    assert expected[0]["text"]


def test_api_keys_are_asked_for_as_ever(speaking: LocalEnclave, certificate: Path) -> None:
    with client(certificate) as plain:
        answer = plain.post(f"{speaking.tls_origins[0]}/v1/completions", json=ASK)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.system
def test_curl_needs_nothing_but_the_saved_certificate(speaking: LocalEnclave, certificate: Path) -> None:
    command = [
        tool("curl"),
        "-sS",
        "--noproxy",
        "*",
        "--cacert",
        str(certificate),
        "-H",
        f"Authorization: Bearer {ALICE}",
    ]
    for origin in speaking.tls_origins:
        said = subprocess.run([*command, f"{origin}/v1/models"], capture_output=True, text=True, check=True)
        assert json.loads(said.stdout)["data"][0]["id"] == "tiny"
    streamed = json.dumps({**ASK, "stream": True})
    address = f"{speaking.tls_origins[0]}/v1/completions"
    said = subprocess.run(
        [*command, "-H", "Content-Type: application/json", "-d", streamed, address],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.splitlines()[-2] == "data: [DONE]"
    without = [tool("curl"), "-sS", "--noproxy", "*", f"{speaking.tls_origins[0]}/v1/models"]
    assert subprocess.run(without, capture_output=True, check=False).returncode == 60  # nobody vouches for it


def test_the_file_is_whole_private_and_holds_no_key(certificate: Path) -> None:
    assert stat.S_IMODE(certificate.stat().st_mode) == 0o600
    assert certificate.read_text().startswith("-----BEGIN CERTIFICATE-----\n")
    assert certificate.read_text().count("-----BEGIN") == 1


MIDDLE = """
import asyncio, sys, time
from cloister.enclave.gateway.certificate import TlsKey
async def serve(reader, writer):
    await reader.read(1)
    writer.close()
async def main():
    context = TlsKey(("https://localhost:8443", "https://127.0.0.1:8443"), time.time()).context
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


@pytest.fixture
def middle() -> Iterator[str]:
    """Somebody who ends TLS with a certificate of their own, just like the enclave's but for the key."""
    process = subprocess.Popen([sys.executable, "-c", MIDDLE], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield f"127.0.0.1:{process.stdout.readline().strip()}"
    process.kill()
    process.communicate()


def test_a_middle_that_ends_tls_itself_is_refused_and_nothing_is_written(
    speaking: LocalEnclave, trusted: list[str], certificate: Path, middle: str, tmp_path: Path
) -> None:
    path = tmp_path / "cert.pem"
    for before in (None, "the one that was saved before"):
        if before:
            path.write_text(before)
        refused = run(app, "verify", speaking.url, *trusted, "--save-cert", str(path), "--tls", middle)
        assert refused.exit_code == 3
        assert "The TLS key is not the enclave's" in refused.stderr
        assert "VERIFIED" not in refused.stdout
        assert (path.read_text() if path.exists() else None) == before
    assert list(tmp_path.iterdir()) == [path]
    with client(certificate) as plain, pytest.raises(httpx2.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        plain.get(f"https://{middle}/v1/models", headers=KEY)


# A sealed Python app

APP = """
import json
def app(environ, start_response):
    body = environ["wsgi.input"].read()
    start_response("200 OK", [("content-type", "application/json")])
    found = {"said": body.decode(), "scheme": environ["wsgi.url_scheme"], "from": environ["REMOTE_ADDR"]}
    found["host"] = environ["HTTP_HOST"]
    return [json.dumps(found).encode()]
"""


@pytest.fixture
def sealed(tmp_path: Path, state: Path) -> Iterator[LocalApp]:
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "cloister.toml").write_text('name = "echo"\napp = "main:app"\nkind = "wsgi"\n')
    (folder / "main.py").write_text(APP)
    described = read_appfile(folder)
    made = package(described, tmp_path / "echo.cloister", state=tmp_path / "keys", model=None)
    with LocalApp(made.path, made.head, config_for(made.head, tls=True), deployment="echo") as running:
        running.start()
        given = contents(described, made.keys, secrets={}, now=time.time())
        provision(running.url, policy=running.policy, owner=running.owner, release=given)
        running.wait_ready()
        yield running


def test_a_sealed_python_app_answers_by_tls_too(sealed: LocalApp, tmp_path: Path) -> None:
    with Session(sealed.url, policy=sealed.policy) as session:
        verified = session.verify()
    assert "tls" in verified.statement.insecure
    path = tmp_path / "cert.pem"
    keep_certificate(path, verified, sealed.url)
    with client(path) as plain:
        origin = verified.statement.aud[0]
        answer = plain.post(f"{origin}/echo", content=b"hello").json()
    assert answer == {"said": "hello", "scheme": "https", "from": "", "host": origin.removeprefix("https://")}
