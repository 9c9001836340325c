import base64
from typing import Any

import pytest

from cloister.enclave.llm.engine import Sampling
from cloister.enclave.llm.upstream.flavours import (
    Kind,
    cache_salt,
    completion_body,
    detokenize_body,
    kind_of,
    tokenize_body,
)

KINDS: tuple[Kind, ...] = ("vllm", "sglang", "llama-server")


def body_of(kind: Kind, sampling: Sampling | None = None, scope: bytes | None = None, **more: Any) -> dict[str, Any]:
    settings = {"model": "m", "prompt": [1, 2], "room": 7, "markers": False, **more}
    return completion_body(kind, sampling or Sampling(), scope=scope, **settings)


def test_a_salt_belongs_to_one_scope() -> None:
    alice, bob = b"a" * 32, b"b" * 32
    assert cache_salt(alice) == cache_salt(alice)
    assert cache_salt(alice) != cache_salt(bob)
    assert len(base64.urlsafe_b64decode(cache_salt(alice) + "=")) == 32
    assert base64.urlsafe_b64decode(cache_salt(alice) + "=") != alice  # what others may see tells no scope


def test_without_a_scope_no_two_requests_share_a_salt() -> None:
    assert len({cache_salt(None) for _ in range(100)}) == 100


@pytest.mark.parametrize("kind", KINDS)
def test_every_request_is_salted_and_says_all_that_has_a_default(kind: Kind) -> None:
    body = body_of(kind, scope=b"s" * 32)
    assert body["cache_salt"] == cache_salt(b"s" * 32)
    told = {name: body[name] for name in ("temperature", "top_p", "top_k", "min_p", "max_tokens", "stream", "prompt")}
    assert told == {
        "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "max_tokens": 7, "stream": True, "prompt": [1, 2],
    }  # fmt: skip
    assert body["stream_options"] == {"include_usage": True}
    assert (
        not {"seed", "stop", "logit_bias", "logprobs", "n_probs", "grammar", "ebnf", "structured_outputs"} & body.keys()
    )


def test_a_server_without_salts_may_use_no_cache_at_all() -> None:
    assert body_of("llama-server")["cache_prompt"] is False


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("vllm", {"structured_outputs": {"grammar": "root ::= [a]"}, "guided_grammar": "root ::= [a]"}),
        ("sglang", {"ebnf": "root ::= [a]"}),
        ("llama-server", {"grammar": "root ::= [a]"}),
    ],
)
def test_each_kind_is_told_of_a_grammar_in_its_words(kind: Kind, said: dict[str, Any]) -> None:
    body = body_of(kind, Sampling(grammar="root ::= [a]"))
    assert {name: body[name] for name in said} == said


@pytest.mark.parametrize("kind", KINDS)
def test_all_sampling_arrives(kind: Kind) -> None:
    sampling = Sampling(
        temperature=0.5, top_p=0.0, top_k=3, min_p=0.1, seed=9, stop=("x",), frequency_penalty=0.2, presence_penalty=0.3,
        repeat_penalty=1.1, logit_bias={5: -1.5}, logprobs=2, ignore_eos=True,
    )  # fmt: skip
    body = body_of(kind, sampling)
    assert 0 < body["top_p"] < 1e-3
    penalty = "repeat_penalty" if kind == "llama-server" else "repetition_penalty"
    logprobs = "n_probs" if kind == "llama-server" else "logprobs"
    told = {"temperature": 0.5, "top_k": 3, "min_p": 0.1, "seed": 9, "stop": ["x"], "frequency_penalty": 0.2,
            "presence_penalty": 0.3, penalty: 1.1, "logit_bias": {"5": -1.5}, logprobs: 2, "ignore_eos": True}  # fmt: skip
    assert {name: body[name] for name in told} == told


def test_markers_are_shown_where_calls_are_among_them() -> None:
    assert body_of("vllm", markers=True)["skip_special_tokens"] is False
    assert body_of("vllm", markers=False)["skip_special_tokens"] is True
    assert "[TOOL_CALLS]" in body_of("llama-server")["preserved_tokens"]


def test_a_server_is_known_by_the_owner_that_it_names() -> None:
    assert [kind_of(owner) for owner in ("vllm", "sglang", "llamacpp", "me", None)] == [
        "vllm", "sglang", "llama-server", "vllm", "vllm",
    ]  # fmt: skip


def test_text_becomes_tokens_in_each_kinds_words() -> None:
    assert tokenize_body("llama-server", "m", "t", add_special=True, parse_special=False) == {
        "content": "t", "add_special": True, "parse_special": False,
    }  # fmt: skip
    assert tokenize_body("sglang", "m", "t", add_special=True, parse_special=False) == {
        "model": "m", "prompt": "t", "add_special_tokens": True,
    }  # fmt: skip
    assert detokenize_body("llama-server", "m", (1, 2)) == {"tokens": [1, 2]}
    assert detokenize_body("vllm", "m", (1, 2)) == {"tokens": [1, 2], "model": "m", "skip_special_tokens": False}
