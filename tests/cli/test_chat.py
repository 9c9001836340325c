import base64
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from tests.cli.conftest import Enclave, wait_for
from typer.testing import Result

from cloister.cli import chat as chat_module
from cloister.cli import output
from cloister.cli.chat import Turn, run_chat
from cloister.cli.trust import Trust
from cloister.client import Session
from cloister.errors import EngineDied

Run = Callable[..., Result]


def test_refuses_to_ask_before_the_enclave_is_verified(run: Run, enclave: Enclave) -> None:
    ran = run("chat", enclave.url, input="my secret\n")
    assert (ran.exit_code, ran.stdout) == (3, "")
    assert "failed: evidence.root" in ran.stderr
    assert enclave.gateway.paths == ["GET /.well-known/cloister-attestation"]


def test_from_a_pipe_each_line_is_a_question_and_the_conversation_is_resent(run: Run, enclave: Enclave) -> None:
    ran = run("chat", enclave.url, *enclave.trusted, "--system", "Be kind.", input="one\n\ntwo")
    assert (ran.exit_code, ran.stdout) == (0, "You said one.\nYou said two.\n")
    assert ran.stderr.startswith("SIMULATED  sim, deployment laptop, toy")
    assert enclave.model.asked()[-1] == [
        ("system", "Be kind."),
        ("user", "one"),
        ("assistant", "You said one."),
        ("user", "two"),
    ]


def test_three_quotes_hold_several_lines(run: Run, enclave: Enclave) -> None:
    run("chat", enclave.url, *enclave.trusted, input='"""one\n  two\n"""\n"""three"""\n')
    assert [request[-1][1] for request in enclave.model.asked()] == ["one\n  two", "three"]


def test_a_system_prompt_may_have_several_lines(run: Run, enclave: Enclave) -> None:
    lines = '/set system """Be\nbrief."""\none\n/set system """\nSay "yes"\n"""\n/clear\ntwo\n'
    lines += '/set system say "no"\n/clear\nthree\n/set system """\n"""\n/clear\nfour\n'
    ran = run("chat", enclave.url, *enclave.trusted, input=lines)
    assert ran.exit_code == 0
    assert enclave.model.asked() == [
        [("system", "Be\nbrief."), ("user", "one")],
        [("system", 'Say "yes"'), ("user", "two")],
        [("system", 'say "no"'), ("user", "three")],
        [("user", "four")],
    ]
    assert ran.stderr.count("(system prompt set)") == 3
    assert "(no system prompt)" in ran.stderr


def test_an_end_of_input_inside_the_quotes_loses_nothing_and_says_so(run: Run, enclave: Enclave) -> None:
    ran = run("chat", enclave.url, *enclave.trusted, input='/set system """Be\nbrief.\n"""\n"""one\ntwo')
    assert ran.exit_code == 0
    assert enclave.model.asked() == [[("system", "Be\nbrief."), ("user", "one\ntwo")]]
    assert 'the input ended before """' in ran.stderr
    ran = run("chat", enclave.url, *enclave.trusted, input='/set system """Be\nkind.')
    assert "(system prompt set)" in ran.stderr
    assert 'the input ended before """' in ran.stderr


def test_what_stands_in_quotes_is_a_question_whatever_it_begins_with(run: Run, enclave: Enclave) -> None:
    ran = run("chat", enclave.url, *enclave.trusted, input='"""/bye"""\n"""\n/save x\n"""\n')
    assert ran.exit_code == 0
    assert [request[-1][1] for request in enclave.model.asked()] == ["/bye", "/save x"]


def test_help_says_what_a_pipe_does(run: Run) -> None:
    said = " ".join(run("chat", "--help").stdout.split())
    assert "From a pipe every line is a question of its own" in said


