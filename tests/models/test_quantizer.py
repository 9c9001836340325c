import asyncio
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
from tests.enclave.llm.llama.serving import answer, ask, serve
from tests.models.header import Header

from cloister.enclave.llm.llama.library import library_dir
from cloister.errors import MalformedModel, WrongUse
from cloister.models.gguf import read_description
from cloister.models.lineage import Fetched, Found, Lineage, Quantized, digest_model, read_lineage, save_lineage
from cloister.models.quantizer import TYPES, parse_type, quantize, quantize_traced
from cloister.models.store import embedded_path

TINY = embedded_path("tiny")


@pytest.fixture(scope="module")
def library() -> Path:
    return library_dir()


def test_quantizes_tells_how_far_it_is_and_leaves_only_the_result(tmp_path: Path, library: Path) -> None:
    seen: list[tuple[int, int]] = []
    target = tmp_path / "tiny-Q8_0.gguf"
    quantize(TINY, target, "q8_0", library=library, threads=1, progress=lambda *at: seen.append(at))
    before, after = read_description(TINY), read_description(target)
    assert seen == [(at, len(before.tensors)) for at in range(len(before.tensors) + 1)]
    assert list(tmp_path.iterdir()) == [target]
    assert after.quantization == "Q8_0"
    assert {t.name: t.type for t in after.tensors if "norm" not in t.name} == {
        t.name: "Q8_0" for t in before.tensors if "norm" not in t.name
    }
    assert (after.parameters, after.chat_template) == (before.parameters, before.chat_template)
    assert after.file_size < 0.6 * before.file_size
    assert target.stat().st_mode & 0o777 == 0o644


def test_the_engine_loads_what_was_quantized(tmp_path: Path, library: Path) -> None:
    target = tmp_path / "tiny-Q8_0.gguf"
    quantize(TINY, target, "Q8_0", library=library, threads=1)

    async def talk() -> tuple[str, str, int]:
        async with serve(target) as engine:
            answered = await answer(engine, ask("Hello", max_tokens=4))
            return engine.info.model.quantization, engine.info.model.sha256, answered.done.completion_tokens

    assert asyncio.run(talk()) == ("Q8_0", hashlib.sha256(target.read_bytes()).hexdigest(), 4)


def test_more_threads_give_the_same_bytes(tmp_path: Path, library: Path) -> None:
    for threads in (1, 2):
        quantize(TINY, tmp_path / f"{threads}.gguf", "Q4_0", library=library, threads=threads)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_has_a_number_in_the_format(kind: str) -> None:
    assert parse_type(kind.lower()) == kind
    assert f"MOSTLY_{kind}" in gguf.LlamaFileType.__members__


def test_refuses_another_type(tmp_path: Path, library: Path) -> None:
    with pytest.raises(WrongUse) as caught:
        quantize(TINY, tmp_path / "x.gguf", "IQ1_S", library=library, threads=1)
    assert "Q5_K_M" in (caught.value.expected or "")
    assert not list(tmp_path.iterdir())


def test_refuses_a_quantized_model_unless_asked(tmp_path: Path, library: Path) -> None:
    half, twice = tmp_path / "half.gguf", tmp_path / "twice.gguf"
    quantize(TINY, half, "Q8_0", library=library, threads=1)
    with pytest.raises(WrongUse, match="quantized already"):
        quantize(half, twice, "Q4_0", library=library, threads=1)
    assert not twice.exists()
    quantize(half, twice, "Q4_0", library=library, threads=1, requantize=True)
    assert read_description(twice).quantization == "Q4_0"


def test_a_model_that_llama_cpp_refuses_leaves_nothing(tmp_path: Path, library: Path) -> None:
    source = tmp_path / "odd.gguf"
    source.write_bytes(Header(tensors=[("a", (64,), 0, 0)]).file().replace(b"llama", b"ll4ma"))
    with pytest.raises(MalformedModel):
        quantize(source, tmp_path / "x.gguf", "Q8_0", library=library, threads=1)
    assert list(tmp_path.iterdir()) == [source]


