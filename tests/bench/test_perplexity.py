import ctypes
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.cli.running import run

from cloister.bench.perplexity import SCORED, Perplexity, measure, negative_log_likelihoods
from cloister.cli.main import app
from cloister.errors import MalformedModel, WrongUse
from cloister.models.store import embedded_path

DATA = Path(__file__).parents[3] / "shared" / "data"
TINY = embedded_path("tiny")
TEXT = "".join(f"In room {at} of the house there was a chair, and somebody sat on it. " for at in range(60))


def result(*nll: float, squares: float = 0.0) -> Perplexity:
    return Perplexity(tuple(nll), squares, scored_bytes=1000, tokens=2000, adds_bos=True, seconds=1.0)


def test_is_the_exponential_of_the_mean_over_scored_tokens() -> None:
    two = result(2.0 * SCORED, 4.0 * SCORED, squares=(4.0 + 16.0) * SCORED)  # -ln p is 2 in one half, 4 in the other
    assert two.value == pytest.approx(math.exp(3.0))
    assert two.error == pytest.approx(math.exp(3.0) / math.sqrt(2 * SCORED - 1))
    assert two.bits_per_byte == pytest.approx(6.0 * SCORED / math.log(2) / 1000)


def test_what_makes_a_text_hard_cancels_out_between_two_models() -> None:
    easy_and_hard = result(2.0 * SCORED, 6.0 * SCORED)
    a_little_worse = result(2.01 * SCORED, 6.01 * SCORED)
    loss, error = a_little_worse.against(easy_and_hard)
    assert loss == pytest.approx(math.expm1(0.01))
    assert error == pytest.approx(0, abs=1e-9)
    assert result(2.0 * SCORED).against(result(2.0 * SCORED)) == (0.0, math.inf)


def test_likelihoods_are_right_where_single_precision_would_overflow() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, (130, 50)).astype(np.float32)  # more rows than are worked on at a time
    targets = rng.integers(0, 50, 130).astype(np.int32)
    shares = np.exp(logits.astype(np.float64))
    wanted = -np.log(shares[np.arange(130), targets] / shares.sum(axis=1))
    assert negative_log_likelihoods(logits, targets) == pytest.approx(wanted)
    assert negative_log_likelihoods(logits + np.float32(5000), targets) == pytest.approx(wanted, abs=1e-2)


def by_hand(library: Any, text: bytes) -> tuple[list[float], int, int]:
    """One chunk after the other, one token after the other, without a batch, a block or numpy: each chunk's sum, the text's
    tokens, and the bytes that the scored ones spell."""
    model = library.llama_model_load_from_file(str(TINY).encode(), library.llama_model_default_params())
    vocab = library.llama_model_get_vocab(model)
    tokens = (library.llama_token * (len(text) + 8))()
    count = library.llama_tokenize(vocab, text, len(text), tokens, len(tokens), True, False)  # noqa: FBT003
    size = library.llama_vocab_n_tokens(vocab)
    params = library.llama_context_default_params()
    params.n_ctx, params.n_threads = 512, 1
    context = library.llama_init_from_model(model, params)
    sums, spelled, piece = [], 0, ctypes.create_string_buffer(64)
    for start in range(0, count - 511, 512):
        library.llama_memory_clear(library.llama_get_memory(context), True)  # noqa: FBT003
        total = 0.0
        for at in range(511):
            token = library.llama_vocab_bos(vocab) if at == 0 else tokens[start + at]
            batch = library.llama_batch_get_one((library.llama_token * 1)(token), 1)
            assert library.llama_decode(context, batch) == 0
            if at >= 256:
                row = library.llama_get_logits_ith(context, 0)[:size]
                top = max(row)
                total += math.log(sum(math.exp(value - top) for value in row)) + top - row[tokens[start + at + 1]]
                length = library.llama_token_to_piece(vocab, tokens[start + at + 1], piece, 64, 0, True)  # noqa: FBT003
                assert length > 0
                spelled += length
        sums.append(total)
    library.llama_free(context)
    library.llama_model_free(model)
    return sums, count, spelled


def test_agrees_with_the_method_done_by_hand(tmp_path: Path) -> None:
    from cloister.enclave.llm.llama.library import load_library

    file = tmp_path / "text"
    file.write_text(TEXT + "\n")
    sums, count, spelled = by_hand(load_library(), TEXT.encode())
    found = measure(TINY, file)
    assert (found.tokens, found.chunks, found.adds_bos) == (count, len(sums), True)
    assert found.nll == pytest.approx(sums, rel=1e-4)  # rounding: 4e-5; another first token: 2e-4
    assert found.scored_bytes == spelled
    assert 0.4 < found.scored_bytes / len(TEXT.encode()) < 0.6


def test_only_the_first_chunks_when_so_asked(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text(TEXT * 2)
    seen: list[tuple[int, int]] = []
    everything = measure(TINY, file)
    some = measure(TINY, file, chunks=1, progress=lambda done, total, _value: seen.append((done, total)))
    assert everything.chunks > 4  # more than are evaluated at a time
    assert some.nll == pytest.approx(everything.nll[:1], rel=1e-4)
    assert seen == [(1, 1)]


@pytest.mark.parametrize(
    ("text", "words"), [(b"too short", "too short"), (b"\xff" * 5000, "not UTF-8"), (None, "cannot be read")]
)
def test_a_text_that_will_not_do_is_refused(tmp_path: Path, text: bytes | None, words: str) -> None:
    file = tmp_path / "text"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(WrongUse, match=words):
        measure(TINY, file)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text(TEXT)
    with pytest.raises(MalformedModel):
        measure(file, file)


def test_the_command_prints_a_line_and_json(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text(TEXT)
    plain = run(app, "bench", "perplexity", str(file), "--model", "tiny", "--chunks", "2")
    assert plain.exit_code == 0, plain.output
    told = json.loads(run(app, "bench", "perplexity", str(file), "--model", "tiny", "--chunks", "2", "--json").stdout)
    assert plain.stdout.startswith(f"perplexity {told['perplexity']:.4f} ± {told['error']:.4f}, ")
    assert (told["chunks"], told["scored_tokens"], told["model"]) == (2, 2 * 255, "tiny")
    drawn = run(
        app, "bench", "perplexity", str(file), "--model", "tiny", "--chunks", "1", "--plot", str(tmp_path / "p")
    )
    assert drawn.exit_code == 0, drawn.output
    assert {path.name for path in (tmp_path / "p").iterdir()} == {"perplexity.png", "perplexity.svg"}


def test_the_course_ends_at_the_value() -> None:
    found = Perplexity((SCORED * 2.0, SCORED * 4.0, SCORED * 3.0), 0.0, 1, 1, adds_bos=False, seconds=1.0)
    assert [count for count, _ in found.course] == [1, 2, 3]
    assert found.course[0][1] == pytest.approx(math.exp(2))
    assert found.course[-1][1] == found.value


@pytest.mark.skipif(
    not DATA.is_dir(), reason="trained weights and the text lie beside the repository, in ../shared/data"
)
def test_gives_the_figure_that_llama_cpp_gives() -> None:
    model, text = DATA / "weights" / "stories260K-f16.gguf", DATA / "corpora" / "wiki.test.raw"
    assert measure(model, text, chunks=4).value == pytest.approx(101.3673, abs=0.05)
