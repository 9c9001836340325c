"""llama.cpp's own quantizer, in a process of its own: it has no way to be stopped, and a hostile file may crash it.

Run as `python -m cloister.models.quantizer SOURCE TARGET FILE_TYPE THREADS REQUANTIZE`, with the libraries' folder in
`LLAMA_CPP_LIB_PATH`; it writes `DONE ALL` and a newline for every tensor that it begins, and when all are done.
"""

import hashlib
import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gguf.constants import LlamaFileType

from cloister.errors import MalformedModel, WrongUse
from cloister.models.gguf import read_description
from cloister.models.lineage import Lineage, Quantized, digest_model, save_lineage, steps_of, trace

__all__ = ["TYPES", "main", "parse_type", "quantize", "quantize_traced"]

TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_1", "Q5_0", "Q4_K_M", "Q4_0")
"""The largest first."""

_TENSOR = re.compile(rb"\[ *(\d+)/ *(\d+)\]")
_REFUSED, _ORPHANED = 3, 4


def parse_type(text: str) -> str:
    """In any case: `q4_k_m`. Raises: WrongUse."""
    if text.upper() in TYPES:
        return text.upper()
    raise WrongUse("That is no type to quantize to.", expected=", ".join(TYPES), got=text[:40])


def quantize(
    source: Path,
    target: Path,
    type: str,  # noqa: A002 (the format's word)
    *,
    library: Path,
    threads: int,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    requantize: bool = False,
) -> None:
    """Write `source`'s model to `target` with its matrices as `type`, one of `TYPES`.

    `library`: the folder that holds libllama (`cloister.enclave.llm.llama.library.library_dir()`). `progress` is called
    with (tensors done, tensors in all). `target` is replaced, and only when the new file is whole: whatever ends this
    early leaves nothing behind. `requantize`: from a model that is quantized already, which is worse than from the full
    one.

    Raises: WrongUse (no such type or file, quantized already, no room), MalformedModel (llama.cpp refuses the source,
    or died of it).
    """
    type = parse_type(type)  # noqa: A001
    if read_description(source).quantized and not requantize:
        raise WrongUse(
            f"{source.name} is quantized already: what was rounded twice answers worse.",
            hint="Quantize from an F16 or F32 file, or say --requantize.",
        )
    draft = _open_draft(target)
    try:
        _run([source, draft, LlamaFileType[f"MOSTLY_{type}"].value, threads, int(requantize)], library, progress)
        draft.chmod(0o644)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def quantize_traced(
    source: Path,
    target: Path,
    type: str,  # noqa: A002
    *,
    library: Path,
    engine_sha256: str,
    threads: int,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    requantize: bool = False,
) -> Lineage:
    """`quantize`, and the record of it beside `target`: the source's own steps and this one. `engine_sha256` (hex): of
    the library's files, as the statement has it. Raises as `quantize` does, and MalformedModel when the source changed
    meanwhile."""
    before = _state(source)
    steps = steps_of(source, before[0])
    quantize(source, target, type, library=library, threads=threads, progress=progress, requantize=requantize)
    try:
        if _state(source) != before:
            raise MalformedModel(f"{source.name} changed while it was quantized.", hint="Try again.", step="quantize")
        digests = digest_model(target)
        version = f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}"
        step = Quantized("llama.cpp", version, engine_sha256, parse_type(type), requantize, digests.sha256)
        lineage = trace(digests, *steps, step)
        save_lineage(target, lineage)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return lineage


def _state(path: Path) -> tuple[str, int]:
    """Digest, and the time of the last change."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_mtime_ns


def _open_draft(target: Path) -> Path:
    try:
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    except OSError as error:
        raise WrongUse(f"{target} cannot be written: {error.strerror or error}.") from error
    os.close(descriptor)
    return Path(name)


def _run(words: list[Path | int], library: Path, progress: Callable[[int, int], None]) -> None:
    """One child from beginning to end; it does not outlive this call."""
    # In a group of its own: a Ctrl+C is for us, who then end the child; it could tell nobody what it leaves behind.
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, *map(str, words)],
        env={**os.environ, "LLAMA_CPP_LIB_PATH": str(library), "GGML_NO_BACKTRACE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )
    try:
        for line in child.stdout or ():
            done, total = map(int, line.split())
            progress(done, total)
        code = child.wait()
    finally:
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()
    if code == _REFUSED:
        raise MalformedModel(
            "llama.cpp does not quantize this model.",
            hint="Is its architecture known, and is there room on the disk?",
            step="quantize",
        )
    if code != 0:
        raise MalformedModel(
            "llama.cpp's quantizer died of this model.", hint="The file may be damaged.", got=f"status {code}"
        )


def main() -> None:
    """The child: status 0, or 3 when llama.cpp refuses. When nobody listens any more, it removes what it wrote and
    ends."""
    source, target, file_type, threads, requantize = sys.argv[1:6]
    bindings: Any = importlib.import_module("llama_cpp.llama_cpp")
    total = 0

    def tell(done: int) -> None:
        try:
            os.write(1, b"%d %d\n" % (done, total))
        except OSError:
            Path(target).unlink(missing_ok=True)
            os._exit(_ORPHANED)

    def log(_level: int, text: bytes, _data: object) -> None:
        nonlocal total
        if found := _TENSOR.match(text):
            total = int(found[2])
            tell(int(found[1]) - 1)

    callback = bindings.llama_log_callback(log)
    bindings.llama_log_set(callback, None)
    bindings.llama_backend_init()
    options = bindings.llama_model_quantize_default_params()
    options.ftype = int(file_type)
    options.nthread = int(threads)
    options.allow_requantize = requantize == "1"
    refused = bindings.llama_model_quantize(os.fsencode(source), os.fsencode(target), options)
    if refused:
        os._exit(_REFUSED)
    if total:
        tell(total)
    os._exit(0)


if __name__ == "__main__":
    main()
