"""A receipt from a real enclave, kept by an ordinary client and checked by `cloister receipt verify`."""

import json
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
from tests.cli.running import run
from tests.end_to_end.proxying import running_proxy
from typer.testing import CliRunner

from cloister.channel.bhttp import Request, ResponseEnd
from cloister.channel.ohttp import seal_request
from cloister.cli.local import LocalEnclave, write_root
from cloister.cli.main import app
from cloister.client import SealedTransport, Session

ASK = {"model": "default", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, "stream": True}


@dataclass
class Kept:
    """What a client has in files afterwards."""

    answer: Path
    request: Path
    document: Path
    policy: tuple[str, ...]

    def verify(self, *more: str) -> tuple[int, str]:
        words = ("--request", str(self.request), "--document", str(self.document), *self.policy)
        ran = run(app, "receipt", "verify", str(self.answer), *words, *more)
        return ran.exit_code, ran.stdout + ran.stderr


def saved(enclave: LocalEnclave, folder: Path) -> tuple[Path, tuple[str, ...]]:
    document = folder / "document.json"
    policy = ("--dangerously-trust-simulator", str(write_root(enclave.device)))
    ran = run(app, "verify", enclave.url, "--save", str(document), *policy)
    assert ran.exit_code == 0, ran.output
    return document, policy


@pytest.fixture
def kept(enclave: LocalEnclave, tmp_path: Path) -> Kept:
    document, policy = saved(enclave, tmp_path)
    content = json.dumps(ASK).encode()
    with (
        Session(enclave.url, policy=enclave.policy) as session,
        httpx2.Client(transport=SealedTransport(session), base_url="http://enclave.invalid", timeout=60) as client,
    ):
        headers = {"content-type": "application/json", "cloister-receipt": session.verify().statement_sha256}
        answer = client.post("/v1/completions", content=content, headers=headers).content
    found = Kept(tmp_path / "answer", tmp_path / "request", document, policy)
    found.answer.write_bytes(answer)
    found.request.write_bytes(content)
    return found


def test_a_streams_receipt_proves_which_model_answered(kept: Kept, enclave: LocalEnclave) -> None:
    code, said = kept.verify()
    assert code == 0, said
    assert enclave.plan.model_digest in said
    assert "SIMULATED" in said
    code, said = kept.verify("--json")
    told, _ = json.JSONDecoder().raw_decode(said)
    assert told["models"] == [{"name": enclave.plan.model.name, "sha256": enclave.plan.model_digest}]
    assert told["verification"]["statement_sha256"] == told["statement_sha256"]


def test_a_whole_answers_receipt_stands_in_its_trailers(enclave: LocalEnclave, tmp_path: Path) -> None:
    document, policy = saved(enclave, tmp_path)
    content = json.dumps({**ASK, "stream": False}).encode()
    with Session(enclave.url, policy=enclave.policy) as session:
        verified = session.verify()
    fields = ((b"content-type", b"application/json"), (b"cloister-receipt", verified.statement_sha256.encode()))
    request = Request("POST", "https", "enclave.invalid", "/v1/completions", fields, content)
    sealed = seal_request(verified, request)
    answered = httpx2.post(
        f"{enclave.url}/.well-known/ohttp-gateway",
        content=sealed.body,
        headers={"content-type": "message/ohttp-chunked-req"},
        trust_env=False,
        timeout=60,
    )
    events = sealed.response.feed(answered.content)
    sealed.response.finish()
    end = events[-1]
    assert isinstance(end, ResponseEnd)
    trailers = dict(end.trailers)
    kept = Kept(tmp_path / "answer", tmp_path / "request", document, policy)
    kept.answer.write_bytes(b"".join(event for event in events if isinstance(event, bytes)))
    kept.request.write_bytes(content)
    receipt = tmp_path / "receipt"
    receipt.write_bytes(trailers[b"cloister-receipt"] + b" " + trailers[b"cloister-receipt-salt"] + b"\n")
    code, said = kept.verify("--receipt", str(receipt))
    assert (code, enclave.plan.model_digest in said) == (0, True), said
    code, said = kept.verify()
    assert code == 4, said


@pytest.mark.parametrize(("name", "what"), [("answer", "another answer"), ("request", "another request")])
def test_other_contents_are_refused(kept: Kept, name: str, what: str) -> None:
    file: Path = getattr(kept, name)
    content = file.read_bytes()
    file.write_bytes(content.replace(b"o", b"0", 1))
    code, said = kept.verify()
    assert (code, what in said) == (3, True), said


def test_a_changed_receipt_is_refused(kept: Kept) -> None:
    content = kept.answer.read_bytes()
    at = content.rindex(b"cloister-receipt ") + len(b"cloister-receipt ") + 150
    kept.answer.write_bytes(content[:at] + (b"A" if content[at : at + 1] != b"A" else b"B") + content[at + 1 :])
    code, said = kept.verify()
    assert (code, "not signed by this enclave" in said) == (3, True), said


