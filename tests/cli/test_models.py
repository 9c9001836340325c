import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import Result

from cloister.cli import models
from cloister.errors import ConnectionFailed
from cloister.models.download import Progress
from cloister.models.gguf import read_description
from cloister.models.lineage import Fetched, digest_model, lineage_path, read_lineage, save_lineage, trace
from cloister.models.reference import HubModel
from cloister.models.store import Record, embedded_path, file_path, quantized_path, save_record

Run = Callable[..., Result]
RECORD = Record("acme/toy", "0" * 40, "toy-q8_0.gguf", "Q8_0", ("",), "1" * 64, "1" * 64, 5, 1_700_000_000)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _store(record: Record) -> None:
    path = file_path(record.repository, record.file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(record.size))
    save_record(record)


def test_pulling_tells_what_came_and_how_to_serve_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def pull(model: HubModel, *, progress: Progress) -> Record:
        assert model == HubModel("acme/toy", "Q8_0")
        progress("toy-q8_0.gguf", 5, 5)
        return RECORD

    monkeypatch.setattr(models, "pull", pull)
    ran = run("models", "pull", "hf.co/acme/toy:Q8_0")
    assert (ran.exit_code, ran.stdout) == (0, f"toy-q8_0.gguf  5 bytes  sha256 {'1' * 64}\n")
    assert ran.stderr == "cloister serve hf.co/acme/toy:Q8_0\n"


