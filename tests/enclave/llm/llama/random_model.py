"""A model of our own making: llama architecture, random weights, byte-level vocabulary, ChatML. 0.1 s and 400 kB."""

from pathlib import Path

import gguf
import numpy as np

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
START, END = 256, 257
"""The token numbers of <|im_start|> and <|im_end|>."""


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each of the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


def write_model(
    path: Path,
    *,
    template: str | None = CHATML,
    context: int = 512,
    layers: int = 2,
    width: int = 64,
    pooling: gguf.PoolingType | None = None,
) -> Path:
    rng = np.random.default_rng(7)
    tokens = [*byte_alphabet(), "<|im_start|>", "<|im_end|>", "th", "<|pad|>"]
    kinds = (
        [gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL, gguf.TokenType.CONTROL]
    )
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(layers)
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // 4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(END)
    writer.add_add_bos_token(False)  # noqa: FBT003
    if template is not None:
        writer.add_chat_template(template)
    if pooling is not None:
        writer.add_pooling_type(pooling)

    def weight(name: str, rows: int, columns: int, scale: float = 1.0) -> None:
        noise = rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(scale * columns**-0.5)
        writer.add_tensor(name, noise)

    weight("token_embd.weight", len(tokens), width, 4.0)
    weight("output.weight", len(tokens), width, 6.0)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for at in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{at}.{name}.weight", np.ones(width, np.float32))
        weight(f"blk.{at}.attn_q.weight", width, width)
        weight(f"blk.{at}.attn_k.weight", width // 2, width)
        weight(f"blk.{at}.attn_v.weight", width // 2, width)
        weight(f"blk.{at}.attn_output.weight", width, width)
        weight(f"blk.{at}.ffn_gate.weight", 2 * width, width)
        weight(f"blk.{at}.ffn_up.weight", 2 * width, width)
        weight(f"blk.{at}.ffn_down.weight", width, 2 * width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
