import asyncio

import pytest

from cloister.enclave.llm.envelope import Refused
from cloister.enclave.llm.queue import Queue, Ticket
from cloister.errors import QueueFull

pytestmark = pytest.mark.anyio


def queue(slots: int = 1, max_waiting: int = 8) -> Queue:
    made = Queue(max_waiting)
    made.slots = slots
    return made


async def order(line: Queue, tickets: list[Ticket]) -> list[str]:
    """Who runs, one after the other."""
    ran: list[str] = []

    async def run(ticket: Ticket) -> None:
        await ticket.wait(None)
        ran.append(ticket.principal)
        await asyncio.sleep(0)
        ticket.release()

    await asyncio.gather(*map(run, tickets))
    assert (line.running, line.waiting) == (0, 0)
    return ran


async def ends(tickets: list[Ticket]) -> list[str]:
    """What becomes of each."""
    found: list[str] = []
    for ticket in tickets:
        try:
            await ticket.wait(0)
            found.append("runs")
        except QueueFull:
            found.append("gave way")
        except Refused:
            found.append("waits")
    return found


async def test_at_most_slots_run() -> None:
    line = queue(slots=2)
    tickets = line.admit("ann", 3)
    await tickets[0].wait(None)
    await tickets[1].wait(None)
    assert (line.running, line.waiting) == (2, 1)
    tickets[1].release()
    await tickets[2].wait(None)
    assert (line.running, line.waiting) == (2, 0)


async def test_principals_take_turns() -> None:
    line = queue()
    tickets = line.admit("ann", 4) + line.admit("bob", 2) + line.admit("cid", 1)
    assert await order(line, tickets) == ["ann", "ann", "bob", "cid", "ann", "bob", "ann"]


async def test_one_principal_is_served_in_order() -> None:
    line = queue()
    first, second, third = line.admit("ann", 3)
    first.release()
    await second.wait(None)
    with pytest.raises(Refused):
        await third.wait(0)


async def test_a_full_queue_admits_all_or_none() -> None:
    line = queue(slots=2, max_waiting=1)
    with pytest.raises(QueueFull):
        line.admit("ann", 4)
    assert (line.running, line.waiting) == (0, 0)
    line.admit("ann", 3)
    with pytest.raises(QueueFull) as caught:
        line.admit("bob", 1)
    assert caught.value.retry_after == 1


async def test_a_full_line_makes_room_for_who_has_less_in_it() -> None:
    line = queue(max_waiting=4)
    anns = [line.admit("ann", 1)[0] for _ in range(5)]
    bobs = [line.admit("bob", 1)[0] for _ in range(2)]
    assert line.waiting == 4
    with pytest.raises(QueueFull) as caught:
        await anns[4].wait(1)
    assert caught.value.retry_after == 5
    for principal in ("ann", "bob"):
        with pytest.raises(QueueFull):
            line.admit(principal, 1)
    line.admit("cid", 1)
    assert line.waiting == 4
    assert await ends(anns) == ["runs", "waits", "gave way", "gave way", "gave way"]
    assert await ends(bobs) == ["waits", "waits"], "of two that have as many, one gives way"


async def test_a_request_gives_way_whole_or_not_at_all() -> None:
    line = queue(slots=2, max_waiting=6)
    first, late = line.admit("ann", 4), line.admit("ann", 3)
    with pytest.raises(QueueFull):
        line.admit("bob", 5)
    assert line.waiting == 5
    line.admit("bob", 2)
    assert await ends(first + late) == ["runs", "runs", "waits", "waits", "gave way", "gave way", "gave way"]


async def test_a_request_that_began_is_not_cut_though_it_waits_for_its_next_slot() -> None:
    line = queue(max_waiting=5)
    anns, bobs = line.admit("ann", 5), line.admit("bob", 1)
    anns[0].release()
    anns[1].release()
    cids = line.admit("cid", 2)
    line.admit("dan", 1)
    assert await ends(bobs + anns[2:] + cids) == ["runs", "waits", "waits", "waits", "gave way", "gave way"]


async def test_one_that_nobody_waits_for_gives_way_quietly() -> None:
    line = queue(max_waiting=3)
    _, _, unheard, gone = (line.admit("ann", 1)[0] for _ in range(4))
    leaver = asyncio.create_task(gone.wait(None))
    await asyncio.sleep(0)
    leaver.cancel()
    await asyncio.gather(leaver, return_exceptions=True)
    line.admit("bob", 1)
    line.admit("cid", 1)
    for ticket in (gone, unheard):
        ticket.release()
        ticket.release()
    assert (line.running, line.waiting) == (1, 3)


async def test_a_free_slot_goes_to_who_has_fewest() -> None:
    line = queue(slots=3, max_waiting=64)
    anns, bobs = line.admit("ann", 9), line.admit("bob", 2)
    anns[0].release()
    await bobs[0].wait(0)
    anns[1].release()
    await anns[3].wait(0)
    bobs[0].release()
    await bobs[1].wait(0)
    with pytest.raises(Refused):
        await anns[4].wait(0)


async def test_waiting_ends_with_a_typed_error_and_leaves_the_line() -> None:
    line = queue()
    running, waiting = line.admit("ann", 2)
    with pytest.raises(Refused) as caught:
        await waiting.wait(0.001)
    assert (caught.value.status, caught.value.code) == (503, "queue_timeout")
    waiting.release()
    assert (line.running, line.waiting) == (1, 0)
    running.release()
    assert line.running == 0


async def test_a_ticket_abandoned_in_the_line_gets_no_slot() -> None:
    line = queue()
    running, abandoned, patient = line.admit("ann", 3)
    leaver = asyncio.create_task(abandoned.wait(None))
    await asyncio.sleep(0)
    leaver.cancel()
    await asyncio.gather(leaver, return_exceptions=True)
    running.release()
    await patient.wait(None)
    assert line.running == 1
    abandoned.release()
    patient.release()
    assert (line.running, line.waiting) == (0, 0)


async def test_release_twice_is_harmless() -> None:
    line = queue()
    first, second = line.admit("ann", 2)
    first.release()
    first.release()
    await second.wait(None)
    assert line.running == 1
