"""llama.cpp's worker threads: made once, and each kept on a core of its own.

Left to itself llama.cpp makes new threads for every decode, and its threads wait for each other by spinning. As soon as
anything else runs on the machine, however low its priority, the scheduler may put two of them on one core, where each
spins away the other's time: a token then takes twenty times as long (measured on two cores).
"""

import ctypes
import os
from collections.abc import Callable
from typing import Any

from cloister.enclave.llm.llama.config import cores
from cloister.enclave.llm.llama.library import library_dir

__all__ = ["attach_threads", "fill_every_core", "roaming"]

_MOST_CPUS = 512  # GGML_MAX_N_THREADS
_EVERYWHERE = frozenset(os.sched_getaffinity(0))  # as this process was given it
_POLL = 0  # of 100: sleep after each decode. To spin for its successor would take the front's turn, which has a token to pass on


class _Parameters(ctypes.Structure):
    """`struct ggml_threadpool_params` of ggml.h."""

    _fields_ = (
        ("cpumask", ctypes.c_bool * _MOST_CPUS),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    )


def fill_every_core(count: int) -> bool:
    """Whether so many threads leave no CPU of this process to anything else."""
    return count >= len(_EVERYWHERE)


def roaming(work: Callable[[], None]) -> Callable[[], None]:
    """`work` for a thread that may run anywhere: a thread is born on its maker's cores, and the decode loop has one."""

    def run() -> None:
        os.sched_setaffinity(0, _EVERYWHERE)
        work()

    return run


def attach_threads(context: Any, count: int) -> Callable[[], None]:
    """Give `context` its `count` threads; the calling thread becomes the first of them, on its core, at every decode.

    They are kept on cores only when there is exactly one for each: with fewer threads than cores, moving helps.
    Returns what ends the threads, to be called after the context is freed.
    """
    if count == 1:
        return lambda: None
    folder = library_dir()
    ggml, llama = ctypes.CDLL(str(folder / "libggml-cpu.so")), ctypes.CDLL(str(folder / "libllama.so"))
    parameters = _Parameters(n_threads=count, poll=_POLL)
    places = [cpu for cpu in cores() if cpu < _MOST_CPUS]
    if len(places) == count:
        parameters.strict_cpu = True
        for cpu in places:
            parameters.cpumask[cpu] = True
    ggml.ggml_threadpool_new.restype = ctypes.c_void_p
    pool = ctypes.c_void_p(ggml.ggml_threadpool_new(ctypes.byref(parameters)))
    if pool:
        llama.llama_attach_threadpool(ctypes.c_void_p(context), pool, None)
    return lambda: ggml.ggml_threadpool_free(pool) if pool else None
