import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cloister.bench import shapes
from cloister.bench.shapes import FULL_SHAPES, SHAPES, TYPES, describe, tensors, write_random
from cloister.enclave.llm.engine import Delta, Done, Sampling, Started
from cloister.enclave.llm.llama.config import LoopSettings
from cloister.enclave.llm.llama.library import load_library
from cloister.enclave.llm.llama.loop import DecodeLoop, Job
from cloister.enclave.llm.llama.model import Model
from cloister.errors import WrongUse
from cloister.models.gguf import read_description

MINI = sorted(set(SHAPES) - set(FULL_SHAPES))
PARAMETERS = {  # as published, biases and all; a tied embedding counts once, as in the file
    "pythia-70m": 70_426_624,
    "pythia-1b": 1_011_781_632,
    "pythia-12b": 11_846_072_320,
    "gpt-neox-20b": 20_554_567_680,
    "falcon-7b": 6_921_720_704 + 65024 * 4544,  # GGUF files of it hold the output beside the embedding
    "falcon-40b": 41_303_293_952 + 65024 * 8192,
    "mpt-7b": 6_649_286_656,
    "mpt-30b": 29_957_200_896,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_248_023_552,
    "qwen2-0.5b": 494_032_768,
    "qwen3-1.7b": 1_720_574_976,
    "gemma-3-1b": 999_885_952,
    "gpt-oss-20b": 20_914_757_184,
}


def silent(_: object) -> None:
    pass


@pytest.fixture(scope="module")
def library() -> Any:
    return load_library()


@pytest.fixture
def generate(library: Any) -> Callable[[Path], tuple[str, int]]:
    """The architecture that the engine found in a file, and how many tokens it generated."""

    def run(path: Path) -> tuple[str, int]:
        model = Model(library, path, LoopSettings(slots=2, context=128))
        try:
            loop = DecodeLoop(library, model, slots=2)
            sampling = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)
            loop.submit(Job(1, tuple(range(260, 300)), sampling, scope=None, truncated=0))
            events = [event for _ in range(40) for _, event in loop.step()]
            assert not loop.busy
            assert all(isinstance(event, Started | Delta | Done) for event in events)
            done = [event.completion_tokens for event in events if isinstance(event, Done)]
            return model.describe().architecture, sum(done)
        finally:
            model.close()

    return run


@pytest.mark.parametrize("name", MINI)
def test_the_engine_runs_every_architecture(
    name: str, tmp_path: Path, generate: Callable[[Path], tuple[str, int]]
) -> None:
    path = write_random(name, tmp_path, note=silent)
    assert generate(path) == (SHAPES[name].architecture, 8)
    assert path.stat().st_size < 3_000_000


@pytest.mark.parametrize("type_name", TYPES)
def test_the_engine_runs_every_type(
    type_name: str, tmp_path: Path, generate: Callable[[Path], tuple[str, int]]
) -> None:
    path = write_random("llama-mini", tmp_path, note=silent, type=type_name)
    assert generate(path) == ("llama", 8)


def test_full_shapes_have_the_published_number_of_parameters() -> None:
    assert {name: shape.parameters for name, shape in FULL_SHAPES.items()} == PARAMETERS


def test_every_architecture_of_a_full_shape_has_a_mini_one() -> None:
    assert {shape.architecture for shape in FULL_SHAPES.values()} == {SHAPES[name].architecture for name in MINI}


@pytest.mark.parametrize("name", MINI)
def test_the_file_is_as_foretold(name: str, tmp_path: Path) -> None:
    told: list[float] = []
    foretold = describe(SHAPES[name], "q8_0")
    found = read_description(write_random(name, tmp_path, note=silent, progress=told.append))
    assert {(one.name, one.shape, one.type, one.size) for one in found.tensors} == {
        (one.name, one.shape, one.type, one.size) for one in foretold.tensors
    }
    for field in ("architecture", "context", "width", "heads", "kv_heads", "key_length", "value_length", "vocabulary"):
        assert getattr(found, field) == getattr(foretold, field), field
    assert 0 < found.file_size - foretold.file_size < 50_000
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_no_write_is_larger_than_a_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 12 GB is written on a machine of 2 GB."""

    class Sink(io.BytesIO):
        largest = 0

        def write(self, data: Any) -> int:
            Sink.largest = max(Sink.largest, len(data))
            return len(data)

    tile = shapes._Tiles().of(next(tensors(SHAPES["pythia-12b"])), TYPES["q8_0"][0])
    shapes._repeat(Sink(), tile, 1 << 30)
    assert Sink.largest < 1 << 20


def test_two_writes_give_the_same_bytes(tmp_path: Path) -> None:
    one, other = (write_random("llama-mini", tmp_path / name, note=silent) for name in ("a", "b"))
    assert one.read_bytes() == other.read_bytes()


def test_what_is_there_is_not_written_again(tmp_path: Path) -> None:
    notes: list[str] = []
    for _ in range(2):
        write_random("llama-mini", tmp_path, note=notes.append)
    assert notes == ["writing llama-mini-random-q8_0.gguf (random weights, once)"]


def test_a_model_cut_short_is_not_taken_for_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(shapes, "_repeat", cut)
    with pytest.raises(OSError, match="disk full"):
        write_random("llama-mini", tmp_path, note=silent)
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 12_800_000_000})())
    with pytest.raises(WrongUse) as caught:
        write_random("pythia-12b", tmp_path, note=silent)
    assert (caught.value.got, "XDG_CACHE_HOME" in caught.value.hint) == ("12.8 GB", True)
    assert not list(tmp_path.iterdir())
