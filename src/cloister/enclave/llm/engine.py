"""The engine seam: what the API asks of anything that runs a model, and the events that come back.

Default: `cloister.enclave.llm.llama` (llama.cpp in a child process, or in a thread); else `cloister.enclave.llm.upstream`
(another server on loopback). Tests use a scripted engine.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from cloister.enclave.llm.reasoning import Thinking
from cloister.enclave.llm.toolcalls import CallForm

__all__ = [
    "Delta",
    "Done",
    "Embedded",
    "Engine",
    "EngineInfo",
    "Event",
    "GenerateRequest",
    "ModelInfo",
    "Prompt",
    "Sampling",
    "Started",
    "TokenLogprob",
]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Exactly one of `messages`, `text` and `tokens` is set.

    `messages`: chat messages as the API received them (role, content as a string, plus whatever the template reads);
    rendered inside the engine by the model's own template, under a deadline. Past calls stand in them as OpenAI has them
    (`tool_calls`, `tool_call_id`), their arguments as an object or as its JSON. `text`: tokenized as it stands, with BOS
    where the model wants one, and special tokens not parsed. `tokens`: taken as they are.

    `tools`: what the template is to tell the model of, in OpenAI's form; only beside `messages`.
    """

    messages: tuple[Mapping[str, Any], ...] | None = None
    text: str | None = None
    tokens: tuple[int, ...] | None = None
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. `max_tokens` None means: until the context is full."""

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repeat_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    """None: none. N: the chosen token's log-probability and the N most likely ones (0 to 20)."""
    ignore_eos: bool = False
    """For benchmarks only: the API never sets it."""
    grammar: str | None = None
    """GBNF that the whole answer follows; it ends as soon as it can only end."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """`scope` (32 bytes) names whose cached prefixes may be reused; None: nobody's, and nothing is kept.

    `truncate_prompt`: drop the oldest part of the prompt to leave room for `max_tokens` (the original's /generate
    contract) in place of raising `ContextLengthExceeded`. `count_prompt`: that error tells the prompt's whole length, however
    long it takes to find; else it may tell one that the prompt has at least.
    """

    prompt: Prompt
    sampling: Sampling
    scope: bytes | None = None
    truncate_prompt: bool = False
    count_prompt: bool = False


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """`raw` is the token's bytes (it may be part of a UTF-8 sequence); `top` the most likely alternatives."""

    token: int
    raw: bytes
    logprob: float
    top: tuple["TokenLogprob", ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """The prompt was accepted into the batch. `truncated` counts prompt tokens that were dropped."""

    prompt_tokens: int
    cached_tokens: int
    truncated: int = 0


@dataclass(frozen=True, slots=True)
class Delta:
    """Whole characters only: a UTF-8 sequence split over tokens is held back. `tokens` may be 0 to many.

    `logprobs` holds one entry per token when they were asked for.
    """

    text: str
    tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Done:
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


Event: TypeAlias = Started | Delta | Done


@dataclass(frozen=True, slots=True)
class Embedded:
    """A text as a direction: `vector` holds 32-bit floats, little-endian, of length 1; `tokens` is what the text took."""

    vector: bytes
    tokens: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """`sha256` (hex) is of the bytes that were loaded, not of a name. `created` in Unix seconds.

    `calls` and `thinking`: how the model writes calls of tools, and whether it thinks aloud, by its chat template.
    `embedding`: numbers of an embedding, 0 where it gives none; `generates`: whether it continues texts.
    """

    name: str
    sha256: str
    quantization: str
    architecture: str
    parameters: int
    size: int
    context_length: int
    has_chat_template: bool
    created: int = 0
    calls: CallForm = ""
    thinking: Thinking = ""
    embedding: int = 0
    generates: bool = True


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """`sha256` (hex) is over the engine's libraries as loaded, of nothing where none of ours is; `variant` is the rung of the
    self-test that ran, or "upstream"."""

    sha256: str
    variant: str
    model: ModelInfo
    slots: int


class Engine(Protocol):
    """One model, many streams. Errors are cloister's: `EngineDied`, `EngineLoading`, `ContextLengthExceeded`,
    `MalformedModel` (its template failed or ran too long), `WrongUse`."""

    @property
    def info(self) -> EngineInfo:
        """Raises `EngineLoading` until the model is loaded."""

    @property
    def ready(self) -> bool: ...

    def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        """Started, then Deltas, then Done. Closing the iterator (`aclose`) frees the slot within 0.1 s."""

    async def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]: ...

    async def detokenize(self, tokens: Sequence[int]) -> bytes: ...

    async def embed(self, inputs: Sequence[str | Sequence[int]]) -> list[Embedded]:
        """Of texts, or of tokens, one each, in their order. Only where `ModelInfo.embedding` is not 0."""

    async def start(self) -> None:
        """Load the model; returns once it answers. Raises `MalformedModel` when no rung of the ladder can load it."""

    async def close(self) -> None: ...
