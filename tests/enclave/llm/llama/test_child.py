import contextlib
import mmap
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cloister.enclave.llm.engine import Delta, Done, Event, Started
from cloister.enclave.llm.llama import LoopSettings, child, wire
from cloister.enclave.llm.llama.child import BEAT_SIZE, Service, _Desk, _first_token, read_beat
from cloister.enclave.llm.llama.embedding import NoDirectionError
from cloister.enclave.llm.llama.model import AbortedError
from cloister.errors import CloisterError, MalformedModel, WrongUse


def test_messages_of_two_threads_never_mix() -> None:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    service = Service(ours, -1, mmap.mmap(-1, BEAT_SIZE), LoopSettings())
    said = [{"t": "reply", "value": letter * 200_000} for letter in "ab"]

    def talk(message: dict[str, Any]) -> None:
        for _ in range(20):
            service.send(message)

    threads = [threading.Thread(target=talk, args=(message,)) for message in said]
    reader = wire.FrameReader(wire.MAX_EVENT)
    heard: list[dict[str, Any]] = []
    with ours, theirs:
        for thread in threads:
            thread.start()
        while len(heard) < 40:
            heard += reader.feed(theirs.recv(1 << 16))
        for thread in threads:
            thread.join()
    assert sorted(message["value"][0] for message in heard) == ["a"] * 20 + ["b"] * 20
    assert all(message in said for message in heard)


def told(events: list[tuple[int, Event | CloisterError]]) -> list[list[tuple[int, Event | CloisterError]]]:
    """What the front hears of one step's events, message by message."""
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            Service(ours, -1, mmap.mmap(-1, BEAT_SIZE), LoopSettings())._tell(events)
        messages = wire.FrameReader(wire.MAX_EVENT).feed(theirs.recv(1 << 16))
    assert all(message["t"] == "events" for message in messages)
    return [[wire.decode_event(item) for item in message["e"]] for message in messages]


def test_a_steps_events_too_long_for_one_message_go_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_EVENT", 1000)
    events: list[tuple[int, Event | CloisterError]] = [(number, Delta("a" * 200, 1)) for number in range(10)]
    messages = told(events)
    assert len(messages) > 1
    assert [item for message in messages for item in message] == events


def test_an_event_too_long_for_any_message_ends_its_own_stream_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_EVENT", 1000)
    done = Done("stop", 1, 1, 0)
    heard = [item for message in told([(1, done), (2, Delta("a" * 2000, 1)), (3, done)]) for item in message]
    assert [number for number, _ in heard] == [1, 2, 3]
    assert isinstance(heard[1][1], WrongUse)
    assert heard[0][1] == heard[2][1] == done


class Words:
    """In place of the model: `find` is its tokenizer."""

    def __init__(self, find: Callable[[], list[int]]) -> None:
        self._find = find

    def tokenize(self, _text: str, **_how: bool) -> list[int]:
        return self._find()


def prepared(orders: int, find: Callable[[], list[int]]) -> tuple[int, "queue.SimpleQueue[Any]"]:
    """The preparing thread's work, done here: how many signs of life it gave, and what it left for the decoding one."""
    ours, theirs = socket.socketpair()
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    nothing: Any = None
    words: Any = Words(find)
    with ours, theirs:
        service = Service(ours, -1, mmap.mmap(-1, BEAT_SIZE), LoopSettings())
        desk = _Desk(service, nothing, nothing, words, inbox)
        for number in range(orders):
            desk._receive({"t": "tokenize", "id": number, "text": "x", "add_special": False, "parse_special": False})
        desk._orders.put(None)
        desk.prepare()
    return read_beat(service.beat), inbox


def test_each_prompt_in_a_long_line_is_a_sign_of_life() -> None:
    assert prepared(12, lambda: [1])[0] == 12


def test_an_order_that_fails_as_none_should_ends_the_engine_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    def find() -> list[int]:
        raise RuntimeError("secret words")

    lived, inbox = prepared(2, find)
    assert lived == 0
    assert inbox.get_nowait() is None
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("keep", "expected"), [(0.0, [True]), (60.0, [False, False, False])])
def test_an_engine_without_work_rests_until_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch, keep: float, expected: list[bool]
) -> None:
    monkeypatch.setattr(child, "_REST_SECONDS", 0.01)
    monkeypatch.setattr(child, "_KEEP_SECONDS", keep)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    forgot = []

    def rest(*, forget: bool, stop: Callable[[], bool]) -> bool:
        forgot.append(forget)
        assert not stop()
        if len(forgot) == len(expected):
            inbox.put(None)
            assert stop(), "there is work: the rest may not go on"
        return forget

    loop: Any = SimpleNamespace(busy=False, rest=rest, gathering=lambda: 0.0)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        service = Service(ours, -1, mmap.mmap(-1, BEAT_SIZE), LoopSettings())
        assert not service._take(inbox, loop)
    assert forgot == expected


@pytest.mark.parametrize(("patience", "expected"), [(60.0, [1, 2]), (0.0, [1])])
def test_while_prompts_come_together_the_next_one_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, patience: float, expected: list[int]
) -> None:
    monkeypatch.setattr(child, "_NEXT_ARRIVAL", patience)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    taken: list[int] = []
    loop: Any = SimpleNamespace(busy=True, gathering=lambda: 60.0 if len(taken) < 2 else 0.0)
    inbox.put(lambda: taken.append(1))
    later = threading.Timer(0.05, lambda: inbox.put(lambda: taken.append(2)))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        later.start()
        assert Service(ours, -1, mmap.mmap(-1, BEAT_SIZE), LoopSettings())._take(inbox, loop)
        later.join()
    assert taken == expected


