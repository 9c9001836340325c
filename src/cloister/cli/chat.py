"""`cloister chat URL`: a conversation with a verified enclave, and the loop that `cloister up` runs too."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import typer
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from cloister.cli import output
from cloister.cli.ask import MaxTokens, Raw, Seed, System, Temperature, end_note, show
from cloister.cli.chats import Chats, KeptHistory
from cloister.cli.commands import COMPLETIONS, Beside, Commands, attest
from cloister.cli.dialogue import Asking, Conversation, Reply
from cloister.cli.judgement import show_blocked, stopping
from cloister.cli.local import state_directory
from cloister.cli.receipt_file import Recorder
from cloister.cli.rendering import show_markdown
from cloister.cli.trust import ApiKey, PolicyFile, RequirePq, SimulatorRoot, Trust, open_client
from cloister.client import Session
from cloister.errors import CloisterError

__all__ = ["Turn", "chat", "register", "run_chat"]

_QUOTES = '"""'


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


class _Completer(Completer):
    """Commands, and the words that may follow them."""

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        *before, last = document.text_before_cursor.split(" ")
        words: Mapping[str, Any] = COMPLETIONS
        for word in before:
            words = words.get(word) or {}
        return (Completion(word, -len(last)) for word in words if word.startswith(last))


class _Terminal:
    """Editing of one line or several. The history lives as long as this process, and is written nowhere unless `kept`."""

    interactive = True

    def __init__(self, kept: Chats | None) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=InMemoryHistory() if kept is None else KeptHistory(kept),
            completer=_Completer(),
            complete_while_typing=False,
            key_bindings=_keys(),
            multiline=True,
        )

    def read(self, prompt: str) -> str:
        return self._session.prompt(prompt)


def _keys() -> KeyBindings:
    """Enter sends, Alt+Enter begins a new line."""
    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


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
    history: Annotated[
        bool, typer.Option("--history", help="Keep what you type for the next chat, encrypted on this machine.")
    ] = False,
) -> None:
    """Talk to a model. Nothing is sent before the enclave is verified, nor when what runs there changes.

    From a pipe every line is a question of its own, or a command such as /save NAME, and the first error ends the chat. A
    text of several lines stands between two marks of three double quotes; `cloister ask URL < FILE` sends a whole file as
    one question.
    """
    asking = Asking(max_tokens=max_tokens, temperature=temperature, seed=seed, raw=raw)
    trust = Trust(policy, dangerously_trust_simulator, require_pq)
    with stopping(), trust.session(url, pin_measurement=True) as session:
        run_chat(session, api_key=api_key, asking=asking, system=system, history=history)


def run_chat(
    session: Session,
    *,
    api_key: str = "",
    asking: Asking | None = None,
    system: str = "",
    on_turn: Callable[[Turn], None] | None = None,
    history: bool = False,
    web: Callable[[], str] | None = None,
) -> None:
    """Verify, say what was verified, then converse until the end of input. `on_turn` is called after each answer that
    came whole or was stopped by the person. `history`: what is typed is kept, encrypted. `web` gives a new address of the
    web chat, where one runs beside this.

    On a terminal errors are shown and the conversation goes on; from a pipe the first one is raised.

    Raises: what verification raises, before anything is asked.
    """
    chats = Chats(state_directory() / "chats")
    typed = output.is_terminal(sys.stdin) and output.is_terminal(sys.stdout)
    reader: _Reader = _Terminal(chats if history else None) if typed else _Pipe()
    attest(session, force=False)
    if reader.interactive:
        output.note("/? for help, Ctrl+D to leave", "dim")
    client = open_client(session, api_key)
    beside = Beside(Recorder(session, client), web)
    conversation = Conversation(client, asking or Asking(), system)
    _Loop(session, conversation, reader, chats, on_turn, beside).run()


class _Loop:
    def __init__(
        self,
        session: Session,
        conversation: Conversation,
        reader: _Reader,
        chats: Chats,
        on_turn: Callable[[Turn], None] | None,
        beside: Beside,
    ) -> None:
        self._conversation = conversation
        self._reader = reader
        self._commands = Commands(session, conversation, chats, self._regenerate, beside)
        self._on_turn = on_turn

    def run(self) -> None:
        while True:
            try:
                text, quoted = self._read()
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self._reader.interactive:
                    raise
                output.note("(Ctrl+D or /bye leaves)", "dim")
                continue
            if not quoted and text in ("/bye", "/exit", "/quit"):
                return
            self._try(text, quoted=quoted)

    def _read(self) -> tuple[str, bool]:
        """One line, or everything between two marks of three quotes, and whether it stood between them: a question then,
        whatever it begins with. A system prompt may stand between them too, and is a command still."""
        line = self._reader.read(">>> ")
        before, mark, text = line.partition(_QUOTES)
        words = before.split()
        if not mark or words not in ([], ["/set", "system"]):
            return line.strip(), False
        text = self._until_quotes(text).strip("\n")
        return (f"/set system {_QUOTES}{text}{_QUOTES}", False) if words else (text, True)

    def _until_quotes(self, text: str) -> str:
        """Without the closing mark. The end of input closes it too: what was given counts."""
        while not text.rstrip().endswith(_QUOTES):
            try:
                text += "\n" + self._reader.read("... ")
            except EOFError:
                output.note(f"(the input ended before {_QUOTES}: all of it was taken)", "dim")
                return text
        return text.rstrip().removesuffix(_QUOTES)

    def _try(self, text: str, *, quoted: bool) -> None:
        try:
            if text.startswith("/") and not quoted:
                self._commands.run(text)
            elif text.strip():
                self._ask(text)
        except CloisterError as error:
            if not self._reader.interactive:
                raise
            show_blocked(error)

    def _ask(self, text: str) -> None:
        reply = self._conversation.ask(text)
        watch = _Watch()
        try:
            if self._reader.interactive and not self._conversation.asking.raw:
                show_markdown(watch.over(reply))
                end_note(reply)
            else:
                show(reply, watch.over(reply))
        except KeyboardInterrupt:
            if not self._reader.interactive:
                raise
            output.note("(stopped)", "dim")
        whole = bool(reply.finish_reason)
        if whole:
            self._commands.statistics.add(watch.first, watch.last, reply.usage)
        self._conversation.keep(text, reply)
        if self._on_turn:
            self._on_turn(Turn(text, reply.text, whole))

    def _regenerate(self) -> None:
        """The question stands again as if it had just been asked; what was answered before comes back if that fails."""
        turns = self._conversation.turns
        if not turns:
            output.note("(nothing was asked yet)", "dim")
            return
        before = len(turns)
        last = turns.pop()
        try:
            self._ask(last[0])
        finally:
            if len(turns) < before:
                turns.append(last)


class _Watch:
    """Seconds from its making until the first and the last piece."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self.first = self.last = 0.0

    def over(self, reply: Reply) -> Iterator[str]:
        for piece in reply:
            self.last = time.monotonic() - self._began
            self.first = self.first or self.last
            yield piece
