"""`cloister tpm`, its two sides in two folders, against TPMs in software."""

import json
from pathlib import Path

import pytest
from tests.system.image_stage import AUTHORITIES, make_tpm, manufacture, served
from tests.system.shell import Shell

from cloister.cli.vm_backend import attestation_key

pytestmark = pytest.mark.system

CHALLENGE = f"cloister tpm challenge tpm.json {AUTHORITIES} --keep kept > challenge.json"


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """With a TPM, and what it says of itself."""
    manufacture(tmp_path)
    with served(tmp_path) as tcti:
        told = Shell(tmp_path).run(f"cloister tpm show --tcti {tcti} > tpm.json")
    assert told.returncode == 0, told.stderr
    return Shell(tmp_path)


def test_what_is_pinned_is_the_key_that_the_tpm_attests_with(tmp_path: Path) -> None:
    tpm = make_tpm(tmp_path)
    assert tpm.pin == attestation_key(tpm.state)
    assert (tmp_path / "kept").stat().st_mode & 0o077 == 0


def test_another_makers_certificates_are_refused(shell: Shell, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    manufacture(other)
    ran = shell.run(CHALLENGE.replace("ca/", "other/ca/"))
    assert ran.returncode == 3, ran.stderr
    assert not (tmp_path / "kept").exists()
    assert not (tmp_path / "challenge.json").read_text()
    without_root = shell.run("cloister tpm challenge tpm.json --ca ca/issuercert.pem --keep kept")
    assert (without_root.returncode, "is missing" in without_root.stderr) == (2, True)


def test_a_certificate_is_good_for_its_own_key_alone(shell: Shell, tmp_path: Path) -> None:
    told = json.loads((tmp_path / "tpm.json").read_text())
    (tmp_path / "tpm.json").write_text(json.dumps({**told, "ek": told["ak"]}))
    ran = shell.run(CHALLENGE)
    assert ran.returncode == 3, ran.stderr


def test_who_names_another_tpms_key_cannot_answer(shell: Shell, tmp_path: Path) -> None:
    """The host has a certified TPM, and would attest with a key that it makes up elsewhere."""
    other = tmp_path / "other"
    other.mkdir()
    manufacture(other)
    with served(other) as tcti:
        foreign = json.loads(Shell(other).run(f"cloister tpm show --tcti {tcti}").stdout)
    told = json.loads((tmp_path / "tpm.json").read_text())
    (tmp_path / "tpm.json").write_text(json.dumps({**told, "ak": foreign["ak"]}))
    assert shell.run(CHALLENGE).returncode == 0
    for folder in (tmp_path, other):
        with served(folder) as tcti:
            assert shell.run(f"cloister tpm answer challenge.json --tcti {tcti}").returncode == 5
    (tmp_path / "answer.json").write_text(json.dumps({"v": 1, "secret": "A" * 43 + "="}))
    ran = shell.run("cloister tpm pin answer.json --kept kept")
    assert (ran.returncode, ran.stdout) == (3, "")


def test_what_is_not_of_these_commands_is_told(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "tpm.json").write_text("{}")
    assert shell.run(CHALLENGE).returncode == 4
    assert shell.run("cloister tpm pin nowhere --kept kept").returncode == 2