def test_nobody_may_look_into_a_child_that_is_locked_down() -> None:
    code = (
        "import ctypes, os; from cloister.enclave.llm.llama.child import _lock_down; "
        "_lock_down(os.getppid()); print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"  # PR_GET_DUMPABLE
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"0\n"


def test_a_first_token_is_seen_once_for_each_stream() -> None:
    waiting: set[int] = set()
    token, done = Delta("a", 1), Done("stop", 3, 1, 0)
    assert not _first_token([(1, Started(3, 0, 0)), (2, Started(3, 0, 0))], waiting)
    assert _first_token([(1, token), (2, token)], waiting)
    assert not _first_token([(1, token), (2, done)], waiting)
    assert not _first_token([(3, Started(3, 0, 0)), (3, done)], waiting)  # ended without one
    assert waiting == set()


def test_a_prepared_job_is_in_the_inbox_before_a_young_chunk_is_told_to_wait_for_it() -> None:
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    seen: list[object] = []
    loop = SimpleNamespace(
        forgotten=lambda number: False,
        submit=seen.append,
        regroup=lambda number: seen.append(f"regroup {number}, {inbox.qsize()} waits"),
    )
    preparer = SimpleNamespace(prepare=lambda number, request: f"job {number}")
    nothing: Any = SimpleNamespace()
    _Desk(nothing, loop, preparer, nothing, inbox)._prepare(7, nothing)  # type: ignore[arg-type]
    assert seen == ["regroup 7, 1 waits"]
    inbox.get()()
    assert seen[1:] == ["job 7"]


class Desk:
    """A desk that computes embeddings: `embed` does it, and is told of the desk. What it replied is in `replies`."""

    def __init__(self, embed: Callable[["Desk"], Any]) -> None:
        self.computed: list[Any] = []
        self.flags: list[bool] = []
        self.forgot: list[int] = []
        self.replies: list[dict[str, Any]] = []
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def compute(tokens: Any) -> Any:
            self.computed.append(tokens)
            return embed(self)

        beating = SimpleNamespace(
            alive_for=lambda _seconds: contextlib.nullcontext(), send=self.replies.append, live=lambda: None
        )
        loop = SimpleNamespace(embed=compute, cancel=lambda _number: None)
        preparer = SimpleNamespace(embeddable=lambda text, _tokens: [len(text)])
        model = SimpleNamespace(pooled=True, abort=self.flags.append, forget=self.forgot.append)
        self._desk = _Desk(beating, loop, preparer, model, self.inbox)  # type: ignore[arg-type]

    def say(self, kind: str, number: int, **more: Any) -> None:
        self._desk._receive({"t": kind, "id": number, **more})

    def prepare(self) -> None:
        self._desk._orders.put(None)
        self._desk.prepare()

    def compute(self) -> None:
        while not self.inbox.empty():
            if (work := self.inbox.get()) is not None:
                work()

    @property
    def held(self) -> int:
        return len(self._desk._asked._messages)


def direction(_desk: Desk) -> Any:
    return np.ones(1, np.float32)


@pytest.mark.parametrize("prepared_before", [False, True])
def test_an_embedding_that_nobody_waits_for_is_not_computed(prepared_before: bool) -> None:
    desk = Desk(direction)
    for number in (1, 2, 3):
        desk.say("embed", number, text="x" * number)
    if prepared_before:
        desk.prepare()
    desk.say("cancel", 2)
    assert desk.held == 2
    desk.prepare()
    desk.compute()
    assert desk.computed == [[1], [3]]
    assert [reply["id"] for reply in desk.replies] == [1, 3]
    assert desk.held == 0


def test_an_embedding_that_is_cancelled_meanwhile_is_aborted_and_the_next_is_not() -> None:
    def embed(desk: Desk) -> Any:
        if desk.computed[-1] == [1]:
            desk.say("cancel", 2)
            assert True not in desk.flags, "another's cancel ends nothing that is computed"
            desk.say("cancel", 1)
            assert desk.flags[-1]
            raise AbortedError
        assert not desk.flags[-1]
        return direction(desk)

    desk = Desk(embed)
    for number in (1, 2, 3):
        desk.say("embed", number, text="x" * number)
    desk.prepare()
    desk.compute()
    assert desk.computed == [[1], [3]]
    assert [reply["id"] for reply in desk.replies] == [3]
    assert (desk.flags[-1], desk.forgot) == (False, [0])
    desk.say("cancel", 3)
    assert not desk.flags[-1]


def test_an_embedding_without_a_direction_is_answered_and_a_failed_decode_is_not() -> None:
    def embed(desk: Desk) -> Any:
        raise NoDirectionError("none") if desk.computed[-1] == [1] else MalformedModel("cannot evaluate")

    desk = Desk(embed)
    desk.say("embed", 1, text="x")
    desk.say("embed", 2, text="xx")
    desk.prepare()
    with pytest.raises(MalformedModel, match="evaluate"):
        desk.compute()
    (reply,) = desk.replies
    assert reply == {"t": "reply", "id": 1, "error": ["model", "none", ""]}
    assert desk.forgot == [0]


def test_texts_that_nobody_waits_for_are_not_tokenized() -> None:
    desk = Desk(direction)
    desk.say("tokenize", 1, text="x", add_special=False, parse_special=False)
    desk.say("detokenize", 2, tokens=[1])
    desk.say("cancel", 1)
    desk.say("cancel", 2)
    desk.prepare()
    assert (desk.replies, desk.held) == ([], 0)
    assert desk.inbox.qsize() == 3  # two cancels and the end: this model can do neither, and was not asked
