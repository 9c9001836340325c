"""The `vm` backend's software TPM: what a policy can pin of it before anything has booted."""

import subprocess
from pathlib import Path

import pytest
from tests.system.shell import tool

from cloister.cli.vm_backend import attestation_key
from cloister.errors import ConnectionFailed
from cloister.host.qemu import tpm_setup_command

pytestmark = pytest.mark.system


def made(folder: Path) -> Path:
    folder.mkdir()
    for name in ("swtpm", "swtpm_setup", "tpm2_createprimary"):
        tool(name)
    subprocess.run(tpm_setup_command(folder), check=True, capture_output=True)
    return folder


def test_its_key_stays_the_same_and_is_its_own(tmp_path: Path) -> None:
    one, other = made(tmp_path / "one"), made(tmp_path / "other")
    first = attestation_key(one)
    assert len(bytes.fromhex(first)) == 32
    assert attestation_key(one) == first
    assert attestation_key(other) != first


def test_no_tpm_has_no_key(tmp_path: Path) -> None:
    with pytest.raises(ConnectionFailed):
        attestation_key(tmp_path / "nothing")
