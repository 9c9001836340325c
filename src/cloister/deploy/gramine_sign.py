"""MRENCLAVE before anything runs: Gramine's own signer computes it from the manifest and the files, offline.

The signer is a program that comes with Gramine; without it there is no measurement, because Gramine's loader is a part of
what is measured. The signature it leaves (SIGSTRUCT) is read here, and believed only if it holds.
"""

import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from cloister.deploy.gramine import NAME, Gramine
from cloister.errors import MalformedEvidence, WrongUse
from cloister.evidence.launch import launch_digest

__all__ = ["SIGSTRUCT_SIZE", "Signed", "find_gramine", "make_signing_key", "parse_sigstruct", "sign"]

SIGSTRUCT_SIZE = 1808

_SIGNER, _RENDERER = "gramine-sgx-sign", "gramine-manifest"
_HINT = (
    "Install Gramine 1.9 (https://gramine.readthedocs.io, package `gramine`) on this machine, or sign on another "
    "one: the measurement comes out the same wherever Gramine is the same."
)
_SECONDS = 600.0
_HEADER = bytes.fromhex("06000000e10000000000010000000000")
_HEADER2 = bytes.fromhex("01010000600000006000000001000000")
_EXPONENT = 3
_MODULUS_BITS = 3072
_DEBUG = 0x02
_LOCATING = """\
loader.entrypoint.uri = "file:{{ gramine.libos }}"
libos.entrypoint = "/x"
fs.mounts = [{ path = "/lib", uri = "file:{{ gramine.runtimedir() }}" }]
"""
"""The least manifest that there is; Gramine's renderer fills in where it lies itself."""


@dataclass(frozen=True, slots=True)
class Signed:
    """What a SIGSTRUCT names. Digests in hex, as policies have them."""

    mr_enclave: str
    mr_signer: str
    isv_prod_id: int
    isv_svn: int
    debug: bool

    def entry(self, launch: bytes) -> dict[str, str | int]:
        """For a policy's measurements of `sgx`. The hardware has no field for the launch config, so both are pinned together."""
        return {"mr_enclave": self.mr_enclave, "launch_sha256": launch_digest(launch).hex()}


def parse_sigstruct(data: bytes) -> Signed:
    """Intel SDM, volume 3D, "Enclave Signature Structure (SIGSTRUCT)": 1,808 bytes, with a signature that holds.

    Raises: MalformedEvidence for another size, other headers, or a signature that does not hold.
    """
    if len(data) != SIGSTRUCT_SIZE:
        raise MalformedEvidence(
            "This is no enclave's signature.", step="sigstruct", expected=str(SIGSTRUCT_SIZE), got=str(len(data))
        )
    (exponent,) = struct.unpack_from("<I", data, 512)
    if data[:16] != _HEADER or data[24:40] != _HEADER2 or exponent != _EXPONENT:
        raise MalformedEvidence("This is no enclave's signature: its headers are others.", step="sigstruct")
    modulus = data[128:512]
    try:
        key = rsa.RSAPublicNumbers(_EXPONENT, int.from_bytes(modulus, "little")).public_key()
        key.verify(data[899:515:-1], data[:128] + data[900:1028], PKCS1v15(), SHA256())
    except (InvalidSignature, ValueError) as error:
        raise MalformedEvidence("The enclave's signature does not hold.", step="sigstruct") from error
    (flags,) = struct.unpack_from("<Q", data, 928)
    product, version = struct.unpack_from("<HH", data, 1024)
    return Signed(
        mr_enclave=data[960:992].hex(),
        mr_signer=hashlib.sha256(modulus).hexdigest(),
        isv_prod_id=product,
        isv_svn=version,
        debug=bool(flags & _DEBUG),
    )


def make_signing_key() -> bytes:
    """A key as SGX wants it, RSA with 3,072 bits and the exponent 3, as PEM.

    SGX starts nothing unsigned. Nobody's trust rests on this key: policies name MRENCLAVE, which it does not change.
    """
    key = rsa.generate_private_key(_EXPONENT, _MODULUS_BITS)
    return key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())


def find_gramine() -> Gramine:
    """Where Gramine lies on this machine, in its own words. Raises: WrongUse where it is not installed."""
    with tempfile.TemporaryDirectory() as folder:
        template, rendered = Path(folder) / "where.template", Path(folder) / "where"
        template.write_text(_LOCATING)
        _run(_RENDERER, str(template), str(rendered), folder=Path(folder))
        try:
            found = tomllib.loads(rendered.read_text())
            libos, runtime = found["loader"]["entrypoint"]["uri"], found["fs"]["mounts"][0]["uri"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise WrongUse("Gramine does not say where it lies.", hint=_HINT, step="gramine") from error
    return Gramine(str(libos).removeprefix("file:"), str(runtime).removeprefix("file:").rstrip("/"))


def sign(folder: Path, key: Path) -> Signed:
    """Sign `cloister.manifest` in `folder`: makes `cloister.manifest.sgx` and `cloister.sig` there, as `gramine-sgx` wants
    them, and says what is in the signature. `key`: PEM, of `make_signing_key`.

    Raises: WrongUse where Gramine is not installed, or will not sign; MalformedEvidence for what it left instead.
    """
    manifest, signed, signature = (folder / f"{NAME}.{end}" for end in ("manifest", "manifest.sgx", "sig"))
    signature.unlink(missing_ok=True)
    options = ("--manifest", manifest.name, "--output", signed.name, "--key", str(key), "--sigfile", signature.name)
    _run(_SIGNER, *options, folder=folder)
    try:
        return parse_sigstruct(signature.read_bytes())
    except OSError as error:
        raise WrongUse(f"{_SIGNER} made no signature.", hint=_HINT, step="sign") from error


def _run(program: str, *options: str, folder: Path) -> None:
    path = shutil.which(program)
    if path is None:
        raise WrongUse(f"`{program}` is not installed: without it nothing can be measured.", hint=_HINT, step="gramine")
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    try:
        done = subprocess.run(
            [path, *options],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise WrongUse(f"`{program}` did not end well: {type(error).__name__}.", step="gramine") from error
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        said = ascii(lines[-1])[1:-1][:200] if lines else f"status {done.returncode}"
        raise WrongUse(f"`{program}` refused: {said}", step="gramine")
