"""How fast this machine reads memory, and what share of that a model's decoding reaches.

At batch 1 every token reads all of the weights that take part, and the cache of keys and values, once: no engine can be
faster than memory is. The reader is `tools/membw.c`, built with the engine.
"""

import ctypes
from pathlib import Path

from cloister.enclave.llm.llama.config import cores, physical_cores
from cloister.enclave.llm.llama.library import library_dir
from cloister.errors import WrongUse
from cloister.models.gguf import Description

__all__ = ["last_cache", "read_bandwidth", "weight_bytes_per_token"]

_READER = "membw.so"
_LEAST = 1 << 30
_REPEATS = 5
_LOOKED_UP = frozenset(
    {"token_embd.weight", "position_embd.weight", "token_types.weight", "per_layer_token_embd.weight"}
)
"""Tables of which a token reads one row."""


def read_bandwidth(*, size: int | None = None, threads: int | None = None) -> float:
    """Bytes per second that this machine reads from memory: the best of five, threads kept on cores or free, whichever is
    faster.

    `size` (bytes; absent: a gibibyte, or four times the last-level cache) is allocated, touched and freed; `threads`
    absent are the physical cores. Nothing else should run meanwhile. Raises: WrongUse (no reader here, no memory).
    """
    path = library_dir() / _READER
    try:
        reader = ctypes.CDLL(str(path)).membw_read
    except (OSError, AttributeError) as error:
        raise WrongUse(
            "The reader of memory is not built.", hint="Run `make setup`, or `python tools/build_engine.py`."
        ) from error
    reader.restype = ctypes.c_double
    reader.argtypes = (ctypes.c_size_t, ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.c_int)
    size = size or max(_LEAST, 4 * last_cache())
    threads = threads or physical_cores()
    places = cores()
    best: float = reader(size, threads, None, _REPEATS)
    if len(places) >= threads:
        best = max(best, reader(size, threads, (ctypes.c_int * threads)(*places[:threads]), _REPEATS))
    if best <= 0:
        raise WrongUse(f"There is no memory for reading {size >> 20} MiB.", hint="End what else runs here.")
    return best


def last_cache() -> int:
    """Bytes of the largest cache of the first processor; 0 where the system does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    found = [text for path in sizes if (text := path.read_text().strip()) and text[-1] in units]
    return max((int(text[:-1]) * units[text[-1]] for text in found), default=0)


def weight_bytes_per_token(model: Description) -> int:
    """Bytes of weights that one token reads: all tensors but the tables of which it reads one row.

    The token embedding is such a table, unless it is the output matrix, too. Of a mixture of experts all are counted.
    """
    names = {tensor.name for tensor in model.tensors}
    tables = _LOOKED_UP if "output.weight" in names else _LOOKED_UP - {"token_embd.weight"}
    return sum(tensor.size for tensor in model.tensors if tensor.name not in tables)
