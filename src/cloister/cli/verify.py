"""`cloister verify URL|FILE`: every factor of the judgement, in words; exit code 0 only when it is trusted."""

import base64
import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from cloister.cli import output
from cloister.cli.trust import PolicyFile, RequirePq, SimulatorRoot, Trust, verdict
from cloister.errors import CloisterError, Malformed, MalformedEvidence, NotTrusted, VerificationFailed, WrongUse
from cloister.evidence.document import parse_document
from cloister.verify import Factor, Verified
from cloister.verify import verify as judge

__all__ = ["register", "verify"]

_MOST_FILE_BYTES = 32 << 20
_STYLES = {"pass": "green", "fail": "bold red", "not-checked": "yellow"}


@dataclass(frozen=True, slots=True)
class _Saved:
    """What `--save` writes: enough to judge again, offline, by any policy. `at` in Unix seconds."""

    document: bytes
    nonce: bytes
    at: float

    def encode(self) -> str:
        document = base64.b64encode(self.document).decode()
        return json.dumps({"cloister": 1, "nonce": self.nonce.hex(), "at": self.at, "document": document}, indent=1)


def register(app: typer.Typer) -> None:
    app.command()(verify)


def verify(
    target: Annotated[str, typer.Argument(metavar="URL|FILE", help="An enclave, or a document that --save wrote.")],
    policy: PolicyFile = None,
    dangerously_trust_simulator: SimulatorRoot = None,
    require_pq: RequirePq = False,
    as_json: Annotated[bool, typer.Option("--json", help="The whole judgement as JSON.")] = False,
    save: Annotated[Path | None, typer.Option("--save", metavar="FILE", help="Keep the document for later.")] = None,
    nonce: Annotated[
        str, typer.Option("--nonce", metavar="HEX", help="The nonce of a bare attestation document.")
    ] = "",
) -> None:
    """Verify an enclave, or a saved document at the time it was saved. Nothing but a nonce is sent.

    Exit code 0: trusted under the policy. 3: not trusted. 4: malformed. 5: unreachable.
    """
    trust = Trust(policy, dangerously_trust_simulator, require_pq)
    try:
        if target.startswith(("http://", "https://")):
            if nonce:
                raise WrongUse("An enclave is always asked with a fresh nonce.", hint="--nonce belongs to a FILE.")
            verified = _verify_enclave(target, trust, save)
        else:
            verified = _verify_file(Path(target), trust, nonce, save)
    except CloisterError as error:
        _show_refusal(error, as_json=as_json)
        raise typer.Exit(error.exit_code) from error
    output.json_value(verified.to_json()) if as_json else _show(verified)


def _verify_enclave(url: str, trust: Trust, save: Path | None) -> Verified:
    with trust.session(url) as session:
        try:
            return session.verify()
        finally:
            if save and session.document:
                at = session.verified.verified_at if session.verified else time.time()
                _write(save, _Saved(session.document, session.nonce, at))