def test_a_hub_that_is_not_there_is_unreachable(run: Run, nowhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", nowhere)
    ran = run("models", "pull", "hf.co/acme/toy")
    assert ran.exit_code == ConnectionFailed.exit_code
    assert "hint: The network is needed" in ran.stderr


@pytest.mark.parametrize("reference", ["default", "missing.gguf", "acme/toy"])
def test_only_a_hubs_model_can_be_pulled(run: Run, reference: str) -> None:
    assert run("models", "pull", reference).exit_code == 2


def test_the_list_is_plain_and_has_a_json_form(run: Run) -> None:
    _store(RECORD)
    shown = run("models", "list").stdout
    assert shown.split() == ["hf.co/acme/toy:Q8_0", "0.0", "MB", "2023-11-14", "sha256", "111111111111…"]
    (told,) = json.loads(run("models", "list", "--json").stdout)
    assert (told["repository"], told["size"]) == ("acme/toy", 5)
    assert Path(told["path"]).read_bytes() == bytes(5)


def test_an_empty_list_names_what_is_always_there(run: Run) -> None:
    ran = run("models", "list")
    assert ran.stdout == ""
    assert "default" in ran.stderr
    assert json.loads(run("models", "list", "--json").stdout) == []


TINY = embedded_path("tiny")


def _fetch_tiny() -> Path:
    """The embedded model as if it had come from a hub."""
    content = TINY.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    record = Record("acme/toy", "0" * 40, "toy-f16.gguf", "F16", ("",), sha256, sha256, len(content), 1_700_000_000)
    _store(record)
    path = record.local_model().path
    path.write_bytes(content)
    save_lineage(path, trace(digest_model(path), Fetched("acme/toy", "0" * 40, "toy-f16.gguf", sha256)))
    return path


def test_shows_what_a_model_is_and_what_memory_it_will_take(run: Run) -> None:
    ran = run("models", "show", "tiny", "--context", "512", "--streams", "2")
    assert ran.exit_code == 0
    lines = ran.stdout.splitlines()
    assert lines[:12] == [
        "model         cloister tiny",
        "source        embedded in the package",
        "architecture  llama, 4 layers of width 64",
        "attention     2 heads, 1 for keys and values, 32 wide",
        "parameters    246,336",
        "quantization  F16",
        "size          516,480 bytes",
        "context       1,024 tokens in training",
        "vocabulary    768 tokens",
        "template      yes (--template prints it)",
        "licence       apache-2.0",
        f"sha256        {hashlib.sha256(TINY.read_bytes()).hexdigest()}",
    ]
    assert "F16            29  491,520  99.5%" in lines
    assert any(line.startswith("memory for 2 streams of 512 tokens; ") for line in lines)
    (cells,) = (line.split() for line in lines if "tokens in it" in line)
    assert cells[-2:] == ["1,024", "1,024"]
    assert "blk.0.attn_k.weight" not in ran.stdout


def test_shows_every_tensor_when_asked(run: Run) -> None:
    rows = [row.split() for row in run("models", "show", "tiny", "--tensors").stdout.splitlines()]
    assert ["blk.0.attn_k.weight", "F16", "64", "x", "32", "4,096"] in rows


def test_the_json_form_says_the_same(run: Run) -> None:
    told = json.loads(run("models", "show", "tiny", "--json", "--context", "512", "--streams", "2", "--tensors").stdout)
    assert (told["architecture"], told["parameters"], told["kv_heads"]) == ("llama", 246_336, [1, 1, 1, 1])
    assert told["types"]["F16"] == {"tensors": 29, "bytes": 491_520}
    assert told["memory"]["f16"]["kv"] == 1024 * 4 * 64 * 2
    assert told["memory"]["f16"]["peak"] == told["memory"]["f16"]["resident"] + 516_480
    assert told["lineage"] is None
    assert told["tensors"][0]["sha256"] == digest_model(TINY).tensors[told["tensors"][0]["name"]]


def test_prints_the_template_without_what_a_terminal_would_obey(run: Run, tmp_path: Path) -> None:
    assert "<|im_start|>assistant" in run("models", "show", "tiny", "--template").stdout
    hostile = tmp_path / "hostile.gguf"
    hostile.write_bytes(
        TINY.read_bytes()
        .replace(b"<|im_start|>' + ", b"\x1b]52;c;AAAA\x07' + ")
        .replace(b"cloister tiny", b"\x1b[2J\nVERIFIED")
    )
    assert b"\x1b" in hostile.read_bytes()
    for words in (["--template"], [], ["--tensors"]):
        ran = run("models", "show", str(hostile), *words)
        assert ran.exit_code == 0
        assert "\x1b" not in ran.stdout
        assert "\x07" not in ran.stdout
    assert run("models", "show", str(hostile)).stdout.splitlines()[0] == "model         [2J VERIFIED"


def test_a_damaged_model_is_malformed(run: Run, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(TINY.read_bytes()[:-1])
    ran = run("models", "show", str(cut))
    assert ran.exit_code == 4
    assert "shorter than its tensors" in ran.stderr


def test_a_hubs_model_that_is_not_here_is_not_fetched_to_be_shown(run: Run) -> None:
    ran = run("models", "show", "hf.co/acme/toy")
    assert ran.exit_code == 2
    assert "hint: cloister models pull hf.co/acme/toy" in ran.stderr


def test_shows_the_lineage_and_tells_when_it_is_of_other_bytes(run: Run) -> None:
    path = _fetch_tiny()
    lineage = read_lineage(path)
    assert lineage is not None
    shown = run("models", "show", "hf.co/acme/toy:F16").stdout
    assert f"lineage       sha256:{hashlib.sha256(lineage_path(path).read_bytes()).hexdigest()}\n" in shown
    assert f"              fetched from hf.co/acme/toy at {'0' * 40}: toy-f16.gguf\n" in shown
    assert "of other bytes" not in shown

    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "of other bytes: 1 of 38 tensors differ\n" in run("models", "show", "hf.co/acme/toy").stdout
    path.write_bytes(content.replace(b"cloister tiny", b"cloister t1ny"))
    assert "of other bytes: the weights are the same" in run("models", "show", "hf.co/acme/toy").stdout
    told = json.loads(run("models", "show", "hf.co/acme/toy", "--json").stdout)
    assert told["lineage"]["of_these_bytes"] is False

    lineage_path(path).write_bytes(b"{}")
    ran = run("models", "show", "hf.co/acme/toy")
    assert "warning: The record of this model's lineage is none." in ran.stderr
    assert "lineage       no record" in ran.stdout


def test_quantizes_lists_shows_and_removes(run: Run) -> None:
    _fetch_tiny()
    ran = run("models", "quantize", "hf.co/acme/toy", "q8_0", "--threads", "1")
    path = quantized_path("toy-Q8_0")
    size, sha256 = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    assert ran.stdout == f"toy-Q8_0.gguf  516,480 -> {size:,} bytes ({size / 516_480:.1%})  sha256 {sha256}\n"
    assert ran.stderr == "29 tensors Q8_0, 9 tensors F32\ncloister serve toy-Q8_0\n"

    names = [row["name"] for row in json.loads(run("models", "list", "--json").stdout)]
    assert names == ["hf.co/acme/toy:F16", "toy-Q8_0"]
    assert f"sha256 {sha256[:12]}…" in run("models", "list").stdout.splitlines()[1]

    told = json.loads(run("models", "show", "toy-Q8_0", "--json").stdout)
    assert [step["action"] for step in told["lineage"]["steps"]] == ["fetched", "quantized"]
    assert told["lineage"]["steps"] == json.loads(lineage_path(path).read_bytes())["steps"]
    assert told["lineage"]["of_these_bytes"] is True

    again = run("models", "quantize", "hf.co/acme/toy", "Q8_0")
    assert again.exit_code == 2
    assert "hint: cloister models rm toy-Q8_0" in again.stderr

    assert run("models", "rm", "toy-Q8_0", "--yes").stdout == f"removed toy-Q8_0.gguf  {size:,} bytes\n"
    assert list(path.parent.iterdir()) == []


def test_quantizes_into_a_named_file(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "small.gguf"
    assert run("models", "quantize", "tiny", "Q4_0", "--out", out, "--threads", "1").exit_code == 0
    assert read_description(out).quantization == "Q4_0"
    twice = run(
        "models", "quantize", out, "Q8_0", "--out", tmp_path / "b.gguf", "--requantize", "--threads", "1", "--json"
    )
    assert json.loads(twice.stdout)["quantization"] == "Q8_0"
    assert "warning: small.gguf is quantized already" in twice.stderr
    assert json.loads(run("models", "rm", out, "--json", input="y\n").stdout)["removed"] == out.name
    assert not out.exists()
    assert not lineage_path(out).exists()


def test_refuses_a_second_rounding_and_an_unknown_type(run: Run) -> None:
    again = run("models", "quantize", "default", "Q4_0")
    assert again.exit_code == 2
    assert "--requantize" in again.stderr
    unknown = run("models", "quantize", "tiny", "Q3_X")
    assert unknown.exit_code == 2
    assert "Q5_K_M" in unknown.stderr
    assert run("models", "list").stdout == ""


@pytest.mark.parametrize("answer", ["", "n\n", "no\n", "\n"])
def test_removes_nothing_unless_told(run: Run, answer: str) -> None:
    path = _fetch_tiny()
    ran = run("models", "rm", "hf.co/acme/toy", input=answer)
    assert ran.exit_code == 1
    assert "Nothing was removed." in ran.stderr
    assert path.is_file()


def test_removes_a_fetched_model_with_all_that_is_recorded_of_it(run: Run) -> None:
    path = _fetch_tiny()
    assert run("models", "rm", "hf.co/acme/toy:F16", "-y").exit_code == 0
    assert list(path.parent.iterdir()) == []


def test_removes_the_file_that_would_be_served(run: Run) -> None:
    _store(replace(RECORD, file="a.gguf", quantization="", tags=("a.gguf",)))
    refused = run("models", "rm", "hf.co/acme/toy", "--yes")
    assert (refused.exit_code, refused.stdout) == (2, "")
    _store(RECORD)
    assert run("models", "rm", "hf.co/acme/toy", "--yes").stdout == "removed toy-q8_0.gguf  5 bytes\n"
    assert file_path("acme/toy", "a.gguf").is_file()


@pytest.mark.parametrize("yes", [["--yes"], []])
@pytest.mark.parametrize("reference", ["default", "tiny", str(TINY)])
def test_embedded_models_stay_and_nobody_is_asked(run: Run, reference: str, yes: list[str]) -> None:
    ran = run("models", "rm", reference, *yes)
    assert ran.exit_code == 2
    assert "comes with the package" in ran.stderr
    assert "Remove" not in ran.stderr
    assert TINY.is_file()


def test_what_is_not_ours_is_refused_before_anybody_is_asked(run: Run, tmp_path: Path) -> None:
    (tmp_path / "own.gguf").touch()
    ran = run("models", "rm", tmp_path / "own.gguf", input="y\n")
    assert ran.exit_code == 2
    assert "neither fetched nor made" in ran.stderr
    assert "[y/N]" not in ran.stderr


def test_the_words_for_steps_are_the_records(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloister.models.lineage._ACTIONS", {"bought": Fetched})
    path = _fetch_tiny()
    told = json.loads(run("models", "show", "hf.co/acme/toy", "--json").stdout)["lineage"]
    assert told["steps"] == json.loads(lineage_path(path).read_bytes())["steps"]
    assert told["steps"][0]["action"] == "bought"
