"""What `--save-cert` writes, and where it looks; end to end in `tests/end_to_end/test_tls.py`."""

import ssl
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from tests.cli.running import run
from tests.enclave.test_gateway_certificate import certificate_of

from cloister.cli import certificate
from cloister.cli.certificate import keep_certificate
from cloister.cli.main import app
from cloister.enclave.gateway.certificate import TlsKey
from cloister.errors import NotTrusted, WrongUse
from cloister.verify import Verified

ORIGINS = ("https://localhost:8443", "https://127.0.0.1:8443")


def verified(spki: str | None, *aud: str) -> Verified:
    launch = SimpleNamespace(app=SimpleNamespace(kind="wsgi"))
    return cast("Verified", SimpleNamespace(statement=SimpleNamespace(tls_spki=spki, aud=aud), launch=launch))


@pytest.fixture
def key() -> TlsKey:
    return TlsKey(ORIGINS, time.time())


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch, key: TlsKey) -> list[tuple[str, int]]:
    """Whom it asked for the certificate: always the same listener."""
    seen: list[tuple[str, int]] = []
    der = ssl.PEM_cert_to_DER_cert(pem_of(key))

    def fetch(host: str, port: int) -> bytes:
        seen.append((host, port))
        return der

    monkeypatch.setattr(certificate, "fetch_certificate", fetch)
    return seen


def pem_of(key: TlsKey) -> str:
    return certificate_of(key).public_bytes(Encoding.PEM).decode()


def test_the_attested_certificate_is_written_and_how_to_use_it_is_said(
    tmp_path: Path, key: TlsKey, asked: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "my cert.pem"
    keep_certificate(path, verified(key.spki_sha256, *ORIGINS), "http://127.0.0.1:8484/#deployment=a")
    assert path.read_text() == pem_of(key)
    assert asked == [("127.0.0.1", 8443)]
    said = capsys.readouterr()
    assert said.out == ""
    assert f"curl --cacert '{path}' https://127.0.0.1:8443/" in said.err
    assert "weaker than the sealed channel" in said.err


def test_another_listener_is_asked_where_one_is_named(
    tmp_path: Path, key: TlsKey, asked: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    told = verified(key.spki_sha256, "https://chat.example", *ORIGINS)  # the first is where somebody else ends TLS
    keep_certificate(tmp_path / "c.pem", told, "http://127.0.0.1:8484", "[::1]:9443")
    assert asked == [("::1", 9443)]
    assert "https://localhost:8443/" in capsys.readouterr().err  # a name that stands in the certificate


def test_another_key_s_certificate_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(NotTrusted, match="not the enclave's"):
        keep_certificate(tmp_path / "c.pem", verified("ab" * 32, *ORIGINS), "http://127.0.0.1:8484")
    assert list(tmp_path.iterdir()) == []


def test_without_a_listener_nobody_is_asked(tmp_path: Path, asked: list[tuple[str, int]]) -> None:
    with pytest.raises(WrongUse, match="no TLS listener"):
        keep_certificate(tmp_path / "c.pem", verified(None), "http://127.0.0.1:8484")
    assert asked == []


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, key: TlsKey) -> None:
    with pytest.raises(WrongUse, match="cannot be written"):
        keep_certificate(tmp_path / "no" / "c.pem", verified(key.spki_sha256, *ORIGINS), "http://127.0.0.1:8484")


@pytest.mark.parametrize(
    "at", ["8443", "host", "host:0", "host:99999", "me@host:1", "https://host:1", "host:1/x", "[::1"]
)
def test_what_is_no_address_is_refused(tmp_path: Path, key: TlsKey, at: str, asked: list[tuple[str, int]]) -> None:
    with pytest.raises(WrongUse, match="--tls is no address"):
        keep_certificate(tmp_path / "c.pem", verified(key.spki_sha256, *ORIGINS), "http://127.0.0.1:8484", at)
    assert asked == []


@pytest.mark.parametrize(
    "options", [("saved.json", "--save-cert", "c.pem"), ("http://127.0.0.1:1", "--tls", "127.0.0.1:8443")]
)
def test_options_that_do_not_fit_are_wrong_use(options: tuple[str, ...]) -> None:
    assert run(app, "verify", *options).exit_code == 2
