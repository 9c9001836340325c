"""What `cloister tpm challenge` asks of a TPM's keys before it seals anything to them."""

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding
from tests.vendors.tpm import EK, NOW, Maker, Tpm
from tests.verify.test_enrol import endorsement_area
from typer.testing import Result

from cloister.evidence.tpm import parse_public, sized

KEY = rsa.generate_private_key(65537, 2048)
MAKER = Maker()
Challenge = Callable[..., Result]


def text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def pem(*certificates: bytes) -> bytes:
    return b"".join(x509.load_der_x509_certificate(one).public_bytes(Encoding.PEM) for one in certificates)


@pytest.fixture
def challenge(run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Challenge:
    monkeypatch.setattr("cloister.cli.tpm.time", SimpleNamespace(time=lambda: NOW))
    (tmp_path / "crl").write_bytes(MAKER.crl())

    def challenged(tpm: Tpm, *authorities: bytes) -> Result:
        leaf = MAKER.chain(KEY.public_key(), EK)[0]
        told = {"v": 1, "ek": text(sized(endorsement_area(KEY))), "ek_certificate": text(leaf)}
        (tmp_path / "tpm.json").write_text(json.dumps({**told, "ak": text(sized(tpm.area))}))
        (tmp_path / "ca.pem").write_bytes(pem(*authorities))
        options = ("--ca", tmp_path / "ca.pem", "--crl", tmp_path / "crl", "--keep", tmp_path / "kept")
        return run("tpm", "challenge", tmp_path / "tpm.json", *options)

    return challenged


def test_an_attestation_key_of_a_certified_tpm_is_challenged(challenge: Challenge, tmp_path: Path) -> None:
    tpm = Tpm()
    ran = challenge(tpm, MAKER.ca, MAKER.root)
    assert ran.exit_code == 0, ran.output
    assert set(json.loads(ran.stdout)) == {"v", "credential"}
    assert json.loads((tmp_path / "kept").read_text())["ak"] == parse_public(tpm.area).name_digest


@pytest.mark.parametrize("attributes", [0x00040072, 0x00070072, 0x00050070, 0x00050062, 0x00050052])
def test_a_key_that_could_sign_what_no_tpm_made_is_not(challenge: Challenge, tmp_path: Path, attributes: int) -> None:
    """It lives in the TPM, and would answer: but what it signs is anybody's word."""
    ran = challenge(Tpm(attributes=attributes), MAKER.ca, MAKER.root)
    assert (ran.exit_code, ran.stdout) == (3, "")
    assert "evidence.ak-attributes" in ran.stderr
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("first", [True, False])
def test_of_two_certificates_of_one_name_the_one_that_signed_is_taken(challenge: Challenge, first: bool) -> None:
    """A maker that issued its root and its authority anew, under other keys."""
    other = Maker()
    given = (other.root, other.ca, MAKER.root, MAKER.ca)
    ran = challenge(Tpm(), *(given if first else reversed(given)))
    assert ran.exit_code == 0, ran.output


@pytest.mark.parametrize("first", [True, False])
def test_of_two_that_signed_the_one_that_is_valid_still_is_taken(challenge: Challenge, first: bool) -> None:
    """A root that was issued anew under its own key."""
    old = replace(MAKER, root_terms=replace(MAKER.root_terms, since=NOW - 9e6, until=NOW - 1))
    given = (old.root, MAKER.root, MAKER.ca)
    ran = challenge(Tpm(), *(given if first else reversed(given)))
    assert ran.exit_code == 0, ran.output
