"""What a person may type at the chat's prompt beside questions: lines that begin with a slash, after Ollama's habits."""

import os
import sys
import webbrowser
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cloister.cli import output
from cloister.cli.chats import Chats
from cloister.cli.dialogue import Asking, Conversation
from cloister.cli.receipt import save
from cloister.cli.receipt_file import Recorder
from cloister.cli.trust import summary
from cloister.client import Session
from cloister.errors import WrongUse

__all__ = ["COMPLETIONS", "HELP", "Commands", "Statistics"]

HELP = '''\
/set system TEXT           how the model shall behave; empty forgets it
/set parameter NAME VALUE  one of: temperature, top_p, top_k, min_p, repeat_penalty, seed, num_predict, stop
/show                      system prompt, parameters, model
/save NAME, /load NAME     keep this conversation on this machine, encrypted; take one up again
/regen                     another answer to the last question
/stats                     how long the last answer took, and what all took together
/receipt FILE              keep a proof of which model gave the last answer, with question and answer
/web                       the web chat's address, where it runs beside this; on a desktop, open it
/clear                     forget the conversation so far
/attest                    verify the enclave anew, and show what was verified
/bye                       leave (Ctrl+D too)
"""                        begin and end a text of several lines, of /set system too (Alt+Enter: a new line)
Ctrl+C                     stop the answer'''

# As Ollama names them: which of `Asking`'s fields, and what reads the value.
_PARAMETERS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "temperature": ("temperature", float),
    "top_p": ("top_p", float),
    "top_k": ("top_k", int),
    "min_p": ("min_p", float),
    "repeat_penalty": ("repeat_penalty", float),
    "seed": ("seed", int),
    "num_predict": ("max_tokens", int),
    "stop": ("stop", lambda text: (text,)),
}

COMPLETIONS: Mapping[str, Any] = {
    "/set": {"system": None, "parameter": dict.fromkeys(_PARAMETERS)},
    **dict.fromkeys(
        ("/show", "/save", "/load", "/regen", "/stats", "/receipt", "/web", "/clear", "/attest", "/bye", "/?")
    ),
}


@dataclass(slots=True)
class Statistics:
    """Seconds and tokens: of the last answer, and of all since the beginning."""

    first: float = 0.0
    seconds: float = 0.0
    usage: Mapping[str, Any] = field(default_factory=dict)
    answers: int = 0
    tokens: int = 0

    def add(self, first: float, seconds: float, usage: Mapping[str, Any]) -> None:
        self.first, self.seconds, self.usage = first, seconds, usage
        self.answers += 1
        self.tokens += _count(usage, "completion_tokens")

    def show(self) -> None:
        if not self.answers:
            output.note("(no answer yet)", "dim")
            return
        prompt, answer = _count(self.usage, "prompt_tokens"), _count(self.usage, "completion_tokens")
        details = self.usage.get("prompt_tokens_details")
        cached = _count(details, "cached_tokens") if isinstance(details, Mapping) else 0
        rest = self.seconds - self.first
        speed = f", {(answer - 1) / rest:.1f} tokens/s after it" if answer > 1 and rest > 0 else ""
        output.note(f"prompt    {prompt} tokens, {cached} of them remembered")
        output.note(f"answer    {answer} tokens in {self.seconds:.2f} s, the first after {self.first:.2f} s{speed}")
        output.note(f"together  {self.answers} answers, {self.tokens} tokens")


