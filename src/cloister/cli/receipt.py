"""`cloister receipt verify FILE`: which model gave an answer, by what its enclave signed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cloister.cli import output
from cloister.cli.judgement import moment
from cloister.cli.output import AsJson
from cloister.cli.receipt_file import Kept, parse_kept
from cloister.cli.trust import PolicyFile, RequirePq, SimulatorRoot, Trust
from cloister.cli.verify import examine
from cloister.errors import MalformedEvidence, NotTrusted, WrongUse
from cloister.evidence.receipt import Delivered, Receipt, find_comment, open_receipt, parse_delivered, salted
from cloister.verify import Verified

__all__ = ["check", "check_kept", "register", "save"]


def register(app: typer.Typer) -> None:
    app.callback()(_family)
    app.command()(verify)


def _family() -> None:
    """Verify what an enclave signed about an answer."""


def verify(
    answer: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="What `ask --receipt` kept; or an answer's content, byte for byte.", show_default=False
        ),
    ],
    request: Annotated[
        Path | None,
        typer.Option("--request", metavar="FILE", help="An answer's request, byte for byte.", show_default=False),
    ] = None,
    document: Annotated[
        Path | None,
        typer.Option("--document", metavar="DOC", help="What `cloister verify --save` kept.", show_default=False),
    ] = None,
    receipt: Annotated[
        Path | None,
        typer.Option(
            "--receipt", metavar="FILE", help="Receipt and salt, one space between; absent: at the answer's end."
        ),
    ] = None,
    policy: PolicyFile = None,
    dangerously_trust_simulator: SimulatorRoot = None,
    require_pq: RequirePq = False,
    as_json: AsJson = False,
) -> None:
    """Say whether an enclave that is trusted under the policy gave this answer to this request, and with which model.

    A bare answer needs --request and --document. Exit code 0: it did. 3: not trusted. 4: malformed.
    """
    trust = Trust(policy, dangerously_trust_simulator, require_pq)
    content = _read(answer)
    kept = parse_kept(content)
    if kept is not None:
        verified, found = _of_kept(kept, trust, bare=(request, document, receipt))
    elif request is None or document is None:
        hint = "`cloister ask --receipt FILE` keeps all in one file. A bare answer: --request FILE --document DOC."
        raise WrongUse("An answer alone proves nothing.", hint=hint)
    else:
        verified = examine(str(document), trust)
        delivered = _delivered(receipt)
        if delivered is None:
            content, delivered = find_comment(content)
        found = check(delivered, verified, _read(request), content)
    models = [model for model in verified.statement.models if model.sha256 in found.models]
    if as_json:
        output.json_value(
            {
                "models": [{"name": model.name, "sha256": model.sha256} for model in models],
                "statement_sha256": found.statement_sha256,
                "iat": found.iat,
                "verification": verified.to_json(),
            }
        )
        return
    for model in models:
        output.line(f"answered by  {output.one_line(model.name, 60)}, sha256:{model.sha256}", hang=13)
    output.line(
        f"enclave      {verified.platform}, deployment {output.one_line(verified.launch.deployment, 60)}", hang=13
    )
    output.line(f"signed       {moment(found.iat)} by the host's clock, which proves no time", hang=13)
    if verified.simulated:
        output.line("SIMULATED hardware: whoever ran that machine could have signed this too.", hang=13)


def _of_kept(kept: Kept, trust: Trust, *, bare: Sequence[Path | None]) -> tuple[Verified, Receipt]:
    if any(one is not None for one in bare):
        raise WrongUse("This file holds request, receipt and document already.", hint="Leave the other options away.")
    output.note(f"judged as of {moment(kept.document.at)}, by the file's own word: it says nothing about now", "dim")
    verified = kept.document.judge(trust.policy())
    return verified, check_kept(kept, verified)


def save(kept: tuple[Kept, Verified] | None, path: Path) -> None:
    """What `Recorder.last` holds, once the receipt in it was checked. Raises: MalformedEvidence, NotTrusted, WrongUse."""
    if kept is None:
        hint = (
            "It has to come whole; and an enclave that restarted just then signs for no earlier statement: ask again."
        )
        raise WrongUse("There is no answer with a receipt to keep.", hint=hint, step="receipt")
    check_kept(*kept)
    kept[0].write(path)
    output.note(f"receipt kept, with question and answer: cloister receipt verify {path}", "dim")


def check_kept(kept: Kept, verified: Verified) -> Receipt:
    """Raises: MalformedEvidence, NotTrusted."""
    content, delivered = find_comment(kept.answer)
    return check(delivered, verified, kept.request, content)


def check(delivered: Delivered, verified: Verified, request: bytes, content: bytes) -> Receipt:
    """(1) the key of the verified statement signed the receipt (2) about this very statement (3) about these contents.

    Raises: MalformedEvidence, NotTrusted.
    """
    receipt = open_receipt(delivered.jws, verified.statement.receipt_key)
    named = tuple(model.sha256 for model in verified.statement.models)
    _compare("receipt.statement", verified.statement_sha256, receipt.statement_sha256)
    _compare("receipt.models", ", ".join(named), ", ".join(receipt.models))
    _compare("receipt.request", salted(delivered.salt, request), receipt.request_sha256)
    _compare("receipt.response", salted(delivered.salt, content), receipt.response_sha256)
    return receipt


_WRONG = {
    "receipt.statement": "The receipt names another statement of this enclave than the document's.",
    "receipt.models": "Receipt and statement contradict each other about the model: believe neither.",
    "receipt.request": "The receipt is for another request, or the file is not what was sent, byte for byte.",
    "receipt.response": "The receipt is for another answer, or the file is not what came, byte for byte.",
}


def _compare(step: str, here: str, signed: str) -> None:
    if here != signed:
        raise NotTrusted(_WRONG[step], step=step, expected=signed, got=here)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise WrongUse(f"{path} cannot be read: {error.strerror}.") from error


def _delivered(path: Path | None) -> Delivered | None:
    if path is None:
        return None
    try:
        return parse_delivered(_read(path).decode("ascii").strip())
    except UnicodeDecodeError as error:
        raise MalformedEvidence(f"{path} holds no receipt.", step="receipt") from error
