"""`cloister ask URL TEXT`: one question to a verified enclave, its answer streamed to standard output."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from cloister.cli import output
from cloister.cli.dialogue import Asking, Conversation, Reply
from cloister.cli.judgement import stopping
from cloister.cli.receipt import save
from cloister.cli.receipt_file import Recorder
from cloister.cli.trust import ApiKey, PolicyFile, RequirePq, SimulatorRoot, Trust, open_client, summary
from cloister.errors import WrongUse
from cloister.verify import Verified

__all__ = ["ask", "end_note", "register", "show"]

System = Annotated[str, typer.Option("--system", metavar="TEXT", help="A system prompt.")]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", metavar="N", min=1, help="The longest answer, in tokens.")
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", metavar="T", min=0.0, max=2.0, help="0 always takes the likeliest.")
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", min=0, help="The same seed gives the same answer.")]
Raw = Annotated[bool, typer.Option("--raw", help="Send the text as it stands, without the model's chat template.")]


def register(app: typer.Typer) -> None:
    app.command()(ask)


def ask(
    url: Annotated[str, typer.Argument(metavar="URL", help="The enclave's address.", show_default=False)],
    text: Annotated[
        str, typer.Argument(metavar="[TEXT]", help="The question; `-` or none: standard input.", show_default=False)
    ] = "-",
    policy: PolicyFile = None,
    dangerously_trust_simulator: SimulatorRoot = None,
    require_pq: RequirePq = False,
    api_key: ApiKey = "",
    system: System = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    raw: Raw = False,
    receipt: Annotated[
        Path | None,
        typer.Option(
            "--receipt",
            metavar="FILE",
            help="Keep a proof of which model answered, with question and answer, for `cloister receipt verify`.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Answer, counts and verification as JSON, at the end.")
    ] = False,
) -> None:
    """Ask one question. Nothing is sent before the enclave is verified; an answer that breaks off is an error."""
    question = _question(text)
    asking = Asking(max_tokens=max_tokens, temperature=temperature, seed=seed, raw=raw)
    with stopping(), Trust(policy, dangerously_trust_simulator, require_pq).session(url) as session:
        verified = session.verify()
        for part in summary(verified):
            output.note(part, hang=2)
        if verified.launch.app.kind != "llm":
            output.note("an app of its owner's own: `cloister fetch URL /PATH` asks any of its paths", "dim")
        client = open_client(session, api_key)
        recorder = Recorder(session, client) if receipt is not None else None
        reply = Conversation(client, asking, system).ask(question)
        if as_json:
            _finish_json(reply, verified)
        else:
            show(reply)
        if recorder is not None and receipt is not None:
            save(recorder.last, receipt)


def _question(text: str) -> str:
    if text != "-":
        return text
    if output.is_terminal(sys.stdin):
        raise WrongUse("There is no question.", hint='cloister ask URL "your question", or pipe it in.')
    return sys.stdin.read()


def show(reply: Reply, pieces: Iterable[str] | None = None) -> None:
    """Stream an answer to standard output; its line ends whatever happens. `pieces`: the reply's, through other hands."""
    try:
        for piece in reply if pieces is None else pieces:
            output.write(piece)
    finally:
        if reply.text:
            output.write("\n")
    end_note(reply)


def end_note(reply: Reply) -> None:
    """Why an answer ended, where that is not by itself."""
    if reply.finish_reason == "length":
        output.note("(cut at the token limit)", "dim")


def _finish_json(reply: Reply, verified: Verified) -> None:
    for _piece in reply:
        pass
    output.json_value(
        {
            "answer": reply.text,
            "finish_reason": reply.finish_reason,
            "usage": reply.usage,
            "verification": verified.to_json(),
        }
    )
