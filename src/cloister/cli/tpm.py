"""`cloister tpm`: enrol a machine's TPM, so that a policy can name the key that it attests with.

    on the TPM's machine                        where the policy is written
    cloister tpm show > tpm.json                cloister tpm challenge tpm.json --ca MAKER.pem --keep kept > challenge.json
    cloister tpm answer challenge.json > answer cloister tpm pin answer --kept kept

Files, since who verifies reaches no TPM, and who has the TPM is not believed: its maker's certificate says which endorsement
key is a TPM's, and only the TPM that holds this key and the attestation key opens what is sealed to both.
"""

import base64
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from cloister import private_file
from cloister.cli import output
from cloister.enclave.attest.device import LinuxDevice
from cloister.enclave.attest.tpm import RESOURCE_MANAGER, SubprocessTools, Tpm, Vtpm
from cloister.errors import MalformedEvidence, VerificationFailed, WrongUse
from cloister.evidence.strict_json import Fields, load_object
from cloister.evidence.tpm import parse_public
from cloister.verify import Policy
from cloister.verify.certificates import issued, load_certificate
from cloister.verify.enrol import SECRET_SIZE, Credential, check_activation, check_endorsement, make_credential
from cloister.verify.factors import Factor
from cloister.verify.vtpm import check_attributes

__all__ = ["register"]

_MOST = 1 << 20
_MOST_CERTIFICATES = 5

Tcti = Annotated[str, typer.Option("--tcti", metavar="NAME", help="How tpm2-tools reach the TPM.")]
Given = Annotated[Path, typer.Argument(metavar="FILE", show_default=False)]
Authorities = Annotated[
    list[Path],
    typer.Option(
        "--ca", metavar="PEM", help="Its maker's certificates, up to a root that you trust (may be given again)."
    ),
]
Lists = Annotated[
    list[Path] | None,
    typer.Option("--crl", metavar="FILE", help="Their revocation lists (may be given again).", show_default=False),
]


def register(app: typer.Typer) -> None:
    app.callback()(_family)
    app.command("show")(show)
    app.command("challenge")(challenge)
    app.command("answer")(answer)
    app.command("pin")(pin)


def _family() -> None:
    """Enrol a TPM that no provider vouches for, so that a policy can name its key."""


def show(tcti: Tcti = RESOURCE_MANAGER) -> None:
    """Print what this machine's TPM is enrolled by: two public keys, and its maker's certificate."""
    ek, ak = _tpm(tcti).enrolment()
    if not ek.certificate:
        hint = "Without one nobody can say that a TPM holds this key. Makers offer it for download by the key's digest."
        raise WrongUse("This TPM holds no certificate of its maker.", step="enrol", hint=hint)
    output.json_value({"v": 1, "ek": _text(ek.public), "ek_certificate": _text(ek.certificate), "ak": _text(ak.public)})


def challenge(
    tpm: Given,
    ca: Authorities,
    keep: Annotated[Path, typer.Option("--keep", metavar="SECRET", help="Where this side of it is kept.")],
    crl: Lists = None,
) -> None:
    """Check the maker's certificate and what its keys are for, and print what only that TPM can answer, with that
    attestation key in it."""
    said = _read(tpm, "show")
    ek, certificate, ak = (_bytes(said, name) for name in ("ek", "ek_certificate", "ak"))
    said.end()
    chain = _chain(certificate, [one for path in ca for one in _certificates(path)])
    roots = frozenset({load_certificate(chain[-1], what="--ca").fingerprint(hashes.SHA256()).hex()})
    lists = [_file(path) for path in crl or ()]
    name, secret = parse_public(ak), os.urandom(SECRET_SIZE)
    endorsed = check_endorsement(ek, chain, policy=Policy(), now=time.time(), roots=roots, crls=lists)
    _require([*endorsed, check_attributes(name)])
    made: Credential = make_credential(ek, name.name, secret, os.urandom)
    kept = {"v": 1, "ak": name.name_digest, "secret": _text(secret)}
    try:
        private_file.write(keep, json.dumps(kept).encode() + b"\n")
    except OSError as error:
        raise WrongUse(f"{keep} cannot be written.", got=error.strerror) from error
    output.note(f"certified by {output.one_line(_subject(chain[-1]))}", "dim")
    output.json_value({"v": 1, "credential": _text(made.tool_file())})


