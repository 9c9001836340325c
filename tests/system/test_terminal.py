"""`cloister up` at a terminal, seen through tmux: what a person reads."""

import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import closing

import pytest
from tests.system.shell import Shell, free_port, tool

pytestmark = pytest.mark.system


class Terminal:
    def __init__(self, shell: Shell, command: str) -> None:
        self._tmux = tool("tmux")
        self._name = uuid.uuid4().hex[:8]
        self._shell = shell
        self._do("-f", "/dev/null", "new-session", "-d", "-s", self._name, "-x", "110", "-y", "45", command)

    def _do(self, *arguments: str) -> str:
        return subprocess.run(
            [self._tmux, "-L", self._name, *arguments],
            env=self._shell.environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    def type(self, text: str) -> None:
        self.type_only(text)
        self.press("Enter")

    def type_only(self, text: str) -> None:
        self._do("send-keys", "-t", self._name, "-l", text)

    def press(self, key: str) -> None:
        self._do("send-keys", "-t", self._name, key)

    def screen(self) -> str:
        return self._do("capture-pane", "-t", self._name, "-p", "-J")

    def until(self, text: str, *, count: int = 1, patience: float = 60) -> str:
        """The screen, when the text stands there so often, be it over the end of a line."""
        deadline = time.monotonic() + patience
        while (seen := self.screen()).count(text) < count and " ".join(seen.split()).count(text) < count:
            assert time.monotonic() < deadline, f"{text!r} did not appear:\n{seen}"
            time.sleep(0.1)
        return seen

    def ended(self, *, patience: float = 60) -> None:
        """The command has ended, and the session with it."""
        deadline = time.monotonic() + patience
        with pytest.raises(subprocess.CalledProcessError):
            while time.monotonic() < deadline:
                self.screen()
                time.sleep(0.1)

    def close(self) -> None:
        subprocess.run([self._tmux, "-L", self._name, "kill-server"], capture_output=True, check=False)


@pytest.fixture
def terminal(shell: Shell) -> Iterator[Terminal]:
    one = Terminal(shell, f"cloister up --port {free_port()}")
    yield one
    one.close()


def test_a_conversation_with_the_hosts_view_beside_it(terminal: Terminal) -> None:
    seen = terminal.until(">>>")
    assert "SIMULATED" in seen
    assert "make run MODEL=hf.co/" in " ".join(seen.split())  # the reason before it may be long, and the line wrapped
    terminal.type("Who are you?")
    seen = terminal.until("your words are not in it")
    assert "/.well-known/ohttp-gateway" in seen
    answer = seen.split("Who are you?")[1].split("the host saw")[0]
    assert len(answer.split()) >= 3
    terminal.type("/?")
    terminal.until("Ctrl+C")
    terminal.type("/web")
    terminal.until("/chat#", count=2)  # one was shown at the start; each opens one browser
    terminal.press("C-c")  # at the prompt: stays
    terminal.until("/bye leaves")
    terminal.type("What is a nonce?")
    terminal.until("your words are not in it", count=2)
    terminal.type("/bye")
    terminal.ended()


def test_a_chat_with_a_served_enclave_knows_its_commands(shell: Shell) -> None:
    port = free_port()
    root = "~/.local/state/cloister/sim-root.pem"
    with (
        shell.background(f"cloister serve --platform sim --port {port}"),
        closing(Terminal(shell, f"cloister chat http://127.0.0.1:{port} --dangerously-trust-simulator {root}")) as one,
    ):
        one.until("Ctrl+D to leave")
        one.type("/set parameter temperature 0")
        one.until("(temperature set)")
        one.type("/set parameter num_predict 8")
        one.until("(num_predict set)")
        one.type('"""Who are')
        one.until("\n...")
        one.type('you?"""')
        one.until("(cut at the token limit)")
        one.type("/show")
        seen = one.until("turns       1")
        assert "temperature 0" in seen.partition("parameters  ")[2]
        one.type("/save a")
        one.until("(saved, encrypted; /load a takes it up again)")
        one.type("/clear")
        one.until("(forgotten)")
        one.type("/load a")
        one.until("(1 turns)")
        one.type("/regen")
        one.until("(cut at the token limit)", count=2)
        one.type_only("/sta")
        one.press("Tab")
        one.until(">>> /stats")
        one.press("Enter")
        one.until("together  2 answers, 16 tokens")
        one.type("/attest")
        one.until("SIMULATED  sim", count=3)  # at the start, by /show, and now
        one.type("/bye")
        one.ended()
