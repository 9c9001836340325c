"""Who runs and who waits: at most `slots` run, a bounded number wait, and principals share both.

Nothing that runs is interrupted: where one principal has all slots, others wait until the first of its answers ends.
"""

import asyncio
from collections import Counter, deque

from cloister.enclave.llm.envelope import Refused, retry_after
from cloister.errors import QueueFull

__all__ = ["Queue", "Ticket"]


class _Request:
    """What the tickets of one admission have in common."""

    __slots__ = ("begun",)

    def __init__(self) -> None:
        self.begun = False


class Ticket:
    """A place in the queue for one answer. `release` gives it, or the slot it was granted, back; twice is harmless."""

    __slots__ = ("_granted", "_queue", "principal", "request")

    def __init__(self, queue: "Queue", principal: str, request: _Request) -> None:
        self._queue = queue
        self._granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.principal = principal
        self.request = request

    @property
    def abandoned(self) -> bool:
        """Whoever waited was cancelled, and has not got round to `release` yet."""
        return self._granted.cancelled()

    def grant(self) -> None:
        self.request.begun = True
        self._granted.set_result(None)

    def refuse(self, retry_after: int) -> None:
        if not self._granted.done():
            self._granted.set_exception(_full(retry_after))
            self._granted.exception()  # whether anybody still waits to hear it or not

    async def wait(self, limit: float | None) -> None:
        """Until a slot is free, for at most `limit` seconds (None: no limit).

        Raises:
            Refused: 503 `queue_timeout`.
            QueueFull: the place went to a principal who had fewer.
        """
        if self._granted.done():
            return self._granted.result()
        try:
            async with asyncio.timeout(limit):
                await self._granted
        except TimeoutError:
            message = "The request waited too long for its turn."
            raise Refused(503, "queue_timeout", message, headers=retry_after(self._queue.retry_after)) from None

    def release(self) -> None:
        self._queue.leave(self)


class Queue:
    """First come first served within one principal; a free slot goes to the one with fewest, and by turns.

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
        """`count` places at once, or none. Where the line is full, the newest requests in the longest part give way.

        Raises:
            QueueFull: they would have to wait, too many do already, and nobody has more in the line.
        """
        more = max(0, count - max(0, self.slots - self.running))
        own = len(self._lines.get(principal, ())) + more
        rounds = self.retry_after
        giving_way = self._giving_way(principal, own, self.waiting + more - self.max_waiting)
        if giving_way is None:
            raise _full(rounds)
        for ticket in giving_way:
            self.leave(ticket)
            ticket.refuse(rounds)
        request = _Request()
        tickets = [Ticket(self, principal, request) for _ in range(count)]
        self._lines.setdefault(principal, deque()).extend(tickets)
        self._grant()
        return tickets

    def _giving_way(self, principal: str, own: int, needed: int) -> list[Ticket] | None:
        """So many tickets at least, of others who have more than `own` waiting; None: there are not. What has begun stays."""
        lines = [
            [ticket for ticket in line if not ticket.request.begun]
            for other, line in self._lines.items()
            if other != principal
        ]
        found: list[Ticket] = []
        while len(found) < needed:
            longest = max(lines, key=len, default=[])
            if len(longest) <= own:
                return None
            request = longest[-1].request
            found += [ticket for ticket in longest if ticket.request is request]
            longest[:] = [ticket for ticket in longest if ticket.request is not request]
        return found

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
            running = Counter(ticket.principal for ticket in self._running)
            principal = min(self._lines, key=running.__getitem__)  # the first of those with fewest
            line = self._lines[principal]
            ticket = line.popleft()
            del self._lines[principal]  # to the back of the turns, or gone
            if line:
                self._lines[principal] = line
            if not ticket.abandoned:
                self._running.add(ticket)
                ticket.grant()


def _full(retry_after: int) -> QueueFull:
    return QueueFull("Too many requests are waiting.", retry_after=retry_after)