def answer(challenge: Given, tcti: Tcti = RESOURCE_MANAGER) -> None:
    """Let this machine's TPM open the challenge, and print what was in it."""
    said = _read(challenge, "challenge")
    credential = _bytes(said, "credential")
    said.end()
    output.json_value({"v": 1, "secret": _text(_tpm(tcti).activate(credential))})


def pin(
    answer: Given, kept: Annotated[Path, typer.Option("--kept", metavar="SECRET", help="What `challenge` kept.")]
) -> None:
    """Check the answer, and print the line that names the TPM's key in a policy's [limits]."""
    own, said = _read(kept, "challenge"), _read(answer, "answer")
    _require([check_activation(_bytes(own, "secret"), _bytes(said, "secret"))])
    output.line(f'platform_ids = ["{own.sha256("ak")}"]')


def _tpm(tcti: str) -> Vtpm:
    return Vtpm(LinuxDevice(), Tpm(SubprocessTools(tcti)))


def _require(factors: Sequence[Factor]) -> None:
    wrong = [factor for factor in factors if factor.verdict == "fail"]
    if wrong:
        names = ", ".join(factor.step for factor in wrong)
        raise VerificationFailed(f"Not enrolled: {names}.", factors=tuple(factors), hint=wrong[0].hint)


def _chain(leaf: bytes, given: Sequence[bytes]) -> tuple[bytes, ...]:
    """From the leaf up to the one that issued itself. Raises: WrongUse when none of the given goes on there."""
    known = [load_certificate(one, what="--ca") for one in given]
    chain, at = [leaf], load_certificate(leaf, what="tpm.ek_certificate")
    while at.issuer != at.subject and len(chain) <= _MOST_CERTIFICATES:
        if (issuer := _issuer(at, known)) is None:
            hint = "Give the maker's certificates with --ca, up to the root."
            got = output.one_line(at.issuer.rfc4514_string())
            raise WrongUse("The certificate of the TPM's issuer is missing.", step="enrol", hint=hint, got=got)
        chain.append(issuer.public_bytes(Encoding.DER))
        at = issuer
    return tuple(chain)


def _issuer(certificate: x509.Certificate, known: Sequence[x509.Certificate]) -> x509.Certificate | None:
    """Of several with the issuer's name, as makers issue their own anew, the one that signed it; of several such, the one
    that is valid for longest."""
    named = [one for one in known if one.subject == certificate.issuer]
    return max(named, key=lambda one: (issued(certificate, one), one.not_valid_after_utc), default=None)


def _certificates(path: Path) -> list[bytes]:
    try:
        found = x509.load_pem_x509_certificates(_file(path))
    except ValueError as error:
        raise WrongUse(f"{path} holds no certificates.", hint="As text, between BEGIN CERTIFICATE lines.") from error
    return [one.public_bytes(Encoding.DER) for one in found]


def _subject(certificate: bytes) -> str:
    return load_certificate(certificate, what="--ca").subject.rfc4514_string()


def _read(path: Path, maker: str) -> Fields:
    """What `cloister tpm` wrote as `maker`. Raises: WrongUse, MalformedEvidence."""
    fields = Fields(load_object(_file(path), max_bytes=_MOST, what=f"what `cloister tpm {maker}` printed"), what="tpm")
    fields.integer("v", low=1, high=1)
    return fields


def _file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MOST + 1)
    except OSError as error:
        raise WrongUse(f"{path} cannot be read.", got=error.strerror) from error


def _bytes(fields: Fields, name: str) -> bytes:
    try:
        return base64.b64decode(fields.text(name, max_length=_MOST), validate=True)
    except ValueError as error:
        raise MalformedEvidence(f"{name} is no base64.", step="enrol") from error


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()
