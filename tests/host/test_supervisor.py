import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.host.stage import CONFIG, FakeBackend, eventually, launch_of

from cloister.errors import ConnectionFailed, WrongUse
from cloister.host.backend import RunningEnclave, Spawn
from cloister.host.supervisor import Backoff, Supervisor

SPAWN = Spawn(
    name="one", launch=launch_of(), config=CONFIG, bundle=None, model="tiny", memory_bytes=1 << 30, cores=(0,)
)


@dataclass
class Watched:
    """A supervisor whose pauses are counted, and passed when the test says so."""

    backend: FakeBackend
    pauses: list[float] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)
    told: list[tuple[str, str]] = field(default_factory=list)
    now: float = 0.0
    go_on: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def make(self, **more: Any) -> Supervisor:
        return Supervisor(
            self.backend,
            lambda: SPAWN,
            attach=self.attach,
            log=lambda kind, text: self.told.append((kind, text)),
            backoff=Backoff(first=1.0, most=8.0, steady=100.0),
            clock=lambda: self.now,
            pause=self.pause,
            **more,
        )

    def attach(self, running: RunningEnclave | None) -> None:
        self.ports.append(running.port if running else 0)

    def pause(self, stopping: threading.Event, seconds: float) -> bool:
        self.pauses.append(seconds)
        while not self.go_on.acquire(timeout=0.01):
            if stopping.is_set():
                return True
        return stopping.is_set()


@pytest.fixture
def watched(backend: FakeBackend) -> Watched:
    return Watched(backend)


@pytest.fixture
def supervisor(watched: Watched) -> Iterator[Supervisor]:
    one = watched.make()
    one.start()
    yield one
    one.stop()


def state(supervisor: Supervisor, wanted: str) -> None:
    eventually(lambda: supervisor.status.state == wanted)


def starts(backend: FakeBackend, count: int) -> None:
    eventually(lambda: len(backend.started) == count)


def pauses(watched: Watched, count: int) -> None:
    eventually(lambda: len(watched.pauses) == count)


def test_the_state_is_what_the_enclave_says(backend: FakeBackend, supervisor: Supervisor, watched: Watched) -> None:
    backend.script = lambda _: []
    eventually(lambda: backend.started)
    for said in ("waiting", "opening", "loading", "ready"):
        backend.last.say(event=said, progress=0.5)
        state(supervisor, said)
    assert watched.ports == [9]
    assert [kind for kind, _ in watched.told if kind != "ready"][:1] == ["starting"]


def test_an_enclave_that_dies_is_started_again_after_growing_pauses(
    backend: FakeBackend, supervisor: Supervisor, watched: Watched
) -> None:
    for number in range(1, 6):
        starts(backend, number)
        backend.last.die()
        pauses(watched, number)
        assert supervisor.status.state == "restarting"
        assert watched.ports[-1] == 0
        watched.go_on.release()
    assert watched.pauses == [1.0, 2.0, 4.0, 8.0, 8.0]
    assert supervisor.status.starts >= 5


def test_who_ran_for_long_begins_with_a_short_pause_again(
    backend: FakeBackend, supervisor: Supervisor, watched: Watched
) -> None:
    for number, lasted in enumerate((1.0, 1.0, 100.0, 1.0), 1):
        starts(backend, number)
        state(supervisor, "ready")
        watched.now += lasted
        backend.last.die()
        pauses(watched, number)
        watched.go_on.release()
    assert watched.pauses == [1.0, 2.0, 1.0, 2.0]


@pytest.mark.parametrize("error", ["WrongUse", "NotTrusted", "MalformedModel"])
def test_what_another_start_would_meet_again_is_final(backend: FakeBackend, watched: Watched, error: str) -> None:
    backend.script = lambda _: [{"event": "failed", "error": error, "message": "It is so.", "hint": "Do that."}]
    supervisor = watched.make()
    supervisor.start()
    state(supervisor, "failed")
    supervisor.stop()
    assert watched.pauses == []
    assert ("failed", "It is so. Do that.") in watched.told


def test_an_engine_that_dies_is_not_final(backend: FakeBackend, watched: Watched) -> None:
    backend.script = lambda _: [{"event": "failed", "error": "EngineDied", "message": "It died."}]
    supervisor = watched.make()
    supervisor.start()
    eventually(lambda: watched.pauses)
    backend.last.die()
    supervisor.stop()


def test_a_backend_that_cannot_start_is_asked_again_unless_it_is_final(backend: FakeBackend, watched: Watched) -> None:
    backend.error = ConnectionFailed("The hub is away.")
    supervisor = watched.make()
    supervisor.start()
    eventually(lambda: watched.pauses)
    backend.error = WrongUse("No such model.")
    watched.go_on.release()
    state(supervisor, "failed")
    assert supervisor.status.detail == "No such model."
    supervisor.stop()


