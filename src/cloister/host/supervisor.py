"""One app's life on the host: start, follow what the enclave says, start again after a pause, until told to stop.

A restarted enclave has lost its keys, as it must: one with sealed code stands in `waiting` until its owner releases them
anew. What cannot be mended by another start (a wrong bundle, a refused launch config) is `failed` and stays so.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cloister.errors import CloisterError, Malformed, NotTrusted, WrongUse
from cloister.host.backend import Event, HostBackend, RunningEnclave, Spawn
from cloister.host.store import State

__all__ = ["Backoff", "Status", "Supervisor"]

# `failed` events whose cause another start would meet again.
_FINAL = frozenset(
    {"WrongUse", "NotTrusted"}
    | {f"Malformed{what}" for what in ("", "App", "Evidence", "Image", "Message", "Model", "Policy")}
)
_LONGEST_START = 10.0
"""Seconds that `stop` waits for a start that is under way."""
_STATES: dict[str, State] = {
    "waiting": "waiting",
    "opening": "opening",
    "loading": "loading",
    "ready": "ready",
}


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pauses between starts, in seconds: doubled from `first` up to `most`; from the start again after `steady` seconds
    of running."""

    first: float = 1.0
    most: float = 60.0
    steady: float = 300.0

    def pause(self, failures: int) -> float:
        """After so many starts in a row that did not last (1 or more)."""
        return min(self.first * 2.0 ** min(failures - 1, 30), self.most)


@dataclass(frozen=True, slots=True)
class Status:
    """`since`: Unix seconds. `detail`: a line for people. `ready`: the enclave's own description, once it is ready."""

    state: State
    since: float
    detail: str = ""
    starts: int = 0
    ready: Event = field(default_factory=dict)


@dataclass(slots=True)
class _Outcome:
    """How one start ended."""

    final: bool = False
    expired: bool = False
    detail: str = ""


class Supervisor:
    """`spawn` is asked anew for every start. `attach` is told of the enclave that runs, None when none does. `log`
    is told (kind, text). `words`: whether the app's own words are kept."""

    def __init__(
        self,
        backend: HostBackend,
        spawn: Callable[[], Spawn],
        *,
        attach: Callable[[RunningEnclave | None], None],
        log: Callable[[str, str], None],
        words: bool = False,
        again: bool = True,
        backoff: Backoff | None = None,
        clock: Callable[[], float] = time.time,
        pause: Callable[[threading.Event, float], bool] = threading.Event.wait,
    ) -> None:
        """`again`: whether an enclave that ended is started again. `pause(stopping, seconds)`: whether stopping was set."""
        self._backend = backend
        self._spawn = spawn
        self._attach = attach
        self._log = log
        self._words = words
        self._again = again
        self._backoff = backoff or Backoff()
        self._clock = clock
        self._pause = pause
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._running: RunningEnclave | None = None
        self._reason = ""
        self._status = Status("starting", clock())
        self._thread = threading.Thread(target=self._live, name="app", daemon=True)

    @property
    def status(self) -> Status:
        return self._status

    @property
    def running(self) -> RunningEnclave | None:
        return self._running

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns when the enclave is gone. One whose start is under way still (a model is fetched, say) ends as soon as it
        has started. Idempotent."""
        self._stopping.set()
        with self._lock:
            running = self._running
        if running is not None:
            running.stop()
        if self._thread.is_alive():
            self._thread.join(None if running is not None else _LONGEST_START)
        if self._thread.is_alive():  # what it says later would stand among its successor's words
            self._say("stopped", "")

    def end(self, reason: str) -> None:
        """Ends the enclave that runs now, as if it had ended by itself (it took too much, say)."""
        with self._lock:
            running, self._reason = self._running, reason
        if running is not None:
            running.stop()

    def _live(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            began = self._clock()
            try:
                outcome = self._once()
            except Exception as error:  # noqa: BLE001 (a thread's edge: an app must not be forgotten)
                outcome = _Outcome(detail=f"It could not be followed: {type(error).__name__}.")
            if self._stopping.is_set():
                break
            if outcome.expired or outcome.final or not self._again:
                self._say("expired" if outcome.expired else "failed", outcome.detail)
                return
            failures = 1 if self._clock() - began >= self._backoff.steady else failures + 1
            seconds = self._backoff.pause(failures)
            self._say("restarting", f"{outcome.detail or 'It ended.'} Starting again in {seconds:.0f} s.")
            if self._pause(self._stopping, seconds):
                break
        self._say("stopped", "")

    def _once(self) -> _Outcome:
        self._say("starting", "", starts=self._status.starts + 1)
        try:
            running = self._backend.start(self._spawn())
        except CloisterError as error:
            return _Outcome(isinstance(error, WrongUse | NotTrusted | Malformed), detail=error.message)
        except OSError as error:
            return _Outcome(detail=error.strerror or type(error).__name__)
        except Exception as error:  # noqa: BLE001 (a thread's edge: an app must not be forgotten)
            return _Outcome(detail=f"It could not be started: {type(error).__name__}.")
        with self._lock:
            self._running, self._reason = running, ""
        try:
            if self._stopping.is_set():
                return _Outcome()
            self._attach(running)
            try:
                outcome = self._follow(running)
            finally:
                self._attach(None)
            return _Outcome(detail=self._reason) if self._reason else outcome
        finally:
            running.stop()
            with self._lock:
                self._running = None

    def _follow(self, running: RunningEnclave) -> _Outcome:
        """Until it ends, fails or its time is over."""
        for event in running.events():
            kind = str(event.get("event"))
            if kind == "failed":
                detail = " ".join(filter(None, (_text(event, "message"), _text(event, "hint"))))
                return _Outcome(event.get("error") in _FINAL, detail=detail)
            if kind == "expired":
                return _Outcome(expired=True, detail="Its time was over.")
            if kind == "log" and self._words:
                self._log("app", _text(event, "text"))
            elif kind in _STATES:
                self._say(_STATES[kind], _detail(kind, event), event)
        return _Outcome()

    def _say(self, state: State, detail: str, event: Event | None = None, *, starts: int | None = None) -> None:
        """The log is told of changes, not of every step of a progress."""
        ready = _described(event) if event is not None and state == "ready" else {}
        with self._lock:
            if state != self._status.state or starts is not None:
                self._log(state, "" if event is not None and state == "loading" else detail)
            self._status = Status(
                state, self._clock(), detail, self._status.starts if starts is None else starts, ready
            )


def _text(event: Event, name: str) -> str:
    """One line, without what a terminal would obey."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in str(event.get(name, ""))).split())


def _detail(kind: str, event: Event) -> str:
    if kind == "waiting":
        return "It waits for its owner's release of keys."
    if kind in ("loading", "opening"):
        share: Any = event.get("progress", 0.0)
        return f"{100 * share:.0f} %" if isinstance(share, int | float) else ""
    return ""


def _described(event: Event) -> Event:
    """Numbers and short words only, so that nobody's content can travel in it."""
    kept: Sequence[type] = (int, float, bool, str)
    return {
        name: value if not isinstance(value, str) else _text(event, name)[:100]
        for name, value in list(event.items())[:32]
        if name != "event" and isinstance(value, tuple(kept))
    }
