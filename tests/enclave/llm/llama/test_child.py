import mmap
import socket
import threading

from cloister.enclave.llm.llama import LoopSettings, wire
from cloister.enclave.llm.llama.child import BEAT_SIZE, Service


def test_messages_of_two_threads_never_mix() -> None:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    service = Service(ours, -1, mmap.mmap(-1, BEAT_SIZE), LoopSettings())
    said = [{"t": "reply", "value": letter * 200_000} for letter in "ab"]
    threads = [threading.Thread(target=lambda m=m: [service.send(m) for _ in range(20)]) for m in said]  # type: ignore[misc]
    reader = wire.FrameReader(wire.MAX_EVENT)
    heard = []
    with ours, theirs:
        for thread in threads:
            thread.start()
        while len(heard) < 40:
            heard += reader.feed(theirs.recv(1 << 16))
        for thread in threads:
            thread.join()
    assert sorted(message["value"][0] for message in heard) == ["a"] * 20 + ["b"] * 20
    assert all(message in said for message in heard)