def test_a_blocked_chat_shows_the_lines_that_would_let_it_begin(run: Run, enclave: Enclave, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    start = f'version = 1\ndangerously_trust_simulator = "{enclave.root}"\ndangerously_tolerate_insecure = ["api-keys-off"]\n'
    policy.write_text(start + 'deployment = "other"\n[measurements]\nsim = [{ measurement = "' + "00" * 32 + '" }]\n')
    ran = run("chat", enclave.url, "--policy", policy, input="my secret\n")
    assert (ran.exit_code, ran.stdout) == (3, "")
    assert "expected: " + "00" * 32 in ran.stderr
    lines = ran.stderr.partition("with that policy.\n")[2]
    assert lines.startswith('deployment = "laptop"\n[measurements]\n')
    policy.write_text(start + lines)
    ran = run("chat", enclave.url, "--policy", policy, input="one\n")
    assert (ran.exit_code, ran.stdout) == (0, "You said one.\n")


@pytest.mark.parametrize(
    ("typed", "ends"),
    [
        ("/sta", ["ts"]),
        ("/s", ["et", "how", "ave", "tats"]),
        ("/set par", ["ameter"]),
        ("/set parameter te", ["mperature"]),
        ("stats", []),
    ],
)
def test_tab_offers_commands_and_parameters(keys: Callable[[str], None], typed: str, ends: list[str]) -> None:
    completer = chat_module._Terminal(None)._session.completer
    assert completer is not None
    offered = completer.get_completions(Document(typed), CompleteEvent(completion_requested=True))
    assert [typed[: len(typed) + one.start_position] + one.text for one in offered] == [typed + end for end in ends]


def test_commands(run: Run, enclave: Enclave) -> None:
    lines = ["one", "/set system Be brief.", "/clear", "two", "/attest", "/?", "/nonsense\x1b[2J", "/bye", "three"]
    ran = run("chat", enclave.url, *enclave.trusted, input="\n".join(lines))
    assert ran.exit_code == 0
    assert enclave.model.asked() == [[("user", "one")], [("system", "Be brief."), ("user", "two")]]
    assert ran.stderr.count("SIMULATED  sim") == 2
    assert enclave.gateway.paths.count("GET /.well-known/cloister-attestation") == 2
    assert "/set system TEXT" in ran.stderr
    assert "There is no command '/nonsense[2J'" in ran.stderr


def test_parameters_go_along_and_are_left_to_the_enclave_again(run: Run, enclave: Enclave) -> None:
    lines = ["/set parameter temperature 0.25", "/set parameter num_predict 7", "/set parameter stop END", "one"]
    lines += ["/set parameter temperature", "/set parameter top_k 5", "two"]
    ran = run("chat", enclave.url, *enclave.trusted, input="\n".join(lines))
    assert ran.exit_code == 0
    first, second = (request.sampling for request in enclave.model.requests)
    assert (first.temperature, first.max_tokens, first.stop) == (0.25, 7, ("END",))
    assert (second.temperature, second.max_tokens, second.top_k) == (1.0, 7, 5)


@pytest.mark.parametrize(
    "line", ["/set parameter temperature hot", "/set parameter beauty 1", "/set colour", "/load nothing", "/save ../x"]
)
def test_a_command_that_cannot_be_done_says_so(run: Run, enclave: Enclave, line: str) -> None:
    ran = run("chat", enclave.url, *enclave.trusted, input=f"{line}\none\n")
    assert ran.exit_code == 2
    assert "error: " in ran.stderr
    assert enclave.model.requests == []


def test_a_saved_conversation_goes_on_in_another_chat(run: Run, enclave: Enclave, tmp_path: Path) -> None:
    lines = ["/set system Be kind.", "/set parameter seed 3", "my secret", "/save trip-1"]
    assert run("chat", enclave.url, *enclave.trusted, input="\n".join(lines)).exit_code == 0
    ran = run("chat", enclave.url, *enclave.trusted, input="/load trip-1\ntwo\n/show\n")
    assert ran.exit_code == 0
    assert enclave.model.asked()[-1] == [
        ("system", "Be kind."),
        ("user", "my secret"),
        ("assistant", "You said my secret."),
        ("user", "two"),
    ]
    assert enclave.model.requests[-1].sampling.seed == 3
    assert "seed 3" in ran.stderr
    assert "turns       2" in ran.stderr


def test_regen_asks_the_last_question_again_and_stats_count(run: Run, enclave: Enclave) -> None:
    ran = run("chat", enclave.url, *enclave.trusted, input="/regen\n/stats\none\ntwo\n/regen\n/stats\n")
    assert ran.exit_code == 0
    assert "(nothing was asked yet)" in ran.stderr
    assert "(no answer yet)" in ran.stderr
    assert enclave.model.asked()[2] == enclave.model.asked()[1]
    assert "3 answers, 6 tokens" in ran.stderr


def test_the_last_answers_receipt_is_kept_on_demand(run: Run, enclave: Enclave, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    lines = ["one", f"/receipt {first}", "two", "/show", f"/receipt {second}"]
    ran = run("chat", enclave.url, *enclave.trusted, input="\n".join(lines))
    assert (ran.exit_code, ran.stdout) == (0, "You said one.\nYou said two.\n")
    for file, said in ((first, "one"), (second, "two")):
        assert run("receipt", "verify", file, *enclave.trusted).exit_code == 0
        request = base64.b64decode(json.loads(file.read_text())["request"])
        assert json.loads(request)["messages"][-1]["content"] == said


@pytest.mark.parametrize("lines", [["/receipt"], ["one", "/receipt"], ["/receipt there"], ["/web"]])
def test_what_is_not_there_is_not_kept_or_opened(run: Run, enclave: Enclave, lines: list[str]) -> None:
    ran = run("chat", enclave.url, *enclave.trusted, input="\n".join(lines))
    assert ran.exit_code == 2
    assert list(Path.cwd().iterdir()) == []


def test_a_stopped_answer_has_no_receipt(
    enclave: Enclave, keys: Callable[[str], None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    enclave.model.answer = lambda asked: ["It begins", None] if asked == "two" else ["Yes."]
    keys(f"one\rtwo\r/receipt {tmp_path / 'receipt'}\r\x04")
    original = output.printable

    def interrupt(text: str) -> str:
        if text == "It begins":
            main = threading.main_thread().ident
            threading.Timer(0.05, signal.pthread_kill, [main, signal.SIGINT]).start()
        return original(text)

    with pytest.MonkeyPatch.context() as patch, _trust(enclave) as session:
        patch.setattr(output, "printable", interrupt)
        run_chat(session)
        wait_for(lambda: enclave.model.running == 0)
    assert "no answer with a receipt" in capsys.readouterr().err
    assert not (tmp_path / "receipt").exists()


@pytest.mark.parametrize("desktop", [True, False])
def test_the_web_chats_address_is_shown_and_on_a_desktop_opened(
    enclave: Enclave,
    keys: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    desktop: bool,
) -> None:
    opened: list[str] = []

    def open_it(address: str) -> bool:
        opened.append(address)
        return True

    monkeypatch.setattr("webbrowser.open", open_it)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    if desktop:
        monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    addresses = iter(["http://127.0.0.1:1/chat#first", "http://127.0.0.1:1/chat#second"])
    keys("/web\r/web\r\x04")
    with _trust(enclave) as session:
        run_chat(session, web=lambda: next(addresses))
    shown = capsys.readouterr().err
    assert "http://127.0.0.1:1/chat#first\n" in shown
    assert opened == (["http://127.0.0.1:1/chat#first", "http://127.0.0.1:1/chat#second"] if desktop else [])


def test_a_failed_regen_leaves_the_answer_that_was_there(
    enclave: Enclave, keys: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter([["Yes."], [EngineDied("gone")], ["No."]])
    enclave.model.answer = lambda asked: next(answers)  # type: ignore[arg-type]
    keys("one\r/regen\rtwo\r\x04")
    with _trust(enclave) as session:
        run_chat(session)
    assert [text for _, text in enclave.model.asked()[-1]] == ["one", "Yes.", "two"]


def test_several_lines_are_edited_as_one(enclave: Enclave, keys: Callable[[str], None]) -> None:
    keys("one\x1b\rtwo\r\x04")
    with _trust(enclave) as session:
        run_chat(session)
    assert enclave.model.asked() == [[("user", "one\ntwo")]]


def test_lines_are_kept_only_on_demand_and_encrypted(
    enclave: Enclave, keys: Callable[[str], None], state: Path
) -> None:
    keys("first words\r\x04")
    with _trust(enclave) as session:
        run_chat(session)
    assert not (state / "lines").exists()
    keys("second words\r\x04")
    with _trust(enclave) as session:
        run_chat(session, history=True)
    assert b"second" not in (state / "lines").read_bytes()
    keys("\x1b[A\r\x04")  # arrow up
    with _trust(enclave) as session:
        run_chat(session, history=True)
    assert enclave.model.asked()[-1] == [("user", "second words")]


def test_raw_goes_without_a_template_and_without_a_past(run: Run, enclave: Enclave) -> None:
    run("chat", enclave.url, *enclave.trusted, "--raw", input="one\ntwo\n")
    assert [request.prompt.text for request in enclave.model.requests] == ["one", "two"]


def test_from_a_pipe_the_first_error_ends_it_with_its_code(run: Run, enclave: Enclave) -> None:
    enclave.model.answer = lambda asked: ["Part", EngineDied("gone")]
    ran = run("chat", enclave.url, *enclave.trusted, input="one\ntwo\n")
    assert (ran.exit_code, ran.stdout) == (5, "Part\n")
    assert len(enclave.model.requests) == 1


def test_a_hostile_model_cannot_paint(run: Run, enclave: Enclave) -> None:
    enclave.model.answer = lambda asked: ["\x1b[2J\x1b[H\x1b[32mVERIFIED", "\r\x1b]52;c;cm0=\x07\u202e", ">>> "]
    ran = run("chat", enclave.url, *enclave.trusted, input="one\n")
    assert ran.stdout == "[2J[H[32mVERIFIED]52;c;cm0=>>> \n"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this person's chats lie."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "cloister" / "chats"


def _trust(enclave: Enclave) -> Session:
    return Trust(simulator_root=enclave.root).session(enclave.url, pin_measurement=True)


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """What a person types; the conversation believes that it is on a terminal."""
    monkeypatch.setattr(output, "is_terminal", lambda stream: True)
    with create_pipe_input() as typed, create_app_session(input=typed, output=DummyOutput()):
        yield typed.send_text


def test_on_a_terminal_a_broken_turn_is_shown_and_forgotten_and_the_conversation_goes_on(
    enclave: Enclave, keys: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    dies: dict[str, list[str | Exception | None]] = {"two": ["Part", EngineDied("gone")]}
    enclave.model.answer = lambda asked: dies.get(asked, ["Yes."])
    turns: list[Turn] = []
    keys("one\rtwo\rthree\r\x04")
    with _trust(enclave) as session:
        run_chat(session, on_turn=turns.append)
    shown = capsys.readouterr()
    assert shown.out == "Yes.\nPart\nYes.\n"
    assert "error: " in shown.err
    assert [turn.question for turn in turns] == ["one", "three"]
    assert [text for _, text in enclave.model.asked()[-1]] == ["one", "Yes.", "three"]


def test_a_cut_answer_is_a_typed_error_and_not_kept(
    enclave: Enclave, keys: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    enclave.model.answer = lambda asked: ["word "] * 2000 if asked == "cut" else ["Yes."]
    enclave.gateway.cut = 6000  # more than a short answer has
    keys("one\rcut\rthree\r\x04")
    with _trust(enclave) as session:
        run_chat(session)
    shown = capsys.readouterr()
    assert shown.err.count("error: ") == 1
    assert "(stopped)" not in shown.err
    assert [text for _, text in enclave.model.asked()[-1]] == ["one", "Yes.", "three"]


def test_ctrl_c_at_the_prompt_does_not_leave(
    enclave: Enclave, keys: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    keys("half\x03one\r\x04")
    with _trust(enclave) as session:
        run_chat(session)
    shown = capsys.readouterr()
    assert shown.out == "You said one.\n"
    assert "(Ctrl+D or /bye leaves)" in shown.err


def test_ctrl_c_stops_the_answer_frees_the_enclave_and_keeps_the_conversation(
    enclave: Enclave, keys: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    enclave.model.answer = lambda asked: ["It begins", None] if asked == "one" else ["Yes."]
    turns: list[Turn] = []
    keys("one\rtwo\r\x04")
    original = output.printable

    def interrupt(text: str) -> str:
        if text == "It begins":
            main = threading.main_thread().ident
            threading.Timer(0.05, signal.pthread_kill, [main, signal.SIGINT]).start()
        return original(text)

    with pytest.MonkeyPatch.context() as patch, _trust(enclave) as session:
        patch.setattr(output, "printable", interrupt)
        run_chat(session, on_turn=turns.append)
        wait_for(lambda: enclave.model.running == 0)
    shown = capsys.readouterr()
    assert shown.out == "It begins\nYes.\n"
    assert "(stopped)" in shown.err
    assert turns == [Turn("one", "It begins", whole=False), Turn("two", "Yes.", whole=True)]


def test_it_sends_nothing_more_when_what_runs_there_changes(
    enclave: Enclave, keys: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def change(turn: Turn) -> None:
        enclave.gateway.change = lambda document: b"{}"

    keys("one\r/attest\r\x04")
    with _trust(enclave) as session:
        run_chat(session, on_turn=change)
    assert "error: " in capsys.readouterr().err
    assert len(enclave.model.requests) == 1


@pytest.fixture
def terminal(enclave: Enclave, tmp_path: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    command = [
        sys.executable,
        "-c",
        "from cloister.cli.main import main; main()",
        "chat",
        enclave.url,
        *enclave.trusted,
    ]
    environment = {**os.environ, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", "HOME": str(tmp_path)}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True, cwd=tmp_path
    ) as process:
        os.close(theirs)
        try:
            yield ours, process
        finally:
            process.kill()
            os.close(ours)


class _Screen:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.seen = b""

    def until(self, text: str) -> str:
        """Everything that was painted until `text` appeared, without colours."""
        while text not in (shown := re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", self.seen).decode("utf-8", "replace")):
            self.seen += os.read(self._descriptor, 4096)
        self.seen = shown.partition(text)[2].encode()
        return shown


@pytest.mark.timeout(120)
def test_a_real_terminal(enclave: Enclave, terminal: tuple[int, subprocess.Popen[bytes]]) -> None:
    enclave.model.answer = lambda asked: ["It begins", None] if asked == "one" else ["Yes."]
    descriptor, process = terminal
    screen = _Screen(descriptor)
    assert "SIMULATED  sim, deployment laptop" in screen.until(">>>")
    os.write(descriptor, b"one\r")
    screen.until("It begins")
    os.kill(process.pid, signal.SIGINT)
    screen.until("(stopped)")
    wait_for(lambda: enclave.model.running == 0)
    screen.until(">>>")
    os.write(descriptor, b"two\r")
    screen.until("Yes.")
    screen.until(">>>")
    os.write(descriptor, b"\x04")
    assert process.wait() == 0


def test_the_reader_of_a_pipe_reads_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["a\r\n", "b", ""])
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"readline": lambda self: next(lines)})())
    pipe = chat_module._Pipe()
    assert (pipe.read(">"), pipe.read(">")) == ("a", "b")
    with pytest.raises(EOFError):
        pipe.read(">")
