"""The measured image without the engine, for Python apps: built, predicted, booted, verified, released to, asked; and refused
when a byte of its command line is another one. Minutes: run by `make test-app-image`."""

import os
import shutil
import ssl
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from tests.system.image_stage import (
    FIRMWARE,
    MEMORY,
    TLS_ORIGINS,
    Built,
    Guest,
    Sealed,
    booted,
    build,
    failing,
    hosted,
    make_tpm,
    policy_text,
    seal,
    with_changed_command_line,
)
from tests.system.outside_stage import Outside, outside

from cloister.cli.vm_backend import VmBackend, VmSettings
from cloister.client import Session, http_client
from cloister.client.certificate import fetch_certificate
from cloister.errors import VerificationFailed
from cloister.evidence.launch import launch_digest, parse_launch
from cloister.host.backend import Spawn
from cloister.owner.appfile import read_appfile
from cloister.verify import Policy, parse_policy
from cloister.verify.tls import check_certificate

pytestmark = [pytest.mark.system, pytest.mark.app_image]

SECRET = "canary-in-a-secret-91ab"
APP_TOML = """
name = "words"
app = "words:app"
kind = "asgi"
secrets = ["WORD"]
egress = ["api.example.com:PORT"]
"""
APP = """
import asyncio, json, os, socket, ssl, urllib.request
from pathlib import Path

TRUSTED = ssl.create_default_context(cafile=Path(__file__).with_name("outside.crt"))
MEASURED = ssl.create_default_context()

def ask(context, host="api.example.com"):
    try:
        with urllib.request.urlopen(f"https://{host}:PORT/", context=context, timeout=100) as answer:
            return answer.read().decode()
    except OSError as error:
        return type(getattr(error, "reason", error)).__name__

def outside():
    return {
        "trusted": ask(TRUSTED),
        "stranger": ask(MEASURED),
        "undeclared": ask(TRUSTED, "www.example.com"),
        "authorities": len(MEASURED.get_ca_certs()),
    }

async def app(scope, receive, send):
    if scope["type"] == "http":
        body = os.environ["WORD"][-4:]
        if scope["path"] == "/outside":
            body = json.dumps(await asyncio.to_thread(outside))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body.encode()})
"""


@pytest.fixture(scope="module")
def built() -> Built:
    return build("--no-engine", "--packages", "any", name="app-image")


@pytest.fixture(scope="module")
def beyond(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    with outside(tmp_path_factory.mktemp("outside")) as found, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{found.programs}:{os.environ['PATH']}")
        yield found


@pytest.fixture(scope="module")
def sealed(beyond: Outside, tmp_path_factory: pytest.TempPathFactory) -> Sealed:
    folder = tmp_path_factory.mktemp("words")
    for name, content in (("cloister.toml", APP_TOML), ("words.py", APP)):
        (folder / name).write_text(content.replace("PORT", str(beyond.port)))
    shutil.copy(beyond.authority, folder / "outside.crt")
    return seal(folder, read_appfile(folder), tls=True)


@pytest.fixture(scope="module")
def machines(
    built: Built, sealed: Sealed, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[tuple[Guest, Policy], ...]]:
    """The image as it was built, and one with another byte, side by side, with what is believed of them: of the first one
    what the host that started it can say, of the other one what an auditor writes who has the first image and the TPM."""
    folder = tmp_path_factory.mktemp("machines")
    backend = VmBackend(
        VmSettings(
            kernel=built.kernel,
            firmware=FIRMWARE,
            tee="vtpm",
            accelerator="tcg",
            root=built.disk,
            state=folder / "vm",
        )
    )
    spawn = Spawn(
        name="words",
        launch=sealed.launch,
        config=sealed.config,
        bundle=sealed.made.path,
        model=None,
        memory_bytes=MEMORY,
        cores=(0,),
        tls_origins=TLS_ORIGINS,
    )
    tpm = make_tpm(tmp_path_factory.mktemp("tpm"))
    audited = policy_text(
        built.kernel, tpm, sealed.owner, f'app = "sha256:{sealed.made.head.sha256}"', tolerated=', "tls"'
    )
    with (
        hosted(backend, spawn) as first,
        booted(
            tpm,
            kernel=with_changed_command_line(built.kernel, folder / "changed.efi"),
            boot=sealed.boot,
            launch_sha256=launch_digest(sealed.launch),
            root=built.disk,
            data=sealed.made.path,
            cores=1,
        ) as second,
    ):
        believed = backend.policy(parse_launch(sealed.launch))
        believed = replace(
            believed, tolerate_insecure=frozenset({"api-keys-off", "tls"})
        )  # so the app has to be confined
        yield (first, believed), (second, parse_policy(audited, read=lambda _: b""))


def test_an_app_is_released_to_the_image_that_was_predicted_and_answers(
    machines: tuple[tuple[Guest, Policy], ...], sealed: Sealed
) -> None:
    machine, policy = machines[0]
    assert machine.until("waiting")["event"] == "waiting", machine.events
    sealed.release(machine.url, policy, WORD=SECRET)
    assert machine.until("ready")["event"] == "ready", machine.events
    with http_client(machine.url, policy=policy) as client:
        assert client.get("/", timeout=120).text == SECRET[-4:]
    assert SECRET not in str(machine.events)


def test_an_app_in_the_image_reaches_what_it_declared_by_name_and_knows_the_worlds_certificate_authorities(
    machines: tuple[tuple[Guest, Policy], ...],
) -> None:
    machine, policy = machines[0]
    assert machine.until("ready")["event"] == "ready", machine.events
    with http_client(machine.url, policy=policy) as client:
        told = client.get("/outside", timeout=300).json()
    assert told.pop("authorities") > 100  # certifi's, which the image measures
    assert told == {"trusted": "from outside", "stranger": "SSLCertVerificationError", "undeclared": "gaierror"}


def test_a_tls_listener_ends_inside_the_image_with_the_attested_key(
    machines: tuple[tuple[Guest, Policy], ...], tmp_path: Path
) -> None:
    machine, policy = machines[0]
    assert machine.until("ready")["event"] == "ready", machine.events
    with Session(machine.url, policy=policy) as session:
        verified = session.verify()
    assert set(TLS_ORIGINS) <= set(verified.statement.aud)
    certificate = check_certificate(fetch_certificate("localhost", machine.tls_port), verified, time.time())
    kept = tmp_path / "cert.pem"
    kept.write_bytes(certificate.public_bytes(Encoding.PEM))
    trusted = ssl.create_default_context(cafile=str(kept))
    with httpx2.Client(verify=trusted, trust_env=False, timeout=120) as client:
        assert client.get(f"https://localhost:{machine.tls_port}/").text == SECRET[-4:]


def test_one_changed_byte_of_the_command_line_gets_no_key(
    machines: tuple[tuple[Guest, Policy], ...], sealed: Sealed
) -> None:
    machine, policy = machines[1]
    assert machine.until("waiting")["event"] == "waiting", machine.events
    with pytest.raises(VerificationFailed) as caught:
        sealed.release(machine.url, policy, WORD=SECRET)
    assert failing(caught.value) == {"measurement.pcr4", "measurement.pcr9", "measurement.pcr11"}
    assert "opening" not in {event["event"] for event in machine.events}
    assert SECRET.encode() not in machine.console.read_bytes()
