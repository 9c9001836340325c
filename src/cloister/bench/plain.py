"""The app inside the enclave without the seal: plain HTTP on loopback, to measure the seal against. Nothing serves this.

Run as `python -m cloister.bench.plain MODEL SLOTS CONTEXT`. It tells its port once it serves, and ends with its standard
input.
"""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import uvloop

from cloister.bench.child import run_child, tell
from cloister.enclave.hardening import lower_priority
from cloister.enclave.llm.api import ApiConfig, create_api
from cloister.enclave.llm.llama import LlamaConfig, LlamaEngine, LoopSettings
from cloister.enclave.pages import collapse
from cloister.enclave.serving import server
from cloister.host.process import listen

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    model, slots, context = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    engine = LlamaEngine(LlamaConfig(model, "default", loop=LoopSettings(slots=slots, context=context)))
    lower_priority()  # as the enclave's front does, after the engine's thread was made
    uvloop.run(_serve(engine))


async def _serve(engine: LlamaEngine) -> None:
    serving = server(create_api(engine, ApiConfig(require_keys=False)))
    with listen("127.0.0.1", 0) as sock:
        await engine.start()
        collapse()  # as the front does
        running = asyncio.create_task(serving.serve(sockets=[sock]))
        try:
            tell(port=sock.getsockname()[1])
            await asyncio.to_thread(sys.stdin.read)
        finally:
            serving.should_exit = True
            await engine.close()
            await running


if __name__ == "__main__":
    run_child(main)