def _count(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    return value if isinstance(value, int) else 0


@dataclass(frozen=True, slots=True)
class Beside:
    """What runs beside a conversation: who keeps the last answer's receipt, and what gives an address of the web chat."""

    recorder: Recorder
    web: Callable[[], str] | None = None


class Commands:
    """`run` does what a line says. `regenerate` asks the last question again."""

    def __init__(
        self,
        session: Session,
        conversation: Conversation,
        chats: Chats,
        regenerate: Callable[[], None],
        beside: Beside,
    ) -> None:
        self._session = session
        self._conversation = conversation
        self._chats = chats
        self._beside = beside
        self.statistics = Statistics()
        self._table: Mapping[str, Callable[[str], None]] = {
            "/?": lambda _rest: output.note(HELP),
            "/help": lambda _rest: output.note(HELP),
            "/set": self._set,
            "/show": lambda _rest: self._show(),
            "/save": self._save,
            "/load": self._load,
            "/regen": lambda _rest: regenerate(),
            "/stats": lambda _rest: self.statistics.show(),
            "/receipt": self._receipt,
            "/web": lambda _rest: self._web(),
            "/clear": lambda _rest: self._clear(),
            "/attest": lambda _rest: attest(session, force=True),
        }

    def run(self, text: str) -> None:
        """Raises: CloisterError as the command fails."""
        name, _, rest = text.partition(" ")
        command = self._table.get(name)
        if command is None:
            output.note(f"There is no command {output.one_line(text, 40)!r}; /? lists them.")
        else:
            command(rest.strip())

    def _set(self, rest: str) -> None:
        what, _, value = rest.partition(" ")
        if what == "system":
            self._conversation.system = _unquoted(value.strip())
            output.note("(system prompt set)" if self._conversation.system else "(no system prompt)", "dim")
        elif what == "parameter":
            name, _, given = value.strip().partition(" ")
            self._conversation.asking = _with_parameter(self._conversation.asking, name, given.strip())
            output.note(f"({name} set)" if given.strip() else f"({name} left to the enclave)", "dim")
        else:
            raise WrongUse("There is nothing else to set.", hint="/set system TEXT, or /set parameter NAME VALUE")

    def _show(self) -> None:
        conversation = self._conversation
        chosen = ", ".join(
            f"{name} {output.one_line(str(value), 60)}" for name, value in conversation.asking.chosen().items()
        )
        output.note(f"system      {output.one_line(conversation.system, 1000) or '(none)'}", hang=12)
        output.note(f"parameters  {chosen or '(as the enclave chooses)'}", hang=12)
        output.note(f"turns       {len(conversation.turns)}")
        for part in summary(self._session.verify()):
            output.note(part, hang=2)

    def _save(self, name: str) -> None:
        conversation = self._conversation
        content = {
            "v": 1,
            "system": conversation.system,
            "turns": conversation.turns,
            "parameters": conversation.asking.chosen(),
        }
        self._chats.save(name, content)
        output.note(f"(saved, encrypted; /load {name} takes it up again)", "dim")

    def _load(self, name: str) -> None:
        saved = self._chats.load(name)
        try:
            turns = [(str(question), str(answer)) for question, answer in saved["turns"]]
            asking = replace(self._conversation.asking, **_parameters(saved["parameters"]))
            system = str(saved["system"])
        except (KeyError, TypeError, ValueError) as error:
            raise WrongUse("This conversation was saved by another release.") from error
        self._conversation.turns[:] = turns
        self._conversation.asking, self._conversation.system = asking, system
        output.note(f"({len(turns)} turns)", "dim")

    def _receipt(self, name: str) -> None:
        if not name:
            raise WrongUse("The receipt needs a file.", hint="/receipt FILE")
        save(self._beside.recorder.last, Path(name).expanduser())

    def _web(self) -> None:
        """The address opens it once, in the browser that comes first."""
        if self._beside.web is None:
            raise WrongUse("No web chat runs beside this.", hint="`cloister up` and `cloister connect URL` serve one.")
        address = self._beside.web()
        output.note(address)
        if _has_desktop() and webbrowser.open(address):
            output.note("(opened)", "dim")

    def _clear(self) -> None:
        self._conversation.turns.clear()
        output.note("(forgotten)", "dim")


def attest(session: Session, *, force: bool) -> None:
    """Verify, and say what was verified. Raises: what verification raises."""
    for part in summary(session.verify(force=force)):
        output.note(part, hang=2)


def _unquoted(text: str) -> str:
    """Without the quotes around all of it, one or three; those of words within stay."""
    if len(text) >= 6 and text.startswith('"""') and text.endswith('"""'):
        return text[3:-3].strip("\n")
    inner = text[1:-1]
    return inner if text in (f'"{inner}"', '""') and '"' not in inner else text


def _has_desktop() -> bool:
    """Where there is none, a browser would be one of letters, in this very terminal."""
    return sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def _with_parameter(asking: Asking, name: str, value: str) -> Asking:
    """Raises: WrongUse for no such parameter, or a value that is none of its kind. What is out of bounds, the enclave
    says when it is asked."""
    if name not in _PARAMETERS:
        raise WrongUse("There is no such parameter.", expected=", ".join(_PARAMETERS), got=output.one_line(name, 40))
    field_name, read = _PARAMETERS[name]
    try:
        changed: Any = {field_name: read(value) if value else None}
        return replace(asking, **changed)
    except ValueError as error:
        raise WrongUse(f"{name} is a number.", got=output.one_line(value, 40)) from error


def _parameters(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Raises: TypeError, ValueError for what was not saved by us."""
    names = {field_name for field_name, _ in _PARAMETERS.values()}
    if not set(saved) <= names:
        raise ValueError
    found = {name: saved.get(name) for name in names}
    if found["stop"] is not None:
        found["stop"] = tuple(map(str, found["stop"]))
    return found
