"""The npm package `ehbp`, unchanged, against an enclave that was started with EHBP."""

import json
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.system.shell import ROOT, tool

from cloister.cli.local import LocalEnclave, Plan
from cloister.client import Session
from cloister.models.download import resolve

pytestmark = pytest.mark.system

FOLDER = ROOT / "web" / "interop"
ASK = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def enclave(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEnclave]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        with LocalEnclave(Plan.make(resolve("tiny"), slots=2, ehbp=True)) as running:
            running.start()
            yield running


@pytest.fixture(scope="module")
def ask(enclave: LocalEnclave) -> Callable[..., dict[str, Any]]:
    assert (FOLDER / "node_modules").is_dir(), "npm ci, in web/interop, fetches what the lock names"

    def run(*bodies: str, path: str = "/v1/completions", **options: Any) -> dict[str, Any]:
        headers = {"content-type": "application/json"}
        asked = {"url": enclave.url, "path": path, "headers": headers, "bodies": bodies, **options}
        command = [tool("node"), "ehbp.mjs", json.dumps(asked)]
        ran = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=60, check=True)
        seen: dict[str, Any] = json.loads(ran.stdout)
        return seen

    return run


@pytest.fixture(scope="module")
def key(enclave: LocalEnclave) -> str:
    with Session(enclave.url, policy=enclave.policy) as session:
        attested = session.verify().statement.ehbp_key
    assert attested is not None
    return attested.hex()


def test_an_answer_and_a_stream_on_the_attested_key(ask: Callable[..., dict[str, Any]], key: str) -> None:
    seen = ask(json.dumps(ASK), json.dumps({**ASK, "stream": True}), key=key)
    assert seen["error"] is None
    whole, stream = seen["answers"]
    assert (whole["status"], stream["status"]) == (200, 200)
    assert stream["type"].startswith("text/event-stream")
    text = json.loads("".join(whole["pieces"]))["choices"][0]["text"]
    lines = "".join(stream["pieces"]).splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "data: [DONE]" in lines
    assert "".join(choice["text"] for event in events for choice in event["choices"]) == text != ""


def test_it_finds_the_attested_key_by_itself(ask: Callable[..., dict[str, Any]], key: str) -> None:
    seen = ask(json.dumps(ASK))
    assert (seen["key"], seen["error"], seen["answers"][0]["status"]) == (key, None, 200)


def test_an_error_of_the_api_arrives_sealed(ask: Callable[..., dict[str, Any]]) -> None:
    (answer,) = ask("{")["answers"]
    assert (answer["status"], json.loads("".join(answer["pieces"]))["error"]["code"]) == (400, "invalid_json")


def test_a_key_that_is_not_the_enclaves_is_told_as_stale(ask: Callable[..., dict[str, Any]], key: str) -> None:
    other = f"{int(key[:2], 16) ^ 1:02x}{key[2:]}"
    assert ask(json.dumps(ASK), key=other)["error"].startswith("KeyConfigMismatchError")


def test_a_path_that_is_not_listed_is_no_answer(ask: Callable[..., dict[str, Any]]) -> None:
    assert ask("{}", path="/v1/models")["error"].startswith("ProtocolError")


def test_the_lock_names_versions_and_digests_and_no_registry() -> None:
    text = (FOLDER / "package-lock.json").read_text()
    assert "://" not in text.replace('"url": "https://', "")  # where a package asks for donations
    for name, one in json.loads(text)["packages"].items():
        assert not name or one["integrity"].startswith("sha512-"), name
