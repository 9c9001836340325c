"""Weights and tokenizer -> GGUF, in f16 or q8_0, without llama.cpp.

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
from calls import AFTER, BEFORE
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType
from model import SHAPES
from rows import END, START, TEXT_END

TEMPLATES = {
    "tiny": (
        "{% for message in messages %}"
        "{% set role = 'system' if message['role'] == 'developer' else message['role'] %}"
        "{{ '<|im_start|>' + role + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "demo": (
        "{% set first = messages[0] if messages and messages[0]['role'] in ['system', 'developer'] else none %}"
        "{% if tools %}"
        "{{ '<|im_start|>system\\n' }}{% if first and first['content'] %}{{ first['content'] + '\\n\\n' }}{% endif %}"
        "{{ BEFORE }}{% for tool in tools %}{{ '\\n' + (tool['function'] | tojson) }}{% endfor %}{{ AFTER }}"
        "{{ '<|im_end|>\\n' }}"
        "{% endif %}"
        "{% for message in messages %}"
        "{% if not (tools and loop.first and first) %}"
        "{% set role = 'system' if message['role'] == 'developer' else message['role'] %}"
        "{{ '<|im_start|>' + role + '\\n' }}"
        "{% if message['content'] %}{{ message['content'] }}{% endif %}"
        "{% for call in message['tool_calls'] or [] %}"
        "{% if message['content'] or not loop.first %}{{ '\\n' }}{% endif %}"
        "{{ '<tool_call>\\n{\"name\": ' + (call['function']['name'] | tojson) + ', \"arguments\": ' + (call['function']['arguments'] | tojson) + '}\\n</tool_call>' }}"
        "{% endfor %}"
        "{{ '<|im_end|>\\n' }}"
        "{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    .replace("BEFORE", repr(BEFORE))
    .replace("AFTER", repr(AFTER)),
}
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
    writer.add_chat_template(TEMPLATES[name])


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
    halves = [torch.load(path, weights_only=True, map_location="cpu") for path in sorted(folder.glob("weights-?.pt"))]
    state = {key: value for half in halves for key, value in half.items()}
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
