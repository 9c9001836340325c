"""An engine in a child process, and what comes back from it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from cloister.enclave.llm.engine import Delta, Done, Event, GenerateRequest, Prompt, Sampling, Started
from cloister.enclave.llm.llama import LlamaConfig, LlamaEngine, LoopSettings


@asynccontextmanager
async def serve(path: Path, **options: Any) -> AsyncIterator[LlamaEngine]:
    """An engine in a child process, started, and closed at the end. Loop settings may be given by name."""
    loop = {name: options.pop(name) for name in LoopSettings.__dataclass_fields__ if name in options}
    engine = LlamaEngine(LlamaConfig(model=path, loop=LoopSettings(**{"slots": 16, **loop}), **options))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def ask(text: str, **sampling: Any) -> GenerateRequest:
    """A plain completion, greedy unless said otherwise, and never ended by the random model's own wish."""
    scope, cut = sampling.pop("scope", None), sampling.pop("truncate_prompt", False)
    fields = {"max_tokens": 16, "temperature": 0.0, "ignore_eos": True, **sampling}
    return GenerateRequest(Prompt(text=text), Sampling(**fields), scope=scope, truncate_prompt=cut)


class Answer:
    """All that came back for one request."""

    def __init__(self, events: list[Event]) -> None:
        self.events = events
        self.deltas = [e for e in events if isinstance(e, Delta)]
        self.text = "".join(d.text for d in self.deltas)
        assert isinstance(events[0], Started)
        assert isinstance(events[-1], Done)
        self.started = events[0]
        self.done = events[-1]


async def answer(engine: LlamaEngine, request: GenerateRequest) -> Answer:
    return Answer([event async for event in engine.generate(request)])
