"""`cloister demo attack`: play the hostile host against a real (simulated) enclave, and name the check that stops each.

Every attack really happens: the bytes are really changed, the other model is really loaded, the changed code really runs.
"""

import base64
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import cloister
from cloister.channel.keys import KeyRing
from cloister.cli import output
from cloister.cli.dialogue import Asking, Conversation
from cloister.cli.local import LocalEnclave, Plan, file_digest
from cloister.cli.output import AsJson
from cloister.cli.trust import open_client
from cloister.client import Session
from cloister.enclave.llm.llama.library import library_dir
from cloister.errors import CloisterError, NotTrusted, VerificationFailed
from cloister.evidence.binding import report_data
from cloister.evidence.document import Document, Item, parse_document
from cloister.evidence.launch import launch_digest
from cloister.models.download import resolve
from cloister.owner.deployment import owner_name
from cloister.sim import Device, measure
from cloister.sim.adversary import Adversary, Exchange
from cloister.verify import Factor, Policy

__all__ = ["register"]

_QUESTION = "What is my secret plan called? It is called operation marigold."
_SEALED = "/.well-known/ohttp-gateway"
_EVIDENCE = "/.well-known/cloister-attestation"


@dataclass(frozen=True, slots=True)
class Outcome:
    """`blocked_by` is empty when the attack went through."""

    attack: str
    blocked_by: str
    said: str


@dataclass(frozen=True, slots=True)
class Stage:
    """A genuine enclave behind a hostile host, and what its user pins."""

    enclave: LocalEnclave
    host: Adversary
    policy: Policy
    scratch: Path

    def ask(self, *, policy: Policy | None = None, url: str = "") -> str:
        """One question by a fresh client, through the hostile host; the whole answer, or what the client raises."""
        with Session(url or self.host.url, policy=policy or self.policy) as session, open_client(session, "") as client:
            reply = Conversation(client, Asking(max_tokens=24, temperature=0.0)).ask(_QUESTION)
            return "".join(reply)


def register(app: typer.Typer) -> None:
    app.callback()(_family)
    app.command()(attack)


def _family() -> None:
    """See for yourself."""


def attack(as_json: AsJson = False) -> None:
    """Play the hostile host. Exit code 0 when every attack was blocked, 1 when one went through."""
    outcomes = []
    output.note("a real enclave (simulated hardware) behind a hostile host, which now:", "dim")
    for outcome in _play():
        outcomes.append(outcome)
        if not as_json:
            _show(outcome)
    through = sum(not outcome.blocked_by for outcome in outcomes)
    if as_json:
        output.json_value([{"attack": o.attack, "blocked_by": o.blocked_by, "said": o.said} for o in outcomes])
    else:
        output.line(f"{len(outcomes)} attacks, {through or 'none'} went through.")
    if through:
        raise typer.Exit(1)


def _show(outcome: Outcome) -> None:
    output.line(outcome.attack)
    word = ("blocked", "green") if outcome.blocked_by else ("NOT BLOCKED", "bold red")
    by = f" by {outcome.blocked_by}: " if outcome.blocked_by else ": "
    output.line(output.styled(("  ", ""), word, (by + output.one_line(outcome.said), "")), hang=4)


def _play() -> Iterator[Outcome]:
    plan = Plan.make(resolve("tiny"), slots=2)
    with tempfile.TemporaryDirectory() as scratch, LocalEnclave(plan) as enclave:
        enclave.start()
        with Adversary(enclave.port) as host:
            stage = Stage(enclave, host, enclave.policy, Path(scratch))
            for name, run in ATTACKS:
                host.behave()
                yield _judge(name, lambda run=run: run(stage))  # type: ignore[misc]


def _judge(name: str, run: Callable[[], str]) -> Outcome:
    """An attack returns words when it went through, and raises what stopped it. Only a refusal stops one: an error of
    another kind says that the attack did not take place."""
    try:
        return Outcome(name, "", run())
    except VerificationFailed as error:
        steps = [factor.step for factor in error.factors if isinstance(factor, Factor) and factor.verdict == "fail"]
        return Outcome(name, ", ".join(steps), error.hint or error.message)
    except NotTrusted as error:
        return Outcome(name, error.step or type(error).__name__, error.message)
    except CloisterError as error:
        return Outcome(name, "", f"Not tried: {error.message}")


