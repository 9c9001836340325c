"""The app inside the enclave without the seal: plain HTTP on loopback, to measure the seal against. Nothing serves this.

Run as `python -m cloister.bench.plain MODEL SLOTS CONTEXT`; `ready`, then each line of standard input is answered by
the port, as JSON. It ends with its standard input.
"""

import asyncio
import sys
from pathlib import Path

import uvloop

from cloister.bench.process import answer_lines, server
from cloister.enclave.hardening import lower_priority
from cloister.enclave.llm.api import ApiConfig, create_api
from cloister.enclave.llm.llama import LlamaConfig, LlamaEngine, LoopSettings
from cloister.host.process import listen

__all__ = ["main"]


def main() -> None:
    slots, context = int(sys.argv[2]), int(sys.argv[3])
    engine = LlamaEngine(LlamaConfig(Path(sys.argv[1]), "default", loop=LoopSettings(slots=slots, context=context)))
    lower_priority()  # as the enclave's front does, after the engine's thread was made
    uvloop.run(_serve(engine))


async def _serve(engine: LlamaEngine) -> None:
    serving = server(create_api(engine, ApiConfig(require_keys=False)))
    with listen("127.0.0.1", 0) as sock:
        await engine.start()
        running = asyncio.create_task(serving.serve(sockets=[sock]))
        try:
            await answer_lines(lambda: sock.getsockname()[1])
        finally:
            serving.should_exit = True
            await engine.close()
            await running


if __name__ == "__main__":
    main()
