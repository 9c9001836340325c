import json
import socket
from pathlib import Path

import pytest

from cloister.errors import (
    CloisterError,
    EngineDied,
    MalformedModel,
    MalformedPolicy,
    NotTrusted,
    Unreachable,
    VerificationFailed,
    WrongUse,
)
from cloister.host.process import EnclaveProcess, listen


@pytest.mark.parametrize("name", ["runpy", "cloister", "json", "httptools", "sitecustomize", "usercustomize"])
def test_nothing_of_the_hosts_folder_or_environment_runs_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONSTARTUP", str(tmp_path / f"{name}.py"))
    enclave = EnclaveProcess(b"{}\n", ())
    enclave.start()
    with pytest.raises(WrongUse):
        enclave.wait_ready()
    assert not (tmp_path / "ran").exists()


def test_an_enclave_that_ends_without_a_word_is_unreachable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cloister.host.process._START", "raise SystemExit(3)")
    enclave = EnclaveProcess(b"{}\n", ())
    enclave.start()
    with pytest.raises(Unreachable, match="status 3"):
        enclave.wait_ready()
    enclave.stop()
    assert not enclave.alive


@pytest.mark.parametrize(
    "kind", [EngineDied, MalformedModel, MalformedPolicy, NotTrusted, VerificationFailed, WrongUse, Unreachable]
)
def test_what_the_enclave_says_went_wrong_is_raised_as_what_it_was(
    monkeypatch: pytest.MonkeyPatch, kind: type[CloisterError]
) -> None:
    said = {"event": "failed", "error": kind.__name__, "message": "The policy.", "hint": "Mend it.", "step": "group"}
    monkeypatch.setattr("cloister.host.process._START", f"print({json.dumps(said)!r})")
    enclave = EnclaveProcess(b"{}\n", ())
    enclave.start()
    with pytest.raises(kind) as caught:
        enclave.wait_ready()
    assert type(caught.value) is kind
    assert (caught.value.message, caught.value.hint, caught.value.step) == ("The policy.", "Mend it.", "group")


def test_what_is_accepted_sends_small_pieces_at_once() -> None:
    """Otherwise the second one waits 40 ms for the other side to say that it has the first."""
    with listen("127.0.0.1", 0) as sock, socket.create_connection(sock.getsockname()):
        accepted, _ = sock.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
