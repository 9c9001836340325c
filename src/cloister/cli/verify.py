"""`cloister verify URL|FILE`: every factor of the judgement, in words; exit code 0 only when it is trusted."""

import base64
import json
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from cloister.cli import output
from cloister.cli.certificate import keep_certificate
from cloister.cli.judgement import moment, show, show_json, show_refusal
from cloister.cli.trust import (
    AmdService,
    IntelService,
    NvidiaService,
    Offline,
    PolicyFile,
    RequirePq,
    SimulatorRoot,
    Trust,
)
from cloister.collateral import AMD_KDS, INTEL_PCS, NVIDIA_RIM
from cloister.errors import CloisterError, MalformedEvidence, WrongUse
from cloister.evidence.document import parse_document
from cloister.verify import Policy, Verified
from cloister.verify import verify as judge
from cloister.verify.appraisers import platform_of
from cloister.verify.intel import judge_sgx, judge_tdx
from cloister.verify.platform import TcbLevel

__all__ = ["Saved", "examine", "is_address", "read_saved", "register", "saved_of", "verify"]

_MOST_FILE_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Saved:
    """What `--save` writes: enough to judge again, offline, by any policy. `at` in Unix seconds."""

    document: bytes
    nonce: bytes
    at: float

    def encode(self) -> str:
        document = base64.b64encode(self.document).decode()
        return json.dumps({"cloister": 1, "nonce": self.nonce.hex(), "at": self.at, "document": document}, indent=1)

    def judge(self, policy: Policy) -> Verified:
        """Raises: what `cloister.verify.verify` raises."""
        return judge(parse_document(self.document), policy=policy, nonce=self.nonce, now=self.at)


def register(app: typer.Typer) -> None:
    app.command()(verify)


def verify(
    target: Annotated[str, typer.Argument(metavar="URL|FILE", help="An enclave, or a document that --save wrote.")],
    policy: PolicyFile = None,
    dangerously_trust_simulator: SimulatorRoot = None,
    require_pq: RequirePq = False,
    as_json: Annotated[bool, typer.Option("--json", help="The whole judgement as JSON.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Say of each step what it means and what to do.")] = False,
    save: Annotated[Path | None, typer.Option("--save", metavar="DOC", help="Keep the document for later.")] = None,
    save_cert: Annotated[
        Path | None,
        typer.Option(
            "--save-cert", metavar="PEM", help="Keep the certificate of its TLS listener, if its key is attested."
        ),
    ] = None,
    tls: Annotated[
        str,
        typer.Option(
            "--tls", metavar="HOST:PORT", help="Where that listener is; absent: this host, the statement's port."
        ),
    ] = "",
    at: Annotated[
        str, typer.Option("--at", metavar="TIME", help="Judge a FILE at this time (ISO 8601, or Unix seconds).")
    ] = "",
    nonce: Annotated[
        str, typer.Option("--nonce", metavar="HEX", help="The nonce of a bare attestation document.")
    ] = "",
    early: Annotated[
        bool, typer.Option("--early", help="Say too how Intel's early update set, tomorrow's standard, rates it.")
    ] = False,
    offline: Offline = False,
    intel: IntelService = INTEL_PCS,
    amd: AmdService = AMD_KDS,
    nvidia: NvidiaService = NVIDIA_RIM,
) -> None:
    """Verify an enclave, or a saved document at the time it was saved. Nothing but a nonce is sent to the enclave; its
    vendor is asked for collateral that neither the enclave nor this machine has, unless --offline.

    Exit code 0: trusted under the policy. 3: not trusted. 4: malformed. 5: unreachable. With --save-cert the file is written
    only on 0.
    """
    trust = Trust(policy, dangerously_trust_simulator, require_pq, offline, intel, amd, nvidia)
    judged: list[Saved] = []
    if save_cert and not is_address(target):
        raise WrongUse("--save-cert asks an enclave's TLS listener; this is a file.")
    if tls and not save_cert:
        raise WrongUse("--tls says where --save-cert finds the certificate.", hint="Add --save-cert cert.pem.")
    try:
        verified = examine(target, trust, save=save, at=at, nonce=nonce, judged=judged)
        if save_cert:
            keep_certificate(save_cert, verified, target, tls)
        ahead = _early(judged[0], trust) if early else None
    except CloisterError as error:
        show_refusal(error, as_json=as_json, explained=explain)
        raise typer.Exit(error.exit_code) from error
    if as_json:
        show_json(verified, explained=explain, early=ahead)
    else:
        show(verified, explained=explain, early=ahead)