def test_an_app_is_not_forgotten_when_its_start_goes_wrong_in_an_unforeseen_way(
    backend: FakeBackend, watched: Watched
) -> None:
    backend.error = SystemError("with a secret in it")
    supervisor = watched.make()
    supervisor.start()
    eventually(lambda: watched.pauses)
    assert supervisor.status.detail == "It could not be started: SystemError. Starting again in 1 s."
    backend.error = None
    watched.go_on.release()
    state(supervisor, "ready")
    supervisor.stop()


def test_after_its_time_it_is_not_started_again(backend: FakeBackend, watched: Watched) -> None:
    backend.script = lambda _: [{"event": "ready"}, {"event": "expired"}]
    supervisor = watched.make()
    supervisor.start()
    eventually(lambda: backend.started)
    backend.last.die()
    state(supervisor, "expired")
    supervisor.stop()
    assert len(backend.started) == 1


def test_never_again_is_never(backend: FakeBackend, watched: Watched) -> None:
    supervisor = watched.make(again=False)
    supervisor.start()
    state(supervisor, "ready")
    backend.last.die()
    state(supervisor, "failed")
    supervisor.stop()
    assert len(backend.started) == 1


def test_stopping_ends_the_enclave_and_waits_for_it(backend: FakeBackend, watched: Watched) -> None:
    supervisor = watched.make()
    supervisor.start()
    state(supervisor, "ready")
    supervisor.stop()
    assert backend.last.stopped.is_set()
    assert supervisor.status.state == "stopped"
    assert watched.ports == [9, 0]
    supervisor.stop()


def test_stopping_does_not_wait_for_a_start_that_takes_long_nor_does_its_end_touch_the_next_ones_port(
    backend: FakeBackend, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model is being fetched, say."""
    monkeypatch.setattr("cloister.host.supervisor._LONGEST_START", 0.01)
    fetched = threading.Event()
    start = backend.start

    def slow(spawn: Spawn) -> Any:
        fetched.wait(60)
        return start(spawn)

    monkeypatch.setattr(backend, "start", slow)
    supervisor = watched.make()
    supervisor.start()
    eventually(lambda: supervisor.status.state == "starting")
    supervisor.stop()
    told = list(watched.told)
    assert told[-1] == ("stopped", "")
    fetched.set()
    eventually(lambda: backend.started and backend.last.stopped.is_set())
    supervisor._thread.join()
    assert watched.ports == []
    assert watched.told == told  # its successor has the log by now


def test_an_app_is_not_forgotten_when_following_it_goes_wrong(backend: FakeBackend, watched: Watched) -> None:
    backend.script = lambda _: [{"event": "failed", "error": ["no word"]}]
    supervisor = watched.make()
    supervisor.start()
    eventually(lambda: len(watched.pauses) == 1)
    assert backend.last.stopped.is_set()
    assert "could not be followed: TypeError" in repr(watched.told)
    supervisor.stop()


@pytest.mark.parametrize("words", [False, True])
def test_the_apps_own_words_are_kept_only_where_it_published_them(
    backend: FakeBackend, watched: Watched, words: bool
) -> None:
    backend.script = lambda _: [{"event": "log", "text": "line\x1b[2J one\nmore"}, {"event": "ready"}]
    supervisor = watched.make(words=words)
    supervisor.start()
    state(supervisor, "ready")
    supervisor.stop()
    assert [text for kind, text in watched.told if kind == "app"] == (["line [2J one more"] if words else [])


def test_of_an_enclaves_description_only_short_words_and_numbers_are_kept(
    backend: FakeBackend, watched: Watched
) -> None:
    said = {"event": "ready", "model": "tiny\n" + "x" * 500, "slots": 4, "content": ["a prompt"], "deep": {"a": "b"}}
    backend.script = lambda _: [said, {"event": "unknown", "text": "words"}]
    supervisor = watched.make()
    supervisor.start()
    state(supervisor, "ready")
    kept = supervisor.status.ready
    supervisor.stop()
    assert kept == {"model": "tiny " + "x" * 95, "slots": 4}
    assert "words" not in repr(watched.told)


def test_one_that_takes_too_much_is_ended_with_its_reason(
    backend: FakeBackend, supervisor: Supervisor, watched: Watched
) -> None:
    state(supervisor, "ready")
    supervisor.end("It took too much.")
    eventually(lambda: watched.pauses)
    assert supervisor.status.detail.startswith("It took too much.")
    assert backend.started[0].stopped.is_set()


def test_pauses_do_not_overflow() -> None:
    assert Backoff().pause(10_000) == 60.0


def test_a_spawn_is_made_anew_for_each_start(backend: FakeBackend, watched: Watched, tmp_path: Path) -> None:
    made: list[Spawn] = []

    def spawn() -> Spawn:
        made.append(SPAWN)
        return SPAWN

    supervisor = Supervisor(
        backend,
        spawn,
        attach=watched.attach,
        log=lambda kind, text: None,
        clock=lambda: 0.0,
        pause=watched.pause,
    )
    supervisor.start()
    eventually(lambda: len(backend.started) == 1)
    backend.last.die()
    watched.go_on.release()
    eventually(lambda: len(made) == 2)
    supervisor.stop()
