"""`cloister chat URL`: a conversation with a verified enclave, and the loop that `cloister up` runs too."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Protocol

import typer
from prompt_toolkit import PromptSession

from cloister.cli import output
from cloister.cli.ask import MaxTokens, Raw, Seed, System, Temperature, show
from cloister.cli.dialogue import Asking, Conversation
from cloister.cli.trust import ApiKey, PolicyFile, RequirePq, SimulatorRoot, Trust, open_client, summary
from cloister.client import Session
from cloister.errors import CloisterError

__all__ = ["Turn", "chat", "register", "run_chat"]

_HELP = '''\
/set system TEXT   how the model shall behave; empty forgets it
/clear             forget the conversation so far
/attest            verify the enclave anew, and show what was verified
/bye               leave (Ctrl+D too)
"""                begin and end a text of several lines
Ctrl+C             stop the answer'''


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer. `whole` is False when the person stopped it."""

    question: str
    answer: str
    whole: bool


class _Reader(Protocol):
    interactive: bool

    def read(self, prompt: str) -> str:
        """The next line without its end. Raises EOFError, KeyboardInterrupt."""


class _Terminal:
    """Line editing with a history that lives as long as this process and is written nowhere."""

    interactive = True

    def __init__(self) -> None:
        self._session: PromptSession[str] = PromptSession()

    def read(self, prompt: str) -> str:
        return self._session.prompt(prompt)


class _Pipe:
    """Lines of standard input. The first error ends it, so that a script sees the exit code."""

    interactive = False

    def read(self, prompt: str) -> str:
        if not (line := sys.stdin.readline()):
            raise EOFError
        return line.rstrip("\r\n")


def register(app: typer.Typer) -> None:
    app.command()(chat)


def chat(
    url: Annotated[str, typer.Argument(metavar="URL", help="The enclave's address.", show_default=False)],
    policy: PolicyFile = None,
    dangerously_trust_simulator: SimulatorRoot = None,
    require_pq: RequirePq = False,
    api_key: ApiKey = "",
    system: System = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    raw: Raw = False,
) -> None:
    """Talk to a model. Nothing is sent before the enclave is verified, nor when what runs there changes."""
    asking = Asking(max_tokens=max_tokens, temperature=temperature, seed=seed, raw=raw)
    with Trust(policy, dangerously_trust_simulator, require_pq).session(url, pin_measurement=True) as session:
        run_chat(session, api_key=api_key, asking=asking, system=system)


def run_chat(
    session: Session,
    *,
    api_key: str = "",
    asking: Asking | None = None,
    system: str = "",
    on_turn: Callable[[Turn], None] | None = None,
) -> None:
    """Verify, say what was verified, then converse until the end of input. `on_turn` is called after each answer that
    came whole or was stopped by the person.

    On a terminal errors are shown and the conversation goes on; from a pipe the first one is raised.

    Raises: what verification raises, before anything is asked.
    """
    reader: _Reader = _Terminal() if output.is_terminal(sys.stdin) and output.is_terminal(sys.stdout) else _Pipe()
    _attest(session, force=False)
    if reader.interactive:
        output.note("/? for help, Ctrl+D to leave", "dim")
    conversation = Conversation(open_client(session, api_key), asking or Asking(), system)
    _Loop(session, conversation, reader, on_turn).run()


def _attest(session: Session, *, force: bool) -> None:
    for part in summary(session.verify(force=force)):
        output.note(part, hang=2)


class _Loop:
    def __init__(
        self, session: Session, conversation: Conversation, reader: _Reader, on_turn: Callable[[Turn], None] | None
    ) -> None:
        self._session = session
        self._conversation = conversation
        self._reader = reader
        self._on_turn = on_turn

    def run(self) -> None:
        while True:
            try:
                text = self._read()
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self._reader.interactive:
                    raise
                output.note("(Ctrl+D or /bye leaves)", "dim")
                continue
            if text in ("/bye", "/exit", "/quit"):
                return
            self._try(text)

    def _read(self) -> str:
        """One line, or everything between two marks of three quotes."""
        text = self._reader.read(">>> ")
        if not text.lstrip().startswith('"""'):
            return text.strip()
        text = text.lstrip()[3:]
        while not text.rstrip().endswith('"""'):
            text += "\n" + self._reader.read("... ")
        return text.rstrip()[:-3].strip("\n")

    def _try(self, text: str) -> None:
        try:
            if text.startswith("/"):
                self._command(text)
            elif text.strip():
                self._ask(text)
        except CloisterError as error:
            if not self._reader.interactive:
                raise
            output.show_error(error)

    def _ask(self, text: str) -> None:
        reply = self._conversation.ask(text)
        try:
            show(reply)
        except KeyboardInterrupt:
            if not self._reader.interactive:
                raise
            output.note("(stopped)", "dim")
        whole = bool(reply.finish_reason)
        self._conversation.keep(text, reply)
        if self._on_turn:
            self._on_turn(Turn(text, reply.text, whole))

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        what, _, value = rest.strip().partition(" ")
        if name in ("/?", "/help"):
            output.note(_HELP)
        elif name == "/clear":
            self._conversation.turns.clear()
            output.note("(forgotten)", "dim")
        elif name == "/attest":
            _attest(self._session, force=True)
        elif (name, what) == ("/set", "system"):
            self._conversation.system = value.strip().strip('"')
            output.note("(system prompt set)" if value else "(no system prompt)", "dim")
        else:
            output.note(f"There is no command {output.one_line(text, 40)!r}; /? lists them.")
