import mmap
import socket
import threading
from typing import Any

from cloister.enclave.llm.llama import LoopSettings, wire
from cloister.enclave.llm.llama.child import BEAT_SIZE, Service


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