def _verify_file(path: Path, trust: Trust, nonce: str, save: Path | None) -> Verified:
    if save:
        raise WrongUse("--save keeps what an enclave says; this is a file already.")
    saved = _read(path, nonce)
    when = datetime.fromtimestamp(saved.at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    output.note(f"judged as of {when}, by the file's own word: it says nothing about now", "dim")
    return judge(parse_document(saved.document), policy=trust.policy(), nonce=saved.nonce, now=saved.at)


def _write(path: Path, saved: _Saved) -> None:
    try:
        path.write_text(saved.encode() + "\n", encoding="ascii")
    except OSError as error:
        raise WrongUse(f"{path} cannot be written: {error.strerror}.") from error


def _read(path: Path, nonce: str) -> _Saved:
    """A saved document, or a bare one with its nonce from the command line, which is judged as of now.

    Raises: WrongUse, MalformedEvidence.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_FILE_BYTES)
    except OSError as error:
        hint = "An address begins with https:// or http://."
        raise WrongUse(f"{path} cannot be read: {error.strerror}.", hint=hint) from error
    try:
        if nonce:
            return _Saved(data, bytes.fromhex(nonce), time.time())
        return _from_json(json.loads(data))
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError, OSError) as error:  # OSError: no such time
        hint = "`cloister verify URL --save FILE` writes one. A bare attestation document needs --nonce HEX."
        raise MalformedEvidence(f"{path} is no saved document.", hint=hint) from error


def _from_json(raw: dict[str, Any]) -> _Saved:
    if raw["cloister"] != 1:
        raise ValueError("another version")
    at = float(raw["at"])
    datetime.fromtimestamp(at, UTC)  # raises when it is no time
    return _Saved(base64.b64decode(raw["document"], validate=True), bytes.fromhex(raw["nonce"]), at)


def _show(verified: Verified) -> None:
    word, style = verdict(verified.simulated)
    launch, statement = verified.launch, verified.statement
    output.line(output.styled((word, style), (f"  {output.one_line(verified.platform)}", "")))
    rows = {
        "deployment": f"{launch.deployment}, release {launch.release}",
        "owner": launch.owner_key,
        **{f"model {model.name}": f"{model.quantization}, sha256 {model.sha256}" for model in statement.models},
        "engine": f"{statement.engine.variant}, sha256 {statement.engine.sha256}",
        "weakened": ", ".join(statement.insecure) or "nothing",
        "until": datetime.fromtimestamp(verified.expires_at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    }
    for name, value in rows.items():
        output.line(f"  {output.one_line(name, 30):<14} {output.one_line(str(value))}")
    _show_factors(verified.factors)
    if verified.simulated:
        output.line(
            output.styled(("Simulated hardware proves nothing about who can read: whoever runs it can.", style))
        )


def _show_refusal(error: CloisterError, *, as_json: bool) -> None:
    """The verdict to standard output, if there could be one; the error to standard error, where all are."""
    judged = isinstance(error, NotTrusted | Malformed)
    factors = error.factors if isinstance(error, VerificationFailed) else ()
    known = tuple(factor for factor in factors if isinstance(factor, Factor))
    if as_json:
        output.json_value(
            {
                "v": 1,
                "verdict": "not-trusted" if judged else "not-verified",
                "error": type(error).__name__,
                "message": error.message,
                "hint": error.hint,
                "factors": [factor.to_json() for factor in known],
            }
        )
    elif judged:
        word, style = verdict(None)
        output.line(output.styled((word, style)))
        _show_factors(known)
    output.show_error(error, factors=False)


def _show_factors(factors: tuple[Factor, ...]) -> None:
    """What failed comes last: it is what a person looks for, and a terminal shows the end."""
    for title, verdict_of in (("checked:", "pass"), ("not proved:", "not-checked"), ("failed:", "fail")):
        chosen = [factor for factor in factors if factor.verdict == verdict_of]
        if chosen:
            output.line(title)
        for factor in chosen:
            _show_factor(factor)


def _show_factor(factor: Factor) -> None:
    """A passed factor's value is for the eye (`--json` has it whole); a failed one's is there to be compared."""
    name, style = output.one_line(factor.step, 40), _STYLES[factor.verdict]
    if factor.verdict == "not-checked":
        output.line(f"  {name}: {output.one_line(factor.hint)}", hang=4)
        return
    if factor.verdict == "pass":
        output.line(output.styled(("  pass", style), (f" {name:<27} {output.one_line(factor.got, 44)}", "")))
    else:
        output.line(output.styled(("  FAIL", style), (f" {name}", "")))
        output.line(f"       expected: {output.one_line(factor.expected) or 'nothing'}")
        output.line(f"       got:      {output.one_line(factor.got) or 'nothing'}")
    if factor.hint:
        output.line(output.styled((f"       {output.one_line(factor.hint)}", "yellow")), hang=7)
