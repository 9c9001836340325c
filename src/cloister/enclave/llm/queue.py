"""Who runs and who waits: at most `slots` run, a bounded number wait, and principals take turns."""

import asyncio
from collections import deque

from cloister.enclave.llm.envelope import Refused, retry_after
from cloister.errors import QueueFull

__all__ = ["Queue", "Ticket"]


class Ticket:
    """A place in the queue for one answer. `release` gives it, or the slot it was granted, back; twice is harmless."""

    __slots__ = ("_granted", "_queue", "principal")

    def __init__(self, queue: "Queue", principal: str) -> None:
        self._queue = queue
        self._granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.principal = principal

    @property
    def abandoned(self) -> bool:
        """Whoever waited was cancelled, and has not got round to `release` yet."""
        return self._granted.cancelled()

    def grant(self) -> None:
        self._granted.set_result(None)

    async def wait(self, limit: float | None) -> None:
        """Until a slot is free, for at most `limit` seconds (None: no limit).

        Raises:
            Refused: 503 `queue_timeout`.
        """
        if self._granted.done():
            return
        try:
            async with asyncio.timeout(limit):
                await self._granted
        except TimeoutError:
            message = "The request waited too long for its turn."
            raise Refused(503, "queue_timeout", message, headers=retry_after(self._queue.retry_after)) from None

    def release(self) -> None:
        self._queue.leave(self)


class Queue:
    """Round-robin between principals, first come first served within one.

    `slots` is set from the engine before each admission: it is known only once a model is loaded.
    """

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self.slots = 1
        self._running: set[Ticket] = set()
        self._lines: dict[str, deque[Ticket]] = {}  # principals in the order of their turns

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return sum(map(len, self._lines.values()))

    @property
    def retry_after(self) -> int:
        """Whole seconds: one per round of slots that is ahead."""
        return 1 + self.waiting // self.slots

    def admit(self, principal: str, count: int) -> list[Ticket]:
        """`count` places at once, or none.

        Raises:
            QueueFull: they would have to wait, and too many do already.
        """
        free = max(0, self.slots - self.running)
        if self.waiting + count - free > self.max_waiting:
            raise QueueFull("Too many requests are waiting.", retry_after=self.retry_after)
        tickets = [Ticket(self, principal) for _ in range(count)]
        self._lines.setdefault(principal, deque()).extend(tickets)
        self._grant()
        return tickets

    def leave(self, ticket: Ticket) -> None:
        if ticket in self._running:
            self._running.remove(ticket)
            self._grant()
            return
        line = self._lines.get(ticket.principal)
        if line is not None and ticket in line:
            line.remove(ticket)
            if not line:
                del self._lines[ticket.principal]

    def _grant(self) -> None:
        while self._lines and self.running < self.slots:
            principal, line = next(iter(self._lines.items()))
            ticket = line.popleft()
            del self._lines[principal]  # to the back of the turns, or gone
            if line:
                self._lines[principal] = line
            if not ticket.abandoned:
                self._running.add(ticket)
                ticket.grant()
