"""How fast models of different kinds and sizes run on this machine: the decode loop bare, by number of streams."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cloister.bench.child import Child, module, start_child
from cloister.bench.load import PROMPT_TOKENS
from cloister.bench.shapes import SHAPES, TYPES, describe, write_random
from cloister.bench.timed import SLACK, Timing
from cloister.enclave.llm.llama.model import PART
from cloister.errors import CloisterError, WrongUse
from cloister.models.gguf import Description, read_description
from cloister.models.memory import available_memory, estimate, kv_bytes

__all__ = [
    "DEFAULT",
    "FULL",
    "Plan",
    "Result",
    "Subject",
    "Watch",
    "choose_context",
    "choose_type",
    "measure",
    "needed_memory",
    "parse_subject",
]

DEFAULT = ("pythia-1b", "mpt-7b", "falcon-7b", "pythia-12b")
"""The smaller ones of the original's table."""
FULL = (*DEFAULT, "gpt-neox-20b", "mpt-30b", "falcon-40b")
_PREFERRED = ("q8_0", "q4_0")


@dataclass(frozen=True, slots=True)
class Subject:
    """One model to measure. `path`: a real one's file; None: the shape called `name`, with random weights of `type`, ""
    being the finest of q8_0 and q4_0 that memory allows."""

    name: str
    path: Path | None = None
    type: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """How to measure: the same for all subjects. `tokens`: of each stream, while all run. `seconds`: for everything."""

    streams: tuple[int, ...]
    tokens: int
    seconds: float
    folder: Path
    keep: bool = False

    @property
    def slots(self) -> int:
        return max(self.streams)

    @property
    def context(self) -> int:
        """The least that a stream takes."""
        return PROMPT_TOKENS + self.tokens + SLACK * self.slots

    @property
    def roomy(self) -> int:
        """A context in whole parts of the cache: with it every stream gets one, as the engine serves where memory allows it."""
        return -(-self.context // PART) * PART


@dataclass(frozen=True, slots=True)
class Result:
    """What was found for one subject; `missing` says why something was not, "" when nothing is missing.

    `size`: bytes of the file. `resident`: bytes of the whole process after the last run. `random`: the weights were.
    """

    name: str
    random: bool
    quantization: str = ""
    architecture: str = ""
    parameters: int = 0
    size: int = 0
    resident: int = 0
    timings: tuple[Timing, ...] = ()
    missing: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Watch:
    """Who wants to know how far it is. `doing`: the subject's name and what is done. `ran`: one more run is over."""

    doing: Callable[[str, str], None] = lambda _name, _what: None
    ran: Callable[[], None] = lambda: None


def parse_subject(text: str) -> Subject | None:
    """A shape, as in `pythia-1b` or `pythia-1b:q4_0`; None when there is none of that name.

    Raises: WrongUse when there is no such type.
    """
    name, _, kind = text.partition(":")
    if name not in SHAPES:
        return None
    if kind and kind not in TYPES:
        raise WrongUse("There are no random weights of this type.", expected=", ".join(TYPES), got=kind[:40])
    return Subject(name, type=kind)


def measure(subjects: Sequence[Subject], plan: Plan, watch: Watch) -> Iterator[Result]:
    """One result for each, in their order. What is wrong with one model is told in its result and stops no other.

    A run that has begun is ended even when time is up; no other begins then.
    """
    deadline = time.monotonic() + plan.seconds
    for subject in subjects:
        try:
            yield _measure_one(subject, plan, deadline, watch)
        except CloisterError as error:
            yield Result(subject.name, subject.path is None, subject.type, missing=error.message)


def _measure_one(subject: Subject, plan: Plan, deadline: float, watch: Watch) -> Result:
    if time.monotonic() >= deadline:
        raise WrongUse(_time_is_up(plan))
    with _file_of(subject, plan, watch) as path:
        model = read_description(path)
        found = Result(subject.name, subject.path is None, model.quantization.lower(), size=path.stat().st_size)
        watch.doing(subject.name, "loading")
        context = choose_context(model, plan, available_memory())
        with start_child(module("cloister.bench.timed", path, plan.slots, context), engine=True) as child:
            return _run_all(child, found, plan, deadline, watch)


def _run_all(child: Child, found: Result, plan: Plan, deadline: float, watch: Watch) -> Result:
    while "ready" not in (message := child.hear()):
        watch.doing(found.name, f"loading {message['loaded']:.0%}")
    found = replace(found, **message["ready"])
    try:
        _ask(child, 1, 2)  # the first run finds everything cold
        for streams in plan.streams:
            if time.monotonic() >= deadline:
                return replace(found, missing=_time_is_up(plan))
            watch.doing(found.name, f"{streams} stream{'s' * (streams > 1)}")
            message = _ask(child, streams, plan.tokens)
            timing = Timing(**message["timing"])
            found = replace(found, timings=(*found.timings, timing), resident=message["resident"])
            watch.ran()
    except CloisterError as error:
        return replace(found, missing=error.message)
    return found


def _ask(child: Child, streams: int, tokens: int) -> dict[str, Any]:
    return child.answer(f"{streams} {tokens} {PROMPT_TOKENS}")


def _time_is_up(plan: Plan) -> str:
    return f"the {plan.seconds / 60:g} minutes were over"


@contextmanager
def _file_of(subject: Subject, plan: Plan, watch: Watch) -> Iterator[Path]:
    """The model's file; one that had to be written for this is removed afterwards, unless it is to be kept."""
    if subject.path is not None:
        _check_memory(subject.path, plan)
        yield subject.path
        return
    kind = choose_type(subject, plan, available_memory())
    written: list[str] = []
    path = write_random(
        subject.name,
        plan.folder,
        note=written.append,
        type=kind,
        progress=lambda share: watch.doing(subject.name, f"writing {share:.0%}"),
    )
    try:
        yield path
    finally:
        if written and not plan.keep:
            path.unlink(missing_ok=True)


def choose_type(subject: Subject, plan: Plan, available: int) -> str:
    """The subject's own type, or the finest whose weights and cache fit `available` bytes.

    Raises: WrongUse when it does not, or none does.
    """
    kinds = (subject.type,) if subject.type else _PREFERRED
    for kind in kinds:
        needed = needed_memory(describe(SHAPES[subject.name], kind), plan)
        if needed <= available:
            return kind
    raise WrongUse(_too_large(f" at {kinds[-1]}", needed, available))


def needed_memory(model: Description, plan: Plan, context: int = 0) -> int:
    """Bytes that the measuring process takes once the model is loaded. `context` of each stream; 0: the plan's least."""
    context = context or plan.context
    found = estimate(model, context=context, streams=plan.slots)
    return found.weights + found.buffers + kv_bytes(model, plan.slots * context)


def choose_context(model: Description, plan: Plan, available: int) -> int:
    """Tokens of each stream: roomy where `available` bytes allow it."""
    return plan.roomy if needed_memory(model, plan, plan.roomy) <= available else plan.context


def _check_memory(path: Path, plan: Plan) -> None:
    needed, available = needed_memory(read_description(path), plan), available_memory()
    if needed > available:
        raise WrongUse(_too_large("", needed, available))


def _too_large(kind: str, needed: int, available: int) -> str:
    return f"needs {needed / 1e9:.1f} GB of memory{kind}; {available / 1e9:.1f} GB are free"
