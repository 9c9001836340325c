import pytest

from cloister.enclave.llm.engine import GenerateRequest, Prompt, Sampling
from cloister.enclave.llm.llama.model import Model
from cloister.enclave.llm.llama.prepare import Preparer
from cloister.errors import ContextLengthExceeded, WrongUse

CONTEXT = 512


def plain(length: int, wanted: int | None, *, cut: bool = False) -> GenerateRequest:
    return GenerateRequest(Prompt(text="x" * length), Sampling(max_tokens=wanted), truncate_prompt=cut)


@pytest.mark.parametrize(("length", "wanted"), [(CONTEXT - 1, None), (CONTEXT - 1, 1), (CONTEXT - 16, 16), (1, 511)])
def test_takes_what_just_fits(model: Model, length: int, wanted: int | None) -> None:
    assert len(Preparer(model).prepare(1, plain(length, wanted)).prompt) == length


@pytest.mark.parametrize(("length", "wanted"), [(CONTEXT, None), (CONTEXT, 1), (CONTEXT - 15, 16), (1, 512)])
def test_refuses_one_token_more_with_the_counts(model: Model, length: int, wanted: int | None) -> None:
    with pytest.raises(ContextLengthExceeded) as caught:
        Preparer(model).prepare(1, plain(length, wanted))
    found = caught.value
    assert (found.limit, found.prompt, found.requested) == (CONTEXT, length, length + (wanted or 1))


@pytest.mark.parametrize(("wanted", "left"), [(100, CONTEXT - 100), (None, CONTEXT - CONTEXT // 4)])
def test_cuts_the_oldest_and_says_how_much(model: Model, wanted: int | None, left: int) -> None:
    job = Preparer(model).prepare(1, plain(600, wanted, cut=True))
    assert (len(job.prompt), job.truncated) == (left, 600 - left)


def test_refuses_an_empty_prompt_and_too_many_logprobs(model: Model) -> None:
    with pytest.raises(WrongUse, match="empty"):
        Preparer(model).prepare(1, plain(0, 1))
    with pytest.raises(WrongUse, match="logprobs"):
        Preparer(model).prepare(1, GenerateRequest(Prompt(text="x"), Sampling(max_tokens=1, logprobs=21)))


class Watched:
    """Notes the lengths of what the tokenizer is given."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch, longest: int | None = 12) -> None:
        self.lengths: list[int] = []
        self.asked = 0
        self._longest = longest
        tokenize = model.tokenize

        def watched(text: str, **how: bool) -> list[int]:
            self.lengths.append(len(text))
            return tokenize(text, **how)

        monkeypatch.setattr(model, "tokenize", watched)
        self.preparer = Preparer(model, longest=self.longest)

    def longest(self) -> int | None:
        self.asked += 1
        return self._longest


def said(text: str, *, count_prompt: bool = False) -> GenerateRequest:
    prompt = Prompt(messages=({"role": "user", "content": text},))
    return GenerateRequest(prompt, Sampling(max_tokens=1), count_prompt=count_prompt)


@pytest.mark.parametrize("request_", [plain(12 * CONTEXT, 1), plain(12 * CONTEXT, None), said("x" * 12 * CONTEXT)])
def test_what_cannot_fit_is_refused_before_it_is_tokenized(
    model: Model, monkeypatch: pytest.MonkeyPatch, request_: GenerateRequest
) -> None:
    watched = Watched(model, monkeypatch)
    for _ in range(2):
        with pytest.raises(ContextLengthExceeded) as caught:
            watched.preparer.prepare(1, request_)
        assert caught.value.limit == CONTEXT
        assert CONTEXT <= caught.value.prompt <= CONTEXT + 8
    assert (watched.lengths, watched.asked) == ([], 1)


def test_what_might_fit_is_tokenized_and_counted(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(model, monkeypatch)
    with pytest.raises(ContextLengthExceeded) as caught:
        watched.preparer.prepare(1, plain(12 * (CONTEXT - 1), 1))
    assert caught.value.prompt == 12 * (CONTEXT - 1)
    marker = GenerateRequest(Prompt(text="th" * (CONTEXT - 1)), Sampling(max_tokens=1))
    assert len(Watched(model, monkeypatch, 2).preparer.prepare(1, marker).prompt) == CONTEXT - 1


def test_short_texts_ask_nobody_how_long_tokens_are(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(model, monkeypatch)
    watched.preparer.prepare(1, plain(CONTEXT - 1, 1))
    assert watched.asked == 0


@pytest.mark.parametrize("longest", [12, None])
def test_prompts_that_are_counted_or_cut_are_tokenized_however_long_they_are(
    model: Model, monkeypatch: pytest.MonkeyPatch, longest: int | None
) -> None:
    preparer = Watched(model, monkeypatch, longest).preparer
    with pytest.raises(ContextLengthExceeded) as caught:
        preparer.prepare(1, said("x" * 20 * CONTEXT, count_prompt=True))
    assert caught.value.prompt > 20 * CONTEXT
    job = preparer.prepare(1, plain(20 * CONTEXT, 1, cut=True))
    assert (len(job.prompt), job.truncated) == (CONTEXT - 1, 19 * CONTEXT + 1)


def test_conversations_are_cut_the_same_with_fewer_looks_of_the_tokenizer(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [{"role": "user", "content": "y" * length} for length in (9000, 9000, 9000, 100, 90)]
    request = GenerateRequest(Prompt(messages=tuple(turns)), Sampling(max_tokens=1), truncate_prompt=True)
    known, unknown = Watched(model, monkeypatch), Watched(model, monkeypatch, None)
    assert known.preparer.prepare(1, request) == unknown.preparer.prepare(1, request)
    known.lengths.clear()
    known.preparer.prepare(1, request)
    assert len([length for length in known.lengths if length > 9000]) == 1  # to count what is dropped


def test_a_text_that_cannot_be_embedded_is_not_tokenized(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(model, monkeypatch)
    with pytest.raises(ContextLengthExceeded) as caught:
        watched.preparer.embeddable("x" * (12 * CONTEXT + 1), None)
    assert (watched.lengths, caught.value.prompt) == ([], CONTEXT + 1)
    with pytest.raises(ContextLengthExceeded) as caught:
        watched.preparer.embeddable("x" * 12 * CONTEXT, None)
    assert caught.value.prompt == 12 * CONTEXT
