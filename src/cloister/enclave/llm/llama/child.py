"""The engine's side of the socketpair: the main module of the child process, or the same in a thread.

Three threads: this one decodes; one reads the socket, so that a cancel is seen in the midst of a decode; one prepares
prompts (template, tokenizer), so that running answers go on meanwhile.
"""

import base64
import contextlib
import ctypes
import mmap
import os
import queue
import resource
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from cloister.enclave.llm.engine import Delta, Event, GenerateRequest, Started
from cloister.enclave.llm.llama import wire
from cloister.enclave.llm.llama.config import LoopSettings
from cloister.enclave.llm.llama.embedding import NoDirectionError
from cloister.enclave.llm.llama.library import load_library
from cloister.enclave.llm.llama.loop import DecodeLoop
from cloister.enclave.llm.llama.model import AbortedError, Model, SelfTestError
from cloister.enclave.llm.llama.prepare import Preparer
from cloister.enclave.llm.llama.threads import roaming
from cloister.enclave.llm.llama.vocabulary import longest_text
from cloister.errors import CloisterError, MalformedMessage, MalformedModel, WrongUse

__all__ = ["BEAT_SIZE", "Service", "main", "read_beat"]

BEAT_SIZE = mmap.PAGESIZE
_BEAT = struct.Struct("<Q")
_PROGRESS_STEP = 0.02
_REST_SECONDS = 0.5
"""Without work for so long, the cache is overwritten, unless conversations are kept in it;"""
_KEEP_SECONDS = 600.0
"""and they are, for so long after the last work of anybody."""
_LIVE_SECONDS = 1.0
_LONGEST_EMBEDDING = 600.0
"""Seconds for one text, all of which is computed in a single call."""
_FIRST_TOKEN_PAUSE = 0.002
"""Seconds in which the front can pass a first token on. Where our threads fill every core, it would get its turn only
after several milliseconds: it runs at lower priority."""
_NEXT_ARRIVAL = 0.005
"""Seconds after one of several prompts that come together until the next is there, as long as the front has a core: beside
our threads it would be ten times as much."""

_Work: TypeAlias = Callable[[], None] | None


def read_beat(beat: mmap.mmap) -> int:
    """How often the engine gave a sign of life."""
    return int(_BEAT.unpack_from(beat)[0])


