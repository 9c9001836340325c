"""Where llama.cpp's libraries lie, what their digest is, and how they get into the process."""

import hashlib
import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from cloister.errors import WrongUse
from cloister.evidence.manifest import manifest_digest

__all__ = ["library_digest", "library_dir", "load_library"]

_HINT = "Run `make setup`, or `python tools/build_engine.py`, with this environment's python."


def library_dir() -> Path:
    """The folder that holds libllama: `CLOISTER_ENGINE_DIR` when set, else the one installed beside the bindings.

    Raises: WrongUse when the engine is not built.
    """
    named = os.environ.get("CLOISTER_ENGINE_DIR", "")
    if named:
        folder = Path(named)
    else:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            raise WrongUse("The engine is not installed.", hint=_HINT)
        folder = Path(spec.origin).parent / "lib"
    if not (folder / "libllama.so").is_file():
        raise WrongUse("The engine's libraries are missing.", hint=_HINT, expected=str(folder / "libllama.so"))
    return folder


def library_digest(folder: Path) -> str:
    """SHA-256 (hex) of the manifest (`sha256sum` lines) of every library in `folder`, as the hardware measures it."""
    files = {path.name: path for path in (link.resolve() for link in folder.glob("lib*.so*")) if path.is_file()}
    return manifest_digest({name: _sha256(path) for name, path in files.items()}).hex()


def _sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def load_library() -> Any:
    """The ctypes module `llama_cpp.llama_cpp`, its libraries loaded from `library_dir()`, its log silenced.

    llama.cpp's log may quote what it works on, so nothing of it is kept. Raises: WrongUse when it does not load.
    """
    folder = library_dir()
    os.environ["LLAMA_CPP_LIB_PATH"] = str(folder)
    os.environ["GGML_NO_BACKTRACE"] = "1"  # or llama.cpp would start a debugger when it fails
    try:
        bindings: Any = importlib.import_module("llama_cpp.llama_cpp")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise WrongUse("The engine's libraries do not load.", hint=_HINT, got=type(error).__name__) from error
    bindings.llama_log_set(_SILENCE.get(bindings), None)
    bindings.llama_backend_init()
    return bindings


class _Silence:
    """The C library keeps a pointer to its log callback: the object behind it must live as long as the process."""

    def __init__(self) -> None:
        self._callback: Any = None

    def get(self, bindings: Any) -> Any:
        if self._callback is None:
            self._callback = bindings.llama_log_callback(lambda _level, _text, _data: None)
        return self._callback


_SILENCE = _Silence()
