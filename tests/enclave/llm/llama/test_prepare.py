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
