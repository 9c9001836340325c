import json
from pathlib import Path

import pytest
from tests.cli.running import run

from cloister.bench import quant
from cloister.bench.perplexity import SCORED, Perplexity
from cloister.bench.quant import TYPES, Comparison, Row, Text, compare
from cloister.cli import bench_quant
from cloister.cli.main import app
from cloister.errors import WrongUse
from cloister.models.quantizer import TYPES as QUANTIZED
from cloister.models.store import embedded_path

TEXT = "".join(f"In room {at} of the house there was a chair, and somebody sat on it. " for at in range(60))


def scored(*chunks: float) -> Perplexity:
    """Of the mean -ln p of each chunk."""
    nll = tuple(mean * SCORED for mean in chunks)
    return Perplexity(nll, 0.0, scored_bytes=1000, tokens=2000, adds_bos=True, seconds=1.0)


def row(kind: str, speed: float, perplexity: Perplexity | None = None) -> Row:
    return Row(
        type=kind,
        file_size=10,
        resident=20,
        read=100.0,
        token=1 / speed,
        prompt=9.0,
        shares=(0.5, 0.9, 0.8),
        bandwidth=1000.0,
        perplexity=perplexity,
    )


def test_the_share_is_the_median_of_the_rounds() -> None:
    assert row("f16", 8.0).share == 0.8


def test_recommends_the_fastest_that_is_as_good() -> None:
    rows = (
        row("f16", 10.0, scored(3.0, 5.0)),
        row("q8_0", 20.0, scored(3.001, 5.001)),
        row("q5_1", 15.0, scored(3.0, 5.0)),
        row("q4_0", 40.0, scored(3.02, 5.02)),  # 2 % worse in every chunk
    )
    best, reason = Comparison(rows, 512).recommend()
    assert best.type == "q8_0"
    assert "20.0 tokens/s" in reason
    assert "+0.10 %" in reason
    assert "q4_0 is faster (40.0), but worse (+2.02 %" in reason


def test_a_difference_that_the_text_cannot_show_does_not_count() -> None:
    rows = (row("f16", 10.0, scored(3.0, 5.0, 4.0)), row("q4_0", 40.0, scored(3.1, 4.9, 4.02)))
    assert Comparison(rows, 512).recommend()[0].type == "q4_0"
    one_chunk = (row("f16", 10.0, scored(3.0)), row("q4_0", 40.0, scored(3.1)))  # no error to be had
    assert Comparison(one_chunk, 512).recommend()[0].type == "f16"


def test_without_a_text_the_type_known_to_be_safe_is_recommended() -> None:
    rows = (row("f16", 10.0), row("q8_0", 20.0), row("q4_0", 40.0))
    best, reason = Comparison(rows, 512).recommend()
    assert best.type == "q8_0"
    assert "not measured" in reason
    assert "q4_0 would give 40.0" in reason
    assert Comparison(rows[::2], 512).recommend()[0].type == "f16"


def test_every_type_is_one_that_the_quantizer_makes() -> None:
    assert tuple(name.upper() for name in TYPES) == QUANTIZED


def test_measures_each_type_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([1e9, 2e9, 1e9, 1e9, 3e9, 1e9])  # before each type's rounds, and after each
    monkeypatch.setattr(quant, "_ROUNDS", 2)
    monkeypatch.setattr(quant, "read_bandwidth", lambda: next(readings))
    text = tmp_path / "text"
    text.write_text(TEXT)
    folder = tmp_path / "bench"
    stages: list[tuple[str, float]] = []
    found = compare(
        embedded_path("tiny"),
        folder,
        types=["q4_0", "f16"],
        context=256,
        text=Text(text, 2),
        progress=lambda what, done: stages.append((what, done)),
    )
    f16, q4_0 = found.rows
    assert (f16.type, q4_0.type) == ("f16", "q4_0")  # the largest first, whatever was asked first
    assert f16.file_size == embedded_path("tiny").stat().st_size > q4_0.file_size
    assert f16.read > q4_0.read > 0
    assert f16.perplexity is not None
    assert q4_0.perplexity is not None
    assert f16.perplexity.chunks == q4_0.perplexity.chunks == 2
    assert f16.perplexity.value != q4_0.perplexity.value
    assert (f16.bandwidth, q4_0.bandwidth, found.bandwidth) == (2e9, 3e9, 3e9)
    assert [len(one.shares) for one in (f16, q4_0)] == [2, 2]
    assert 0 < f16.share < q4_0.read  # what memory could give is what was said of it: no cache is so slow
    assert not list(readings)
    assert list(folder.iterdir()) == []
    assert [done for _, done in stages] == sorted(done for _, done in stages)


def test_the_command_shows_a_table_json_and_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant, "read_bandwidth", lambda: 1e9)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = ("bench", "quant", "tiny", "--types", "F16", "--context", "128")
    plain = run(app, *words)
    assert plain.exit_code == 0, plain.output
    assert "perplexity: not measured, no --text was given." in plain.stdout
    assert "Take f16: " in plain.stdout
    ran = run(app, *words, "--json", "--plot", str(tmp_path / "plots"))
    told = json.loads(ran.stdout)
    assert [one["type"] for one in told["types"]] == ["f16"]
    assert (told["context"], told["random_weights"]) == (128, False)
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        f"quant-{what}.{kind}" for what in ("size", "speed") for kind in ("png", "svg")
    }


def test_types_are_written_in_any_case_and_told_as_llama_cpp_writes_them() -> None:
    assert bench_quant._types("q4_k_m, F16,f16") == ("f16", "q4_K_M")


def test_a_disk_without_room_is_said_before_anything_is_quantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quant, "read_bandwidth", lambda: 1e9)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(WrongUse, match=r"no room for q4_0\.gguf"):
        compare(embedded_path("tiny"), tmp_path, types=["q4_0"], context=256)
    assert not list(tmp_path.iterdir())


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match="quantized already"):
        compare(embedded_path("demo"), tmp_path, types=["q4_0"], context=512)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tiny", "--types", "q8_0,q9_9"), "no type to quantize to"),
        (("pythia-1b", "--text", "README.md"), "Random weights foretell nothing"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(words: tuple[str, ...], message: str) -> None:
    ran = run(app, "bench", "quant", *words)
    assert ran.exit_code == 2
    assert message in ran.stderr
