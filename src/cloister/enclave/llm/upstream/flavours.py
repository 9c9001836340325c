"""How each kind of upstream wants things said. What a client sent reaches it only as the typed values below."""

import base64
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from cloister.enclave.llm.engine import Sampling
from cloister.enclave.llm.toolcalls import MARKERS

__all__ = ["Kind", "cache_salt", "completion_body", "detokenize_body", "detokenized", "kind_of", "tokenize_body"]

Kind: TypeAlias = Literal["vllm", "sglang", "llama-server"]
"""A server that says of itself nothing of these is spoken to as vLLM."""

_SALT_LABEL = b"cloister/cache-salt/v1\0"
_LEAST_TOP_P = 1e-6
"""vLLM and SGLang take no 0."""


def kind_of(owner: object) -> Kind:
    """By `owned_by` in `/v1/models`."""
    return "llama-server" if owner == "llamacpp" else "sglang" if owner == "sglang" else "vllm"


def cache_salt(scope: bytes | None) -> str:
    """Whose prompts may share a cache: those of one scope, and without one nobody's, not even the next of the same caller.

    256 bits in base64url.
    """
    digest = os.urandom(32) if scope is None else hashlib.sha256(_SALT_LABEL + scope).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def completion_body(
    kind: Kind,
    sampling: Sampling,
    *,
    model: str,
    prompt: Sequence[int],
    room: int,
    scope: bytes | None,
    markers: bool,
) -> dict[str, Any]:
    """For `/v1/completions`. Every setting is said, so that no default of the upstream's, or of its model's, counts.

    `room`: tokens that the answer may have. `markers`: control tokens are shown, since those that mark calls are among
    them.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(prompt),
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": room,
        "temperature": sampling.temperature,
        "top_p": max(sampling.top_p, _LEAST_TOP_P),
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "ignore_eos": sampling.ignore_eos,
        "cache_salt": cache_salt(scope),
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if kind == "llama-server":
        return body | _for_llama_server(sampling, room)
    body |= {
        "repetition_penalty": sampling.repeat_penalty,
        "return_token_ids": True,
        "skip_special_tokens": not markers,
    }
    if sampling.logprobs is not None:
        body["logprobs"] = sampling.logprobs
    if sampling.grammar is not None and kind == "sglang":
        body["ebnf"] = sampling.grammar
    elif sampling.grammar is not None:
        body |= {"structured_outputs": {"grammar": sampling.grammar}, "guided_grammar": sampling.grammar}
    if kind == "vllm":
        body["spaces_between_special_tokens"] = False
    return body


def _for_llama_server(sampling: Sampling, room: int) -> dict[str, Any]:
    """It knows no salt and shares its prompt cache with everybody, so that it may use none."""
    own: dict[str, Any] = {
        "repeat_penalty": sampling.repeat_penalty,
        "repeat_last_n": room,
        "cache_prompt": False,
        "preserved_tokens": list(MARKERS),
    }
    if sampling.logprobs is not None:
        own["n_probs"] = max(sampling.logprobs, 1)
    if sampling.grammar is not None:
        own["grammar"] = sampling.grammar
    return own


def tokenize_body(kind: Kind, model: str, text: str, *, add_special: bool, parse_special: bool) -> dict[str, Any]:
    """For `/tokenize`. Only llama-server can take a text's markers for plain text."""
    if kind == "llama-server":
        return {"content": text, "add_special": add_special, "parse_special": parse_special}
    return {"model": model, "prompt": text, "add_special_tokens": add_special}


def detokenize_body(kind: Kind, model: str, tokens: Sequence[int]) -> dict[str, Any]:
    """For `/detokenize`."""
    body: dict[str, Any] = {"tokens": list(tokens)}
    return body if kind == "llama-server" else {**body, "model": model, "skip_special_tokens": False}


def detokenized(kind: Kind, answer: Mapping[str, Any]) -> object:
    """The text in `/detokenize`'s answer."""
    return answer.get({"vllm": "prompt", "sglang": "text", "llama-server": "content"}[kind])