@dataclass(slots=True)
class Service:
    """Serves one front until it hangs up. `run` returns then; it raises what the engine cannot live with."""

    connection: socket.socket
    model_fd: int
    beat: mmap.mmap
    settings: LoopSettings
    _sending: threading.Lock = field(default_factory=threading.Lock, init=False)

    def run(self) -> None:
        library = load_library()
        model = self._load(library)
        if model is None:
            return
        try:
            self._serve(library, model)
        finally:
            model.close()

    def _load(self, library: Any) -> Model | None:
        """The model, or None after telling the front why not. The file's memory is given back either way."""
        told = 0.0

        def progress(share: float) -> None:
            nonlocal told
            self.live()
            if share >= told + _PROGRESS_STEP:
                told = share
                self.send({"t": "progress", "share": round(min(max(share, 0.0), 1.0), 3)})

        path = Path(f"/proc/self/fd/{self.model_fd}")
        try:
            model = Model(library, path, self.settings, progress=progress)
        except MalformedModel as error:
            another = isinstance(error, SelfTestError)
            self.send({"t": "refused", "error": wire.encode_error(error), "another": another})
            return None
        finally:
            os.close(self.model_fd)
        self.send({"t": "ready", "model": wire.encode_model(model.describe())})
        return model

    def _serve(self, library: Any, model: Model) -> None:
        loop = DecodeLoop(library, model, slots=self.settings.slots)
        inbox: queue.SimpleQueue[_Work] = queue.SimpleQueue()
        desk = _Desk(self, loop, Preparer(model, longest=lambda: longest_text(library, model)), model, inbox)
        threads = [
            threading.Thread(target=roaming(desk.read), name="engine-read", daemon=True),
            threading.Thread(target=roaming(desk.prepare), name="engine-prepare", daemon=True),
        ]
        for thread in threads:
            thread.start()
        crowded, waiting = model.fills_every_core, set[int]()
        try:
            while self._take(inbox, loop):
                if loop.busy:
                    events = loop.step()
                    self.live()
                    if events:
                        self._tell(events)
                    if _first_token(events, waiting) and crowded:
                        time.sleep(_FIRST_TOKEN_PAUSE)
        except OSError:
            pass  # the front is gone
        finally:
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()

    def _tell(self, events: Sequence[tuple[int, Event | CloisterError]]) -> None:
        """In several messages where one would be too long; what is too long by itself ends its stream alone."""
        try:
            self.send({"t": "events", "e": [wire.encode_event(number, event) for number, event in events]})
        except WrongUse as error:
            if len(events) > 1:
                half = len(events) // 2
                self._tell(events[:half])
                self._tell(events[half:])
            else:
                self.send({"t": "events", "e": [wire.encode_event(events[0][0], error)]})

    def _take(self, inbox: "queue.SimpleQueue[_Work]", loop: DecodeLoop) -> bool:
        """Do what came in, waiting for something when there is nothing else to do, and for more while prompts come together.
        False: hang up."""
        since, clean = time.monotonic(), False
        while True:
            gathering = min(loop.gathering(), _NEXT_ARRIVAL)
            patience = gathering if loop.busy else None if clean else _REST_SECONDS
            try:
                work = inbox.get(block=gathering > 0 or not loop.busy, timeout=patience)
            except queue.Empty:
                if loop.busy:
                    return True
                forget = time.monotonic() - since >= _KEEP_SECONDS
                clean = loop.rest(forget=forget, stop=lambda: not inbox.empty())
                continue
            self.live()
            if work is None:
                return False
            work()
            since, clean = time.monotonic(), False

    def live(self) -> None:
        """A sign of life, from either thread that works. Two at the same moment may count as one."""
        _BEAT.pack_into(self.beat, 0, read_beat(self.beat) + 1)

    @contextlib.contextmanager
    def alive_for(self, seconds: float, *, every: float = _LIVE_SECONDS) -> Iterator[None]:
        """Signs of life while one long call of llama.cpp runs that cannot give any; for so long, and then it hangs."""
        over = threading.Event()

        def beat() -> None:
            until = time.monotonic() + seconds
            while not over.wait(every) and time.monotonic() < until:
                self.live()

        thread = threading.Thread(target=roaming(beat), name="engine-beat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def send(self, message: dict[str, Any]) -> None:
        """From any thread: a long message is written in pieces, and nobody else's may come between them.

        Raises: WrongUse when it is longer than the front would take; OSError when the front is gone.
        """
        data = wire.frame(message)
        if len(data) > wire.MAX_EVENT:
            raise WrongUse("The answer would be too long.", expected=f"{wire.MAX_EVENT} bytes", got=str(len(data)))
        with self._sending:
            self.connection.sendall(data)


def _first_token(events: Sequence[tuple[int, Event | CloisterError]], waiting: set[int]) -> bool:
    """Whether some stream's first token is among these events. `waiting`: the streams that have none yet."""
    found = False
    for number, event in events:
        if isinstance(event, Started):
            waiting.add(number)
        elif number in waiting:
            waiting.remove(number)
            found = found or isinstance(event, Delta)
    return found


class _Asked:
    """Questions that somebody waits for the answer of. Any thread."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._messages: dict[int, dict[str, Any]] = {}
        self._computed: int | None = None

    def expect(self, number: int, message: dict[str, Any]) -> None:
        with self._lock:
            self._messages[number] = message

    def message(self, number: int) -> dict[str, Any] | None:
        """None: nobody waits any more."""
        with self._lock:
            return self._messages.get(number)

    def close(self, number: int) -> None:
        with self._lock:
            self._messages.pop(number, None)

    def cancel(self, number: int) -> None:
        """Forget a question. What is computed for it right now is aborted."""
        with self._lock:
            self._messages.pop(number, None)
            if number == self._computed:
                self._model.abort(True)  # noqa: FBT003

    @contextlib.contextmanager
    def computing(self, number: int) -> Iterator[bool]:
        """For the thread that decodes: inside, what it does belongs to this question alone. False: nobody waits."""
        with self._lock:
            waits = number in self._messages
            self._computed = number if waits else None
        try:
            yield waits
        finally:
            with self._lock:
                self._computed = None
                self._model.abort(False)  # noqa: FBT003


class _Desk:
    """What the reading and the preparing thread do. Everything that touches the model's context goes to `inbox`."""

    def __init__(
        self, service: Service, loop: DecodeLoop, preparer: Preparer, model: Model, inbox: "queue.SimpleQueue[_Work]"
    ) -> None:
        self._service = service
        self._loop = loop
        self._preparer = preparer
        self._model = model
        self._inbox = inbox
        self._asked = _Asked(model)
        self._orders: queue.SimpleQueue[_Work] = queue.SimpleQueue()

    def read(self) -> None:
        """Until the front hangs up, or says what no front of ours would."""
        reader = wire.FrameReader(wire.MAX_REQUEST)
        try:
            while data := self._service.connection.recv(1 << 16):
                for message in reader.feed(data):
                    self._receive(message)
        except (OSError, MalformedMessage, KeyError, TypeError, ValueError):
            pass  # either way the conversation is over; why is not for a log that might quote it
        finally:
            self._orders.put(None)
            self._inbox.put(None)

    def _receive(self, message: dict[str, Any]) -> None:
        kind, number = message["t"], int(message["id"])
        if kind == "generate":
            self._loop.expect(number)
            request = wire.decode_request(message)
            self._orders.put(lambda: self._prepare(number, request))
        elif kind == "cancel":
            self._loop.cancel(number)
            self._asked.cancel(number)
            self._inbox.put(lambda: None)
        elif kind == "stats":
            self._inbox.put(lambda: self._service.send({"t": "reply", "id": number, "value": asdict(self._loop.stats)}))
        else:
            self._asked.expect(number, message)
            self._orders.put(lambda: self._answer(number))

    def prepare(self) -> None:
        """Until the front hangs up, or an order fails as none should: then this engine ends, rather than go on deaf."""
        try:
            while (order := self._orders.get()) is not None:
                order()
                self._service.live()  # many prompts in line keep the decoding thread waiting, and are no hang
        except Exception:  # noqa: BLE001, S110 - the edge of the thread; the traceback could quote a prompt
            pass
        finally:
            self._inbox.put(None)

    def _prepare(self, number: int, request: GenerateRequest) -> None:
        if self._loop.forgotten(number):
            return
        try:
            job = self._preparer.prepare(number, request)
        except CloisterError as error:
            refusal = error
            self._inbox.put(lambda: self._loop.reject(number, refusal))
        else:
            self._inbox.put(lambda: self._loop.submit(job))
            self._loop.regroup(number)

    def _answer(self, number: int) -> None:
        message = self._asked.message(number)
        if message is None:
            return
        value: Any
        try:
            if message["t"] == "embed":
                tokens = self._embeddable(message)
                self._inbox.put(lambda: self._give_embedding(number, tokens))
                return
            if message["t"] == "tokenize":
                special, parse = bool(message["add_special"]), bool(message["parse_special"])
                value = self._model.tokenize(message["text"], add_special=special, parse_special=parse)
            else:
                self._model.check_tokens(message["tokens"])
                value = b"".join(self._model.piece(t, special=True) for t in message["tokens"]).hex()
            self._reply(number, "value", value)
        except WrongUse as error:
            self._reply(number, "error", wire.encode_error(error))

    def _embeddable(self, message: dict[str, Any]) -> list[int]:
        if not self._model.pooled:
            raise WrongUse("This model gives no embeddings.")
        return self._preparer.embeddable(message.get("text"), message.get("tokens"))

    def _give_embedding(self, number: int, tokens: Sequence[int]) -> None:
        with self._asked.computing(number) as waited:
            if not waited:
                return
            try:
                with self._service.alive_for(_LONGEST_EMBEDDING):
                    vector = self._loop.embed(tokens)
            except AbortedError:
                self._model.forget(0)
                return
            except NoDirectionError as error:
                self._model.forget(0)
                self._reply(number, "error", wire.encode_error(error))
                return
        packed = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        self._reply(number, "value", {"vector": packed, "tokens": len(tokens)})

    def _reply(self, number: int, kind: str, content: Any) -> None:
        self._asked.close(number)
        with contextlib.suppress(OSError):
            self._service.send({"t": "reply", "id": number, kind: content})


def _lock_down(parent: int) -> None:
    """No core dumps, no debugger, and no life after the parent. Linux only, as the engine is."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    pr_set_pdeathsig, pr_set_dumpable = 1, 4
    libc.prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    libc.prctl(pr_set_dumpable, 0, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def main() -> None:
    """Arguments: socket fd, model fd, heartbeat fd, parent's pid, and the loop's settings as name=value."""
    numbers, settings = [int(word) for word in sys.argv[1:5]], sys.argv[5:]
    _lock_down(numbers[3])
    sys.setswitchinterval(0.0005)  # the decoding thread gets the interpreter back quickly from the others
    fields: dict[str, Any] = dict(word.split("=", 1) for word in settings)
    loop_settings = LoopSettings.decode({k: v if k in ("kv_type", "variant") else int(v) for k, v in fields.items()})
    connection = socket.socket(fileno=numbers[0])
    try:
        Service(connection, numbers[1], mmap.mmap(numbers[2], BEAT_SIZE), loop_settings).run()
    except Exception as error:  # noqa: BLE001 - the edge of the process; the traceback could quote a prompt
        os.write(2, f"engine: {type(error).__name__}\n".encode())
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
