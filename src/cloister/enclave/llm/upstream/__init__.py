"""Another server as the engine: any OpenAI-compatible one on this machine's loopback (vLLM, SGLang, llama-server).

`engine` is what the API talks to; `prompts` makes tokens of messages, with the model's own chat template, in here; of the
upstream only `/v1/completions` (and `/v1/embeddings`) is asked to compute. `flavours` knows how each kind wants it said,
`completions` reads what comes back, `exchange` carries the bytes.
"""

from cloister.enclave.llm.upstream.address import Address, model_digest, parse_address
from cloister.enclave.llm.upstream.engine import UpstreamConfig, UpstreamEngine, find_model

__all__ = ["Address", "UpstreamConfig", "UpstreamEngine", "find_model", "model_digest", "parse_address"]
