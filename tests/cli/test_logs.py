"""`cloister logs -f` against a host whose lines, and failures, are scripted."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tests.cli.running import run

from cloister.cli import logs
from cloister.cli.main import app
from cloister.errors import ConnectionFailed


def line(seq: int, text: str) -> dict[str, Any]:
    return {"seq": seq, "at": 0.0, "kind": "app", "text": text}


class Scripted:
    """Answers in their order, an exception among them is raised; then the reader presses Ctrl+C."""

    def __init__(self, *answers: list[dict[str, Any]] | ConnectionFailed) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[int, int]] = []

    def app(self, name: str, *rest: str) -> str:
        return "/".join((name, *rest))

    def get(self, path: str, *, after: int, wait: int) -> dict[str, Any]:
        assert path == "chat/logs"
        self.asked.append((after, wait))
        if not self.answers:
            raise KeyboardInterrupt
        answer = self.answers.pop(0)
        if isinstance(answer, ConnectionFailed):
            raise answer
        return {"lines": answer}


def follow(monkeypatch: pytest.MonkeyPatch, host: Scripted, *options: str) -> Any:
    @contextmanager
    def connected(_host: str) -> Iterator[Scripted]:
        yield host

    monkeypatch.setattr(logs, "connect", connected)
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    return run(app, "logs", "chat", *options)


def test_what_comes_later_is_shown_once_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Scripted([line(1, "first"), line(2, "second")], [], [line(7, "third")])
    ran = follow(monkeypatch, host, "-f")
    assert ran.exit_code == 130
    assert [one.split()[-1] for one in ran.stdout.splitlines()] == ["first", "second", "third"]
    assert [after for after, _ in host.asked] == [0, 2, 2, 7]
    assert all(wait > 0 for _, wait in host.asked)


def test_without_following_it_asks_once_and_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Scripted([line(1, "first")], [line(2, "second")])
    assert follow(monkeypatch, host).stdout.split()[-1] == "first"
    assert host.asked == [(0, 0)]


def test_following_survives_a_host_that_is_started_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = ConnectionFailed("The host cannot be reached.")
    host = Scripted([line(1, "before")], gone, gone, [line(2, "after")])
    ran = follow(monkeypatch, host, "-f")
    assert [one.split()[-1] for one in ran.stdout.splitlines()] == ["before", "after"]
    assert [after for after, _ in host.asked] == [0, 1, 1, 1, 2]


@pytest.mark.parametrize("lines", [[], [line(1, "before")]])
def test_a_host_that_is_away_is_said_at_once_or_after_a_while(
    monkeypatch: pytest.MonkeyPatch, lines: list[dict[str, Any]]
) -> None:
    gone = ConnectionFailed("The host cannot be reached.")
    host = Scripted(*([lines] if lines else []), *([gone] * 40))
    ran = follow(monkeypatch, host, "--follow")
    assert ran.exit_code == 5
    assert "cannot be reached" in ran.stderr
    assert len(host.asked) == (32 if lines else 1)
