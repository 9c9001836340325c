from pathlib import Path

import pytest

from cloister.errors import WrongUse
from cloister.models.reference import EmbeddedModel, HubModel, ModelFile, parse_reference
from cloister.models.store import quantized_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf.co/org/repo", HubModel("org/repo")),
        ("hf.co/org/repo:Q4_K_M", HubModel("org/repo", "Q4_K_M")),
        ("hf.co/org/repo:toy-q8_0.gguf", HubModel("org/repo", "toy-q8_0.gguf")),
        ("https://huggingface.co/org/repo-1.5B-GGUF/", HubModel("org/repo-1.5B-GGUF")),
        ("default", EmbeddedModel("demo")),
        ("demo", EmbeddedModel("demo")),
        ("Tiny", EmbeddedModel("tiny")),
    ],
)
def test_reads_what_a_person_writes(text: str, expected: object) -> None:
    assert parse_reference(text) == expected


def test_a_local_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert parse_reference(str(tmp_path / "m.gguf")) == ModelFile(tmp_path / "m.gguf")


def test_what_was_quantized_here_goes_by_its_name(cache: Path) -> None:
    made = quantized_path("toy-Q4_0")
    with pytest.raises(WrongUse):
        parse_reference("toy-Q4_0")
    made.parent.mkdir(parents=True)
    made.touch()
    assert parse_reference("toy-Q4_0") == ModelFile(made)
    for text in ("../quantized/toy-Q4_0", "./toy-Q4_0", "toy-Q4_0.gguf"):
        with pytest.raises(WrongUse):
            parse_reference(text)


@pytest.mark.parametrize(
    "text",
    [
        "hf.co/org",
        "hf.co/org/repo/blob/main/x.gguf",
        "hf.co/../repo",
        "hf.co/org/repo:a b",
        "hf.co/org/..",
        "hf.co/a--b/c",
        "hf.co/a/b--c",
        "hf.co//repo",
    ],
)
def test_refuses_what_is_no_repository(text: str) -> None:
    with pytest.raises(WrongUse, match="Not a model on the hub") as caught:
        parse_reference(text)
    assert "hf.co/org/repo" in caught.value.hint


def test_says_what_to_write_when_the_hub_was_meant() -> None:
    with pytest.raises(WrongUse) as caught:
        parse_reference("Qwen/Qwen3-0.6B-GGUF:Q8_0")
    assert caught.value.hint == "For the model on the hub, write hf.co/Qwen/Qwen3-0.6B-GGUF:Q8_0"


@pytest.mark.parametrize("text", ["missing.gguf", "a/missing.gguf", "", "nonsense"])
def test_refuses_what_is_not_there(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WrongUse) as caught:
        parse_reference(text)
    assert caught.value.hint


def test_refuses_a_folder(tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match="folder"):
        parse_reference(str(tmp_path))
