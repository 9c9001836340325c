"""Checkpoint and tokenizer -> GGUF, in f16 or q8_0, without llama.cpp.

    python export.py tiny|demo DIR OUT.gguf f16|q8_0

Matrices take the wanted type (the ``gguf`` package's own quantizer), norms stay f32, the output is the tied embedding.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType
from model import SHAPES
from tokenizer import END, START, TEXT_END

TEMPLATE = (
    "{% for message in messages %}"
    "{% set role = 'system' if message['role'] == 'developer' else message['role'] %}"
    "{{ '<|im_start|>' + role + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TYPES = {"f16": (Type.F16, LlamaFileType.MOSTLY_F16), "q8_0": (Type.Q8_0, LlamaFileType.MOSTLY_Q8_0)}


def describe(writer: gguf.GGUFWriter, name: str, kind: str, parameters: int) -> None:
    shape = SHAPES[name]
    writer.add_name(f"cloister {name}")
    writer.add_author("The cloister authors")
    writer.add_license("apache-2.0")
    writer.add_description("A toy chat model trained only on text that the cloister project wrote or generated")
    writer.add_size_label(f"{parameters / 1e6:.1f}M" if parameters > 1e6 else f"{parameters // 1000}K")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_vocab_size(shape.vocab)
    writer.add_file_type(TYPES[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_chat_template(TEMPLATE)


def add_tokenizer(writer: gguf.GGUFWriter, path: Path) -> None:
    model = json.loads(path.read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    control = {TEXT_END, START, END}
    types = [gguf.TokenType.CONTROL if t in control else gguf.TokenType.NORMAL for t in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([int(t) for t in types])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    writer.add_bos_token_id(tokens.index(TEXT_END))
    writer.add_eos_token_id(tokens.index(END))
    writer.add_eot_token_id(tokens.index(END))
    writer.add_pad_token_id(tokens.index(TEXT_END))
    writer.add_add_bos_token(True)  # noqa: FBT003


def add_tensors(writer: gguf.GGUFWriter, weights: dict[str, np.ndarray], kind: Type) -> None:
    for key, value in weights.items():
        if value.ndim == 1:
            writer.add_tensor(key, value)
        else:
            writer.add_tensor(key, gguf.quants.quantize(value, kind), raw_dtype=kind)


def main() -> None:
    name, folder, out, kind = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    state = torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")["model"]
    weights = {k: np.ascontiguousarray(v.float().numpy()) for k, v in state.items()}
    writer = gguf.GGUFWriter(out, "llama")
    describe(writer, name, kind, sum(v.size for v in weights.values()))
    add_tokenizer(writer, folder / "tokenizer.json")
    add_tensors(writer, weights, TYPES[kind][0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(out, out.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