def _early(saved: Saved, trust: Trust) -> TcbLevel | None:
    """The same evidence's rating under the early update set; None where its vendor has none. Raises: Unreachable."""
    document = parse_document(saved.document)
    platform = platform_of(document)
    judge_quote = {"sgx": judge_sgx, "tdx": judge_tdx}.get(platform or "")
    if judge_quote is None:
        return None
    collateral = trust.completed(document, saved.at, early=True).intel or b""
    return judge_quote(document.items["cpu"].content, collateral, policy=Policy(), now=saved.at).tcb


def is_address(target: str) -> bool:
    return target.startswith(("http://", "https://"))


def examine(
    target: str,
    trust: Trust,
    *,
    save: Path | None = None,
    at: str = "",
    nonce: str = "",
    judged: list[Saved] | None = None,
) -> Verified:
    """An enclave, now, against what was seen of it before; or a saved document at its time, by itself. What was judged is
    appended to `judged`.

    Raises: what verification raises, and WrongUse for options that do not fit the target.
    """
    if not is_address(target):
        if save:
            raise WrongUse("--save keeps what an enclave says; this is a file already.")
        saved = _saved(Path(target), at, nonce)
        if judged is not None:
            judged.append(saved)
        return saved.judge(trust.policy())
    if nonce:
        raise WrongUse("An enclave is always asked with a fresh nonce.", hint="--nonce belongs to a FILE.")
    if at:
        raise WrongUse("An enclave is judged now.", hint="--at belongs to a FILE: --save DOC keeps one.")
    with trust.session(target) as session:
        try:
            return session.verify()
        finally:
            when = session.verified.verified_at if session.verified else time.time()
            if judged is not None:
                judged.append(Saved(session.document, session.nonce, when))
            if save and session.document:
                _write(save, Saved(session.document, session.nonce, when))


def _saved(path: Path, at: str, nonce: str) -> Saved:
    saved = read_saved(path, nonce)
    if at:
        saved = replace(saved, at=_time(at))
        output.note(f"judged as of {moment(saved.at)}, as you asked: it says nothing about now", "dim")
    elif not nonce:
        output.note(f"judged as of {moment(saved.at)}, by the file's own word: it says nothing about now", "dim")
    return saved


def _time(text: str) -> float:
    """Unix seconds. A time without a zone is UTC. Raises: WrongUse."""
    try:
        if text.replace(".", "", 1).isdecimal():
            seconds = float(text)
        else:
            when = datetime.fromisoformat(text)
            seconds = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
        datetime.fromtimestamp(seconds, UTC)  # raises when it is no time
    except (ValueError, OverflowError, OSError) as error:
        hint = "Such as 2027-01-31, 2027-01-31T12:00:00Z, or 1801396800."
        raise WrongUse("--at is no time.", hint=hint, step="at", got=text) from error
    return seconds


def _write(path: Path, saved: Saved) -> None:
    try:
        path.write_text(saved.encode() + "\n", encoding="ascii")
    except OSError as error:
        raise WrongUse(f"{path} cannot be written: {error.strerror}.") from error


def read_saved(path: Path, nonce: str = "") -> Saved:
    """A saved document, or a bare one with its nonce from the command line, which is judged as of now.

    Raises: WrongUse, MalformedEvidence.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_FILE_BYTES)
    except OSError as error:
        hint = "An address begins with https:// or http://."
        raise WrongUse(f"{path} cannot be read: {error.strerror}.", hint=hint) from error
    if nonce:
        return Saved(data, _nonce(nonce), time.time())
    try:
        return saved_of(json.loads(data))
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError, OSError) as error:  # OSError: no such time
        hint = "`cloister verify URL --save FILE` writes one. A bare attestation document needs --nonce HEX."
        raise MalformedEvidence(f"{path} is no saved document.", hint=hint) from error


def _nonce(text: str) -> bytes:
    """Raises: WrongUse."""
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        hint = "64 hexadecimal digits: the nonce that the document was asked for with."
        raise WrongUse("--nonce is not hexadecimal.", hint=hint, step="nonce", got=ascii(text)[:80]) from error


def saved_of(raw: dict[str, Any]) -> Saved:
    """Raises: ValueError, KeyError, TypeError, RecursionError, OverflowError, OSError for what is none."""
    if raw["cloister"] != 1:
        raise ValueError("another version")
    at = float(raw["at"])
    datetime.fromtimestamp(at, UTC)  # raises when it is no time
    return Saved(base64.b64decode(raw["document"], validate=True), bytes.fromhex(raw["nonce"]), at)
