import platform
from dataclasses import replace
from pathlib import Path

import pytest
from tests.models.heads import HEADS, WIDTH, write_heads

from cloister.enclave.llm.llama import LoopSettings
from cloister.enclave.llm.llama import model as engine
from cloister.enclave.llm.llama.config import KV_TYPES
from cloister.enclave.llm.llama.library import load_library
from cloister.enclave.llm.llama.model import Model
from cloister.errors import WrongUse
from cloister.models import memory
from cloister.models.gguf import Description, Tensor, read_description
from cloister.models.memory import Estimate, available_memory, estimate, judge, kv_bytes, kv_cells
from cloister.models.store import embedded_path

GIB = 1 << 30
MODEL = Description(
    architecture="llama",
    name="",
    licence="",
    quantization="Q8_0",
    chat_template=None,
    context=32768,
    vocabulary=1000,
    width=512,
    feed_forward=1024,
    heads=8,
    kv_heads=(4, 4, 2),
    key_length=64,
    value_length=32,
    tensors=(
        Tensor("token_embd.weight", (512, 1000), "Q8_0", 1024, 544_000),
        Tensor("blk.0.attn_q.weight", (512, 512), "Q8_0", 545_024, 278_528),
        Tensor("norm.weight", (512,), "F32", 823_552, 2048),
    ),
    file_size=825_600,
)


def test_a_cells_bytes_are_those_of_every_layers_keys_and_values() -> None:
    assert kv_bytes(MODEL, 1) == (4 + 4 + 2) * (64 + 32) * 2
    assert kv_bytes(MODEL, 256, "q8_0") == 256 * (4 + 4 + 2) * (64 + 32) * 34 // 32