def _listen(stage: Stage) -> str:
    answer = stage.ask()
    seen = b"".join(e.path.encode() + e.request + e.response for e in stage.host.seen)
    words = (_QUESTION.encode(), b"marigold", answer.encode(), b"/v1/chat")
    if any(word and word in seen for word in words):
        return "The host read the conversation."
    raise NotTrusted(f"{len(seen):,} bytes seen, no word of the conversation in them.", step="the seal")


def _answer_plainly(stage: Stage) -> str:
    def lie(exchange: Exchange) -> None:
        if exchange.method == "POST":
            exchange.status = 200
            exchange.headers = [("content-type", "application/json")]
            exchange.response = json.dumps({"choices": [{"message": {"content": "Trust me."}}]}).encode()

    stage.host.behave(on_request=lie)
    return stage.ask()


def _flip_request(stage: Stage) -> str:
    def flip(exchange: Exchange) -> None:
        if exchange.method == "POST":
            exchange.request = _flipped(exchange.request, len(exchange.request) // 2)

    stage.host.behave(on_request=flip)
    return stage.ask()


def _flip_answer(stage: Stage) -> str:
    def flip(exchange: Exchange) -> None:
        if exchange.method == "POST":
            exchange.response = _flipped(exchange.response, len(exchange.response) // 2)

    stage.host.behave(on_response=flip)
    return stage.ask()


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _cut_answer(stage: Stage) -> str:
    def cut(exchange: Exchange) -> None:
        if exchange.method == "POST":
            exchange.response = exchange.response[: len(exchange.response) * 2 // 3]

    stage.host.behave(on_response=cut)
    return stage.ask()


def _replay_request(stage: Stage) -> str:
    stage.ask()
    recorded = next(exchange for exchange in stage.host.seen if exchange.method == "POST")
    again = Exchange("POST", _SEALED, recorded.request)
    stage.host.forward(again, {"content-type": "message/ohttp-chunked-req"})
    if again.status == 200:
        return "The enclave ran the same request twice."
    raise NotTrusted(f"The enclave refused it, with status {again.status}.", step="replay")


def _replay_evidence(stage: Stage) -> str:
    stage.ask()
    recorded = next(exchange for exchange in stage.host.seen if exchange.path.startswith(_EVIDENCE))

    def replay(exchange: Exchange) -> None:
        if exchange.path.startswith(_EVIDENCE):
            exchange.response = recorded.response

    stage.host.behave(on_response=replay)
    return stage.ask()


def _swap_keys(stage: Stage) -> str:
    """A man in the middle writes its own keys into the statement."""

    def swap(exchange: Exchange) -> None:
        if exchange.path.startswith(_EVIDENCE):
            document = parse_document(exchange.response)
            items = {**document.items, "statement": _with_keys(document, KeyRing(time.time()).ohttp_keys)}
            exchange.response = Document(items).encode()

    stage.host.behave(on_response=swap)
    return stage.ask()


def _with_keys(document: Document, keys: bytes) -> Item:
    statement = json.loads(document.items["statement"].content)
    statement["ohttp_keys"] = base64.urlsafe_b64encode(keys).rstrip(b"=").decode()
    return Item("application/json", json.dumps(statement).encode())


def _impersonate(stage: Stage) -> str:
    """Own keys in the statement, and own evidence for it: from a simulator with another root."""
    device = Device.open(stage.scratch / "other-simulator")
    plan = stage.enclave.plan
    chip = device.launch(plan.measurement, launch_digest(plan.launch()))

    def impersonate(exchange: Exchange) -> None:
        if exchange.path.startswith(_EVIDENCE):
            text = exchange.path.partition("nonce=")[2]
            nonce = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
            document = parse_document(exchange.response)
            statement = _with_keys(document, KeyRing(time.time()).ohttp_keys)
            evidence = chip.report(report_data(nonce, statement.content))
            exchange.response = Document({**document.items, "statement": statement, **evidence}).encode()

    stage.host.behave(on_response=impersonate)
    with chip:
        return stage.ask()


@contextmanager
def _running(stage: Stage, plan: Plan, **how: Any) -> Iterator[str]:
    """Another enclave on the same (simulated) machine."""
    with LocalEnclave(plan, device=stage.enclave.device, **how) as other:
        other.start()
        yield other.url


def _hand_over_other_model(stage: Stage) -> str:
    """The launch config names the genuine model; the file handed over is another."""
    plan = replace(stage.enclave.plan, model=_other_model(stage))
    with _running(stage, plan) as url:
        return stage.ask(url=url)


def _launch_other_model(stage: Stage) -> str:
    model = _other_model(stage)
    plan = replace(stage.enclave.plan, model=model, model_digest=file_digest(model.path))
    with _running(stage, plan) as url:
        return stage.ask(url=url)


def _other_model(stage: Stage) -> Any:
    """The genuine model with one weight changed."""
    genuine = stage.enclave.plan.model
    path = stage.scratch / "other.gguf"
    data = genuine.path.read_bytes()
    path.write_bytes(_flipped(data, len(data) - 1000))
    return replace(genuine, path=path)


def _change_code(stage: Stage) -> str:
    """One byte of the enclave's code, and that code runs."""
    package = stage.scratch / "code" / "cloister"
    shutil.copytree(Path(cloister.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "*.gguf"))
    module = package / "enclave" / "gateway" / "__init__.py"
    module.write_text(module.read_text() + "\n")
    plan = replace(stage.enclave.plan, measurement=measure(library_dir(), package=package))
    with _running(stage, plan, package_root=package.parent) as url:
        return stage.ask(url=url)


def _change_engine(stage: Stage) -> str:
    """One byte at the end of the engine's library, and that library runs."""
    folder = stage.scratch / "engine"
    shutil.copytree(library_dir(), folder, symlinks=False)
    with (folder / "libllama.so").open("ab") as library:
        library.write(b"\0")
    plan = replace(stage.enclave.plan, measurement=measure(folder))
    with _running(stage, plan, engine_dir=folder) as url:
        return stage.ask(url=url)


def _other_owner(stage: Stage) -> str:
    """The genuine code and model, booted under the attacker's own owner key: its measurement matches."""
    plan = replace(stage.enclave.plan, owner=owner_name(Ed25519PrivateKey.generate()))
    with _running(stage, plan) as url:
        return stage.ask(url=url)


def _weaken(stage: Stage) -> str:
    """The genuine code, told not to pad what it streams."""
    plan = stage.enclave.plan
    plan = replace(plan, config=replace(plan.config, padding=False))
    with _running(stage, plan) as url:
        return stage.ask(url=url)


def _unpinned(stage: Stage) -> str:
    """The person names nothing, and the host hopes for a default that trusts a simulator."""
    return stage.ask(policy=Policy())


ATTACKS: tuple[tuple[str, Callable[[Stage], str]], ...] = (
    ("listens", _listen),
    ("answers by itself, in plain text", _answer_plainly),
    ("flips a bit of a request", _flip_request),
    ("flips a bit of an answer", _flip_answer),
    ("cuts an answer short", _cut_answer),
    ("replays a request", _replay_request),
    ("replays old evidence", _replay_evidence),
    ("swaps the keys in the statement", _swap_keys),
    ("impersonates, with a chip of its own", _impersonate),
    ("hands over another model", _hand_over_other_model),
    ("launches another model", _launch_other_model),
    ("changes the code by a byte", _change_code),
    ("changes the engine by a byte", _change_engine),
    ("boots the same image under another owner", _other_owner),
    ("switches the padding off", _weaken),
    ("simulates, to a client that trusts no simulator", _unpinned),
)
