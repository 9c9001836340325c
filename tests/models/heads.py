"""A model for its attention's sizes: llama architecture, two layers, 64 wide, four heads, two of them with keys and
values."""

from pathlib import Path

import gguf
import numpy as np
from tests.enclave.llm.llama.random_model import byte_alphabet

LAYERS, WIDTH, HEADS, KV_HEADS = 2, 64, 4, 2


def write_heads(path: Path, length: int, *, context: int = 256) -> Path:
    """`length`: numbers per head. The file says it only where it is not the model's width divided by its heads."""
    rng = np.random.default_rng(7)
    tokens = byte_alphabet()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(context)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    if length * HEADS != WIDTH:
        writer.add_key_length(length)
        writer.add_value_length(length)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(length)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(0)
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    for at in range(LAYERS):
        shapes |= {f"blk.{at}.{name}": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{at}.{name}": (WIDTH, WIDTH) for name in ("ffn_gate", "ffn_up", "ffn_down")}
        shapes |= {f"blk.{at}.attn_{name}": (KV_HEADS * length, WIDTH) for name in ("k", "v")}
        shapes |= {f"blk.{at}.attn_q": (HEADS * length, WIDTH), f"blk.{at}.attn_output": (WIDTH, HEADS * length)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
