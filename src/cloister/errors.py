"""Every exception that cloister raises: one base, four branches.

    CloisterError
    |-- Malformed            bytes that are not what they claim to be             exit code 4
    |   |-- MalformedApp         cloister.toml, or what it names
    |   |-- MalformedEvidence    attestation document, statement, quote
    |   |-- MalformedImage       a machine's image or firmware, before it ever ran
    |   |-- MalformedMessage     HPKE, Binary HTTP or Oblivious HTTP framing
    |   |-- MalformedPolicy      the client's policy file
    |   `-- MalformedModel       a model file, or the chat template inside it
    |-- NotTrusted           well formed, and refused                             exit code 3
    |   |-- VerificationFailed   carries every factor that failed
    |   `-- ChannelBroken        a sealed message did not open: cut, changed or replayed
    |       |-- KeyUnknown           sealed to a key this enclave does not hold (422 on the wire)
    |       |-- Replayed             seen before, or too old to tell
    |       |   `-- ClockSkew            its date is too far from the enclave's clock; seal it afresh once
    |       |-- TruncatedResponse    a response ended before its authenticated end
    |       `-- PlaintextRefused     the other side answered, or asked, outside the sealed channel
    |-- Unreachable          nobody there, or not now                             exit code 5
    |   |-- ConnectionFailed     network, DNS, TLS, an offline hub
    |   |-- EngineDied           the engine crashed or hung; it is being restarted
    |   |-- EngineLoading        the model is not loaded yet
    |   |-- HostFull             the operator's disk, memory or quota has no room for it
    |   `-- QueueFull            too many requests wait already
    `-- WrongUse             the request cannot be served as asked                exit code 2
        |-- Conflict             it does not fit the state it meets: a name that is taken, an upload under way
        |-- ContextLengthExceeded
        |-- NotFound             the operator's host has nothing of that name
        `-- Unauthorized         no API key, or not a known one

Messages never hold prompts, answers, keys or tokens. `hint` says in one line what to do next.
"""

__all__ = [
    "ChannelBroken",
    "ClockSkew",
    "CloisterError",
    "Conflict",
    "ConnectionFailed",
    "ContextLengthExceeded",
    "EngineDied",
    "EngineLoading",
    "HostFull",
    "KeyUnknown",
    "Malformed",
    "MalformedApp",
    "MalformedEvidence",
    "MalformedImage",
    "MalformedMessage",
    "MalformedModel",
    "MalformedPolicy",
    "NotFound",
    "NotTrusted",
    "PlaintextRefused",
    "QueueFull",
    "Replayed",
    "TruncatedResponse",
    "Unauthorized",
    "Unreachable",
    "VerificationFailed",
    "WrongUse",
]


class CloisterError(Exception):
    """Base of all. `step` names what was being done; `expected` and `got` are short, printable, never secret."""

    exit_code = 1

    def __init__(
        self, message: str, *, hint: str = "", step: str = "", expected: str | None = None, got: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.step = step
        self.expected = expected
        self.got = got


class Malformed(CloisterError):
    exit_code = 4


class MalformedApp(Malformed):
    pass


class MalformedEvidence(Malformed):
    pass


class MalformedImage(Malformed):
    pass


class MalformedMessage(Malformed):
    pass


class MalformedPolicy(Malformed):
    pass


class MalformedModel(Malformed):
    pass


class NotTrusted(CloisterError):
    exit_code = 3


class VerificationFailed(NotTrusted):
    """`factors` holds every step's outcome (`cloister.verify.factors.Factor`), failed ones among them."""

    def __init__(self, message: str, *, factors: tuple[object, ...] = (), hint: str = "", step: str = "") -> None:
        super().__init__(message, hint=hint, step=step)
        self.factors = factors


class ChannelBroken(NotTrusted):
    pass


class KeyUnknown(ChannelBroken):
    pass


class Replayed(ChannelBroken):
    pass


class ClockSkew(Replayed):
    pass


class TruncatedResponse(ChannelBroken):
    pass


class PlaintextRefused(ChannelBroken):
    pass


class Unreachable(CloisterError):
    exit_code = 5


class ConnectionFailed(Unreachable):
    pass


class EngineDied(Unreachable):
    pass


class EngineLoading(Unreachable):
    """`progress` is the loaded share of the model, 0 to 1."""

    def __init__(self, message: str, *, progress: float = 0.0, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.progress = progress


class HostFull(Unreachable):
    pass


class QueueFull(Unreachable):
    """`retry_after` in whole seconds."""

    def __init__(self, message: str, *, retry_after: int = 1, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class WrongUse(CloisterError):
    exit_code = 2


class Conflict(WrongUse):
    pass


class ContextLengthExceeded(WrongUse):
    """`limit` and `requested` count tokens; `requested` = prompt + room asked for the answer."""

    def __init__(self, *, limit: int, prompt: int, requested: int) -> None:
        super().__init__(
            f"This model's context is {limit} tokens; the prompt has {prompt} and the answer was given room for "
            f"{requested - prompt}.",
            hint="Shorten the prompt, lower max_tokens, or serve the model with a larger --context.",
            expected=str(limit),
            got=str(requested),
        )
        self.limit = limit
        self.prompt = prompt
        self.requested = requested


class NotFound(WrongUse):
    pass


class Unauthorized(WrongUse):
    pass