def test_a_receipt_of_another_enclave_is_refused(kept: Kept, keyed_enclave: LocalEnclave, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    kept.document = saved(keyed_enclave, folder)[0]
    code, said = kept.verify()
    assert (code, "not signed by this enclave" in said) == (3, True), said


def test_a_document_that_is_not_trusted_proves_nothing(kept: Kept) -> None:
    kept.policy = ()
    code, said = kept.verify()
    assert code == 3, said


def test_a_file_that_is_not_there_is_wrong_use(kept: Kept, tmp_path: Path) -> None:
    kept.request = tmp_path / "nowhere"
    assert kept.verify()[0] == 2


def test_a_stream_through_the_local_proxy_keeps_its_receipt(enclave: LocalEnclave, tmp_path: Path) -> None:
    document, policy = saved(enclave, tmp_path)
    content = json.dumps(ASK).encode()
    with running_proxy(enclave) as port:
        url = f"http://127.0.0.1:{port}"
        named = httpx2.get(f"{url}/verification", trust_env=False).json()["statement_sha256"]
        headers = {"content-type": "application/json", "cloister-receipt": named}
        answer = httpx2.post(f"{url}/v1/completions", content=content, headers=headers, trust_env=False, timeout=60)
    kept = Kept(tmp_path / "answer", tmp_path / "request", document, policy)
    kept.answer.write_bytes(answer.content)
    kept.request.write_bytes(content)
    code, said = kept.verify()
    assert code == 0, said


WHOLE = json.dumps({**ASK, "stream": False}).encode()


def keep_whole(answer: httpx2.Response, fields: dict[bytes, bytes], folder: Path) -> tuple[Path, Path, str]:
    (folder / "answer").write_bytes(answer.content)
    (folder / "request").write_bytes(WHOLE)
    (folder / "receipt").write_bytes(fields[b"cloister-receipt"] + b" " + fields[b"cloister-receipt-salt"])
    return folder / "answer", folder / "request", str(folder / "receipt")


def test_a_python_user_has_a_whole_answers_receipt_from_the_transport(enclave: LocalEnclave, tmp_path: Path) -> None:
    document, policy = saved(enclave, tmp_path)
    with (
        Session(enclave.url, policy=enclave.policy) as session,
        httpx2.Client(transport=SealedTransport(session), base_url="http://enclave.invalid", timeout=60) as client,
    ):
        headers = {"content-type": "application/json", "cloister-receipt": session.verify().statement_sha256}
        answer = client.post("/v1/completions", content=WHOLE, headers=headers)
    answered, asked, receipt = keep_whole(answer, dict(answer.extensions["trailers"]), tmp_path)
    code, said = Kept(answered, asked, document, policy).verify("--receipt", receipt)
    assert (code, enclave.plan.model_digest in said) == (0, True), said
    answered.write_bytes(answer.content.replace(b"o", b"0", 1))
    assert Kept(answered, asked, document, policy).verify("--receipt", receipt)[0] == 3


def test_a_whole_answer_through_the_local_proxy_has_its_receipt_in_front(enclave: LocalEnclave, tmp_path: Path) -> None:
    document, policy = saved(enclave, tmp_path)
    with running_proxy(enclave) as port:
        url = f"http://127.0.0.1:{port}"
        named = httpx2.get(f"{url}/verification", trust_env=False).json()["statement_sha256"]
        headers = {"content-type": "application/json", "cloister-receipt": named}
        answer = httpx2.post(f"{url}/v1/completions", content=WHOLE, headers=headers, trust_env=False, timeout=60)
        without = httpx2.post(f"{url}/v1/completions", json=json.loads(WHOLE), trust_env=False, timeout=60)
    assert not [name for name in without.headers if name.startswith("cloister-receipt")]
    fields = {name.lower(): value for name, value in answer.headers.raw}
    answered, asked, receipt = keep_whole(answer, fields, tmp_path)
    code, said = Kept(answered, asked, document, policy).verify("--receipt", receipt)
    assert code == 0, said


def test_a_person_keeps_a_receipt_in_one_file(enclave: LocalEnclave, tmp_path: Path) -> None:
    policy = ("--dangerously-trust-simulator", str(write_root(enclave.device)))
    asked, chatted = str(tmp_path / "asked"), str(tmp_path / "chatted")
    ran = run(app, "ask", enclave.url, "Who are you?", "--max-tokens", "8", "--receipt", asked, *policy)
    assert ran.exit_code == 0, ran.output
    lines = f"Who are you?\n/receipt {chatted}\n"
    ran = CliRunner().invoke(app, ["chat", enclave.url, "--max-tokens", "8", *policy], input=lines)
    assert ran.exit_code == 0, ran.output
    for file in (asked, chatted):
        ran = run(app, "receipt", "verify", file, *policy)
        assert (ran.exit_code, enclave.plan.model_digest in ran.stdout) == (0, True), ran.output
        assert run(app, "receipt", "verify", file).exit_code == 3
