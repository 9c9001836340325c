import importlib.util
from pathlib import Path

import pytest

from cloister.bench.roofline import read_bandwidth, weight_bytes_per_token
from cloister.enclave.llm.llama.library import library_digest, library_dir
from cloister.errors import WrongUse
from cloister.models.gguf import Description, Tensor

ROOT = Path(__file__).parents[2]


def model(*tensors: tuple[str, int]) -> Description:
    return Description(
        architecture="llama", name="", licence="", quantization="F16", chat_template=None, context=512, vocabulary=8,
        width=4, feed_forward=8, heads=1, kv_heads=(1,), key_length=4, value_length=4, file_size=1000,
        tensors=tuple(Tensor(name, (size,), "F16", 0, size) for name, size in tensors),
    )  # fmt: skip


def test_memory_is_read_at_a_rate_that_memory_has() -> None:
    """More than a tenth of the slowest machine's, less than any machine's: the unit is bytes, the time is seconds."""
    assert 1e8 < read_bandwidth(size=1 << 25) < 1e13
    assert 1e8 < read_bandwidth(size=1 << 25, threads=3) < 1e13


def test_no_memory_or_too_many_threads_is_said() -> None:
    with pytest.raises(WrongUse, match="no memory"):
        read_bandwidth(size=1 << 62)
    with pytest.raises(WrongUse, match="no memory"):
        read_bandwidth(size=1 << 25, threads=1000)


def test_an_engine_without_the_reader_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "libllama.so").touch()
    monkeypatch.setenv("CLOISTER_ENGINE_DIR", str(tmp_path))
    with pytest.raises(WrongUse, match="not built"):
        read_bandwidth(size=1 << 25)


def test_the_reader_is_no_part_of_the_measured_engine(tmp_path: Path) -> None:
    before = library_digest(tmp_path)
    (tmp_path / "membw.so").write_bytes(b"anything")
    assert library_digest(tmp_path) == before
    assert (library_dir() / "membw.so").is_file()


def test_a_token_reads_all_weights_but_the_tables_it_looks_up_in() -> None:
    assert (
        weight_bytes_per_token(model(("token_embd.weight", 7), ("output.weight", 5), ("blk.0.ffn_up.weight", 3))) == 8
    )
    assert weight_bytes_per_token(model(("token_embd.weight", 7), ("position_embd.weight", 9))) == 7  # tied


def test_another_reader_makes_another_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("build_engine", ROOT / "tools" / "build_engine.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "build_engine", tool)
    spec.loader.exec_module(tool)
    locked = tool.read_lock(tool.LOCK.read_text())
    before = tool.build_key(locked, "")
    changed = tmp_path / "membw.c"
    changed.write_text("int x;")
    monkeypatch.setattr(tool, "READER_SOURCE", changed)
    assert tool.build_key(locked, "") != before
    assert not tool.READER.startswith("lib")