@pytest.mark.parametrize(
    ("context", "streams", "budget", "cells"),
    [
        (512, 4, GIB, 4 * 512),  # a part for each
        (512, 4, 1920 * 2000, 2000),
        (4096, 64, 1920 * 10_000, 10_000),  # what the budget allows
        (4096, 64, 1, 4096),  # never less than one conversation
    ],
)
def test_the_cache_holds_all_streams_within_the_budget(
    context: int, streams: int, budget: int, cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_LEAST_CACHE", "_MOST_CACHE", "_MOST_PARTED"):
        monkeypatch.setattr(memory, name, budget)
    assert kv_cells(MODEL, context=context, streams=streams) == cells


def test_adds_up_what_is_resident_and_what_there_is_while_loading() -> None:
    needed = estimate(MODEL, context=1024, streams=2)
    assert (needed.cells, needed.kv) == (2048, 2048 * 1920)
    assert needed.weights == 544_000 * 2 + 278_528 + 2048  # the output shares the embedding's matrix
    assert needed.resident == needed.weights + needed.kv + needed.buffers
    assert needed.peak == needed.resident + 825_600


def test_a_part_for_each_stream_takes_room_for_scores_where_flash_attention_is_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a chunk of 512 rows, four heads, against 1,024 tokens."""
    apart, shared = (estimate(MODEL, context=1024, streams=2, kv_type=kind).buffers for kind in ("f16", "q8_0"))
    assert apart == shared or platform.machine() != "x86_64"
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    apart, shared = (estimate(MODEL, context=1024, streams=2, kv_type=kind).buffers for kind in ("f16", "q8_0"))
    assert apart - shared == 4 * MODEL.heads * 1024 * 512
    long = estimate(MODEL, context=1 << 18, streams=1)
    assert long.buffers - 4 * MODEL.heads * (1 << 18) * 64 > 0, "never less than 64 rows"


def test_the_context_is_the_models_own_up_to_the_engines_limit() -> None:
    assert estimate(MODEL).context == 16384
    assert estimate(MODEL, context=64).context == 64


def test_a_quarter_of_the_free_memory_is_the_caches_between_one_and_two_gibibytes() -> None:
    sizes = {
        free: estimate(MODEL, context=32768, streams=128, available=free * GIB).kv / GIB for free in (0, 1, 6, 100)
    }
    assert sizes == pytest.approx({0: 1.0, 1: 1.0, 6: 1.5, 100: 2.0}, rel=0.001)


def test_what_stands_here_and_in_the_engine_is_the_same() -> None:
    for name in ("_LEAST_CACHE", "_MOST_CACHE", "_MOST_PARTED", "_MOST_SCORES", "_VECTOR"):
        assert getattr(memory, name) == getattr(engine, name)
    assert memory._MOST_CONTEXT == engine._MOST_CONTEXT
    assert LoopSettings().chunk == memory._CHUNK
    widths = {kind: size / entries for kind, (entries, size) in memory.KV_TYPES.items()}
    assert widths == {kind: width for kind, (_, width) in KV_TYPES.items()}


@pytest.mark.parametrize(
    ("length", "kv_type"),
    [(None, "f16"), (None, "q8_0"), (16, "f16"), (32, "f16"), (32, "q8_0"), (64, "f16"), (64, "q8_0")],
)
@pytest.mark.parametrize("slots", [2, 16])
@pytest.mark.parametrize("context", [None, 300])
@pytest.mark.parametrize("budget", [GIB, 1_000_000, 3_000_000])
def test_the_engine_takes_as_many_cells(
    budget: int,
    slots: int,
    context: int | None,
    length: int | None,
    kv_type: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for room in (engine, memory):
        for name in ("_LEAST_CACHE", "_MOST_CACHE", "_MOST_PARTED"):
            monkeypatch.setattr(room, name, budget)
    path = embedded_path("tiny") if length is None else write_heads(tmp_path / "made.gguf", length)
    library, described = load_library(), read_description(path)
    needed = estimate(described, context=context, streams=slots, kv_type=kv_type)
    model = Model(library, path, LoopSettings(slots=slots, kv_type=kv_type, context=context or 0))
    try:
        assert (int(library.llama_n_ctx(model.context)), model.context_length) == (needed.cells, needed.context)
        assert model.kv_tokens == kv_cells(described, context=needed.context, streams=slots, kv_type=kv_type)
        assert kv_bytes(described, model.kv_tokens, kv_type) <= budget
    finally:
        model.close()


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize("length", [16, 32, 64])
def test_what_the_engine_counts_for_a_cell_is_what_is_estimated(tmp_path: Path, length: int, kv_type: str) -> None:
    path = write_heads(tmp_path / "made.gguf", length)
    model = Model(load_library(), path, LoopSettings(slots=1))
    try:
        counted = model._cell_bytes(KV_TYPES[kv_type][1])
    finally:
        model.close()
    width = {"f16": 2, "q8_0": 34 / 32}[kv_type]
    assert counted * 256 == kv_bytes(read_description(path), 256, kv_type) == 256 * 2 * 2 * 2 * length * width


def test_keys_and_values_of_other_lengths_are_counted_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_heads(tmp_path / "made.gguf", 64)
    model = Model(load_library(), path, LoopSettings(slots=1))
    said = {"general.architecture": "made", "made.attention.key_length": "192", "made.attention.value_length": "128"}
    monkeypatch.setattr(model, "_meta", lambda key: said.get(key, ""))
    try:
        assert model._cell_bytes(1.0) == 2 * 2 * (192 + 128)
        del said["made.attention.value_length"]
        assert model._cell_bytes(1.0) == 2 * 2 * (192 + WIDTH // HEADS)
    finally:
        model.close()


@pytest.mark.parametrize(
    ("free", "limit", "taken"),
    [
        (None, None, None),
        (100, None, None),
        (100, "max", 50 * GIB),
        (100, str(7 * GIB), GIB),
        (6, str(100 * GIB), GIB),
        (None, str(7 * GIB), GIB),
        (100, str(GIB), 2 * GIB),
    ],
)
def test_the_engine_and_the_estimate_read_free_memory_by_one_rule(
    tmp_path: Path, free: int | None, limit: str | None, taken: int | None
) -> None:
    if free is not None:
        write(tmp_path, "proc/meminfo", f"MemTotal:  1 kB\nMemAvailable:   {free << 20} kB\n")
    if limit is not None:
        write(tmp_path, "sys/fs/cgroup/memory.max", f"{limit}\n")
        write(tmp_path, "sys/fs/cgroup/memory.current", f"{taken}\n")
    said = available_memory(tmp_path)
    weightless = replace(MODEL, tensors=(), file_size=0)
    needed = estimate(weightless, context=32768, streams=128, available=said)
    assert engine._cache_budget(engine._MOST_CACHE, tmp_path) == pytest.approx(needed.kv, rel=0.001)
    assert engine._free_memory(tmp_path) == (0 if free is None and limit is None else said)


def needs(weights: int, kv: int = 0) -> Estimate:
    return Estimate(context=1, streams=1, cells=1, file=weights, weights=weights, kv=kv, buffers=0)


def test_says_in_one_line_what_it_takes() -> None:
    told = "4.00 GiB, 7.00 GiB while loading: weights 3.00 GiB, cache 1.00 GiB for 1 streams of 1 tokens"
    assert str(needs(3 * GIB, GIB)) == told


def test_refuses_only_what_certainly_does_not_fit_and_warns_when_it_is_near() -> None:
    assert judge(needs(2 * GIB, GIB), 8 * GIB) == ""
    assert "5.00 GiB" in judge(needs(2 * GIB, GIB), 5 * GIB)
    assert judge(needs(2 * GIB, GIB), 4 * GIB)
    with pytest.raises(WrongUse) as caught:
        judge(needs(2 * GIB, GIB), 4 * GIB - 1)
    assert "quantize" in caught.value.hint


def write(root: Path, name: str, content: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(content)


def test_free_memory_is_the_kernels_word_and_the_control_groups_limit(tmp_path: Path) -> None:
    assert available_memory(tmp_path) == 1 << 62
    write(tmp_path, "proc/meminfo", "MemTotal:  9000 kB\nMemAvailable:   5000 kB\n")
    assert available_memory(tmp_path) == 5000 * 1024
    write(tmp_path, "sys/fs/cgroup/memory.max", "max\n")
    write(tmp_path, "sys/fs/cgroup/memory.current", "2048\n")
    assert available_memory(tmp_path) == 5000 * 1024
    write(tmp_path, "sys/fs/cgroup/memory.max", "4096\n")
    assert available_memory(tmp_path) == 2048
    write(tmp_path, "sys/fs/cgroup/memory.current", "5000\n")
    assert available_memory(tmp_path) == 0
