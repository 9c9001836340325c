import os
import threading

from cloister.enclave.llm.llama.config import cores, physical_cores
from cloister.enclave.llm.llama.threads import attach_threads, fill_every_core, roaming


def test_counts_each_physical_core_once() -> None:
    assert set(cores()) <= os.sched_getaffinity(0)
    assert 1 <= physical_cores() <= len(cores())


def test_a_thread_of_a_pinned_one_may_run_anywhere() -> None:
    everywhere = os.sched_getaffinity(0)
    seen: list[set[int]] = []

    def pinned() -> None:
        os.sched_setaffinity(0, {min(everywhere)})
        for work in (
            lambda: seen.append(os.sched_getaffinity(0)),
            roaming(lambda: seen.append(os.sched_getaffinity(0))),
        ):
            child = threading.Thread(target=work)
            child.start()
            child.join()

    thread = threading.Thread(target=pinned)
    thread.start()
    thread.join()
    assert seen == [{min(everywhere)}, everywhere]


def test_says_when_nothing_is_left_for_others() -> None:
    cpus = len(os.sched_getaffinity(0))
    assert fill_every_core(cpus)
    assert not fill_every_core(cpus - 1)


def test_one_thread_needs_no_pool() -> None:
    before = os.sched_getaffinity(0)
    attach_threads(None, 1)()
    assert os.sched_getaffinity(0) == before