def test_a_quantizer_that_dies_leaves_nothing(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Libraries that are none: the child fails as it would when a hostile file crashed it."""
    with pytest.raises(MalformedModel, match="died"):
        quantize(TINY, tmp_path / "x.gguf", "Q8_0", library=tmp_path_factory.mktemp("empty"), threads=1)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_wrong_use(tmp_path: Path, library: Path) -> None:
    with pytest.raises(WrongUse, match="cannot be written"):
        quantize(TINY, tmp_path / "no" / "x.gguf", "Q8_0", library=library, threads=1)


class _CutError(Exception):
    pass


def test_a_cut_leaves_nothing_and_the_old_file_as_it_was(tmp_path: Path, library: Path) -> None:
    target = tmp_path / "x.gguf"
    target.write_bytes(b"old")

    def cut(done: int, _total: int) -> None:
        if done == 3:
            raise _CutError

    with pytest.raises(_CutError):
        quantize(TINY, target, "Q8_0", library=library, threads=1, progress=cut)
    assert list(tmp_path.iterdir()) == [target]
    assert target.read_bytes() == b"old"


def test_a_child_to_whom_nobody_listens_leaves_nothing(tmp_path: Path, library: Path) -> None:
    """As after its parent was killed: it notices at its next tensor, and clears up."""
    target = tmp_path / "draft"
    target.touch()
    listener, told = os.pipe()
    os.close(listener)
    words = [sys.executable, "-m", "cloister.models.quantizer", str(TINY), str(target), "7", "1", "0"]
    with subprocess.Popen(words, stdout=told, env={**os.environ, "LLAMA_CPP_LIB_PATH": str(library)}) as child:
        os.close(told)
        assert child.wait() == 4
    assert not target.exists()


def test_records_the_sources_steps_and_its_own(tmp_path: Path, library: Path) -> None:
    source, target = tmp_path / "toy-f16.gguf", tmp_path / "toy-Q4_0.gguf"
    source.write_bytes(TINY.read_bytes())
    digests = digest_model(source)
    fetched = Fetched("acme/toy", "0" * 40, "toy-f16.gguf", digests.sha256)
    save_lineage(source, Lineage(digests.sha256, digests.size, (fetched,), digests.tensors))
    lineage = quantize_traced(source, target, "q4_0", library=library, engine_sha256="3" * 64, threads=1)
    made = hashlib.sha256(target.read_bytes()).hexdigest()
    assert lineage == read_lineage(target)
    assert lineage.sha256 == made
    assert lineage.steps[0] == fetched
    step = lineage.steps[1]
    assert isinstance(step, Quantized)
    assert (step.type, step.engine_sha256, step.requantized, step.sha256) == ("Q4_0", "3" * 64, False, made)
    assert step.version.startswith("llama-cpp-python ")
    names = [tensor.name for tensor in read_description(target).tensors]
    assert sorted(lineage.tensors) == sorted(names)
    assert lineage.tensors["output_norm.weight"] == digests.tensors["output_norm.weight"]


def test_the_same_steps_give_the_same_record(tmp_path: Path, library: Path) -> None:
    digests = {
        quantize_traced(
            TINY, tmp_path / f"{at}.gguf", "Q8_0", library=library, engine_sha256="3" * 64, threads=1
        ).digest()
        for at in range(2)
    }
    assert len(digests) == 1


def test_a_source_that_changes_meanwhile_gives_no_result(tmp_path: Path, library: Path) -> None:
    source = tmp_path / "toy.gguf"
    source.write_bytes(TINY.read_bytes())

    def change(done: int, _total: int) -> None:
        if done == 2:
            with source.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\x55")

    with pytest.raises(MalformedModel, match="changed"):
        quantize_traced(
            source, tmp_path / "x.gguf", "Q8_0", library=library, engine_sha256="3" * 64, threads=1, progress=change
        )
    assert list(tmp_path.iterdir()) == [source]


def test_a_source_without_a_record_was_found(tmp_path: Path, library: Path) -> None:
    lineage = quantize_traced(TINY, tmp_path / "x.gguf", "Q8_0", library=library, engine_sha256="3" * 64, threads=1)
    assert lineage.steps[0] == Found("tiny.gguf", hashlib.sha256(TINY.read_bytes()).hexdigest())
