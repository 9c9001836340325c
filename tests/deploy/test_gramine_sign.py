"""The signer is Gramine's; what it leaves is read, and believed only if the signature holds."""

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from tests.deploy.gramine_programs import sigstruct
from tests.deploy.test_gramine import ENCLAVE, GRAMINE

from cloister.deploy.gramine import render
from cloister.deploy.gramine_sign import SIGSTRUCT_SIZE, find_gramine, make_signing_key, parse_sigstruct, sign
from cloister.errors import MalformedEvidence, WrongUse

MR_ENCLAVE = bytes(range(32))
UNSIGNED = range(1028, SIGSTRUCT_SIZE)
"""Reserved, and Q1 and Q2, by which the processor checks the signature faster."""


@pytest.fixture(scope="module")
def key() -> rsa.RSAPrivateKey:
    made = load_pem_private_key(make_signing_key(), None)
    assert isinstance(made, rsa.RSAPrivateKey)
    return made


def test_a_signing_key_is_of_the_kind_that_sgx_takes(key: rsa.RSAPrivateKey) -> None:
    numbers = key.public_key().public_numbers()
    assert (numbers.e, numbers.n.bit_length()) == (3, 3072)


def test_reads_what_the_signature_names(key: rsa.RSAPrivateKey) -> None:
    signed = parse_sigstruct(sigstruct(MR_ENCLAVE, key, product=3, version=9))
    modulus = key.public_key().public_numbers().n.to_bytes(384, "little")
    assert signed.mr_enclave == MR_ENCLAVE.hex()
    assert signed.mr_signer == hashlib.sha256(modulus).hexdigest()
    assert (signed.isv_prod_id, signed.isv_svn, signed.debug) == (3, 9, False)


def test_an_enclave_that_may_be_debugged_is_told(key: rsa.RSAPrivateKey) -> None:
    assert parse_sigstruct(sigstruct(MR_ENCLAVE, key, flags=0x06)).debug


def test_every_bit_that_is_signed_counts(key: rsa.RSAPrivateKey) -> None:
    good = sigstruct(MR_ENCLAVE, key)
    for at in (*range(0, 1028, 29), 512, 516, 899, 900, 928, 960, 991, 1024, 1027):
        with pytest.raises(MalformedEvidence):
            parse_sigstruct(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
    for at in (UNSIGNED[0], UNSIGNED[-1]):
        assert parse_sigstruct(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]).mr_enclave == MR_ENCLAVE.hex()


@pytest.mark.parametrize("size", [0, 1, 1807, 1809])
def test_another_size_is_refused(key: rsa.RSAPrivateKey, size: int) -> None:
    with pytest.raises(MalformedEvidence):
        parse_sigstruct((sigstruct(MR_ENCLAVE, key) + b"\0")[:size])


def test_another_exponent_is_refused(key: rsa.RSAPrivateKey) -> None:
    good = sigstruct(MR_ENCLAVE, key)
    with pytest.raises(MalformedEvidence):
        parse_sigstruct(good[:512] + struct.pack("<I", 65537) + good[516:])


# Gramine's programs, found by their names


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is PATH, and empty."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}")
    yield folder


def program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def laid_out(folder: Path) -> Path:
    folder.mkdir()
    (folder / "cloister.manifest").write_text(render(ENCLAVE))
    return folder


def test_without_gramine_it_says_what_to_install(programs: Path, tmp_path: Path) -> None:
    for attempt in (find_gramine, lambda: sign(laid_out(tmp_path / "image"), tmp_path / "key.pem")):
        with pytest.raises(WrongUse, match="not installed") as caught:
            attempt()
        assert "gramine" in caught.value.hint


def test_gramine_is_asked_where_it_lies(programs: Path) -> None:
    said = f'[loader.entrypoint]\nuri = "file:{GRAMINE.libos}"\n[[fs.mounts]]\nuri = "file:{GRAMINE.runtime}/"'
    program(programs, "gramine-manifest", f"echo '{said}' > \"$2\"")
    assert find_gramine() == GRAMINE


@pytest.mark.parametrize("said", ["", "x", "[loader]", "[fs]\nmounts = 1"])
def test_an_answer_that_says_nothing_is_refused(programs: Path, said: str) -> None:
    program(programs, "gramine-manifest", f"echo '{said}' > \"$2\"")
    with pytest.raises(WrongUse, match="where it lies"):
        find_gramine()


def test_a_signer_that_refuses_is_quoted_in_one_line(programs: Path, tmp_path: Path) -> None:
    program(programs, "gramine-sgx-sign", "printf 'first\\nno \\033[31mkey\\n' >&2; exit 3")
    with pytest.raises(WrongUse) as caught:
        sign(laid_out(tmp_path / "image"), tmp_path / "key.pem")
    assert caught.value.message == "`gramine-sgx-sign` refused: no \\x1b[31mkey"


def test_an_older_signature_is_not_taken_for_the_new_one(
    programs: Path, tmp_path: Path, key: rsa.RSAPrivateKey
) -> None:
    folder = laid_out(tmp_path / "image")
    (folder / "cloister.sig").write_bytes(sigstruct(MR_ENCLAVE, key))
    program(programs, "gramine-sgx-sign", "exit 0")
    with pytest.raises(WrongUse, match="no signature"):
        sign(folder, tmp_path / "key.pem")


def test_the_signers_files_lie_beside_the_manifest(programs: Path, tmp_path: Path, key: rsa.RSAPrivateKey) -> None:
    folder = laid_out(tmp_path / "image")
    (tmp_path / "made").write_bytes(sigstruct(MR_ENCLAVE, key))
    told = "--manifest cloister.manifest --output cloister.manifest.sgx --key"
    script = (
        f'case "$*" in "{told} "*" --sigfile cloister.sig") ;; *) exit 9;; esac; /bin/cp "{tmp_path}/made" cloister.sig'
    )
    program(programs, "gramine-sgx-sign", script)
    assert sign(folder, tmp_path / "key.pem").mr_enclave == MR_ENCLAVE.hex()
