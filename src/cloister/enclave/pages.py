"""A process's own memory in huge pages.

An engine reads all of its weights for each token. That drives whatever else the machine runs out of its caches, and with it
the page tables: to find a page again then takes a virtual machine microseconds. What is asked only now and then, such as
an enclave's front, has thousands of pages to find again for each request, unless they are few and huge.
"""

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["collapse"]

_HUGE = 2 << 20  # bytes
_MOST = 256 << 20  # bytes of one mapping: longer ones are weights and the like, which know best themselves
_MAPS = Path("/proc/self/maps")
_MADV_COLLAPSE = 25  # asm-generic/mman-common.h; since Linux 6.1


def collapse() -> int:
    """Gathers what this process has allocated by now, and how many huge pages it became. Where the system has none, or does
    not tell a process of its memory, nothing changes and it is 0."""
    if sys.platform != "linux" or not _MAPS.exists():
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return sum(madvise(start, _HUGE, _MADV_COLLAPSE) == 0 for start in _places())


def _places() -> Iterator[int]:
    """Where a huge page would fit: addresses in private memory without a file."""
    for mapping in _MAPS.read_text().splitlines():
        addresses, access, _offset, _device, inode, *name = mapping.split()
        start, end = (int(address, 16) for address in addresses.split("-"))
        if access == "rw-p" and inode == "0" and name in ([], ["[heap]"]) and end - start <= _MOST:
            yield from range(start + -start % _HUGE, end - _HUGE + 1, _HUGE)
