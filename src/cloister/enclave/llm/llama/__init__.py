"""llama.cpp as the engine: its C library in a child process (or a thread), driven by our own decode loop.

`front` is what the API talks to; `process` starts `child`, which runs `loop`; between them only `wire`'s messages.
"""

from cloister.enclave.llm.llama.config import LlamaConfig, LoopSettings
from cloister.enclave.llm.llama.front import LlamaEngine

__all__ = ["LlamaConfig", "LlamaEngine", "LoopSettings"]
