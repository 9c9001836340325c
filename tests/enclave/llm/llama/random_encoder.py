"""An encoder of our own making: BERT's architecture, random weights, letters as words; and the same in numpy."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CLS, SEP = 2, 3
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = (*SPECIAL, *("\u2581" + letter for letter in LETTERS), *LETTERS)
WIDTH, HEADS, LAYERS, EPSILON = 32, 4, 2, 1e-12


def words(text: str) -> list[int]:
    """The tokens of a text of letters and blanks, with those around it."""
    found = [VOCABULARY.index("\u2581" * (at == 0) + letter) for word in text.split() for at, letter in enumerate(word)]
    return [CLS, *found, SEP]


def random_weights(context: int) -> dict[str, Array]:
    rng = np.random.default_rng(11)

    def noise(*shape: int, scale: float = 1.0) -> Array:
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)

    def norm(name: str) -> dict[str, Array]:
        return {f"{name}.weight": 1 + noise(WIDTH, scale=0.1), f"{name}.bias": noise(WIDTH, scale=0.1)}

    def linear(name: str, rows: int, columns: int) -> dict[str, Array]:
        return {f"{name}.weight": noise(rows, columns, scale=columns**-0.5), f"{name}.bias": noise(rows, scale=0.1)}

    found = {
        "token_embd.weight": noise(len(VOCABULARY), WIDTH),
        "token_types.weight": noise(2, WIDTH),
        "position_embd.weight": noise(context, WIDTH),
        **norm("token_embd_norm"),
    }
    for at in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            found |= linear(f"blk.{at}.{name}", WIDTH, WIDTH)
        found |= linear(f"blk.{at}.ffn_up", 4 * WIDTH, WIDTH) | linear(f"blk.{at}.ffn_down", WIDTH, 4 * WIDTH)
        found |= norm(f"blk.{at}.attn_output_norm") | norm(f"blk.{at}.layer_output_norm")
    return found


def write_encoder(
    path: Path, *, pooling: gguf.PoolingType | None = gguf.PoolingType.MEAN, context: int = 64
) -> dict[str, Array]:
    """Writes the model; its weights."""
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_name("encoder")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(LAYERS)
    writer.add_context_length(context)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(4 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(EPSILON)
    writer.add_causal_attention(False)  # noqa: FBT003
    if pooling is not None:
        writer.add_pooling_type(pooling)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_token_type_count(2)
    writer.add_tokenizer_model("bert")
    writer.add_token_list(list(VOCABULARY))
    kinds = [gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * 2 * len(LETTERS)
    writer.add_token_types(kinds)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(1)
    writer.add_bos_token_id(CLS)
    writer.add_sep_token_id(SEP)
    writer.add_mask_token_id(4)
    weights = random_weights(context)
    for name, values in weights.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def encoded(weights: Mapping[str, Array], tokens: Sequence[int]) -> Array:
    """What BERT makes of tokens: the mean of its last states, of length 1."""

    def linear(name: str, x: Array) -> Array:
        return np.asarray(x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"])

    def norm(name: str, x: Array) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON)
        return np.asarray(scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"])

    def heads(x: Array) -> Array:
        return x.reshape(len(tokens), HEADS, -1).transpose(1, 0, 2)

    x = weights["token_embd.weight"][list(tokens)] + weights["token_types.weight"][0]
    x = norm("token_embd_norm", x + weights["position_embd.weight"][: len(tokens)])
    for at in range(LAYERS):
        q, k, v = (heads(linear(f"blk.{at}.attn_{name}", x)) for name in "qkv")
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(WIDTH // HEADS)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (shares / shares.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(len(tokens), WIDTH)
        x = norm(f"blk.{at}.attn_output_norm", x + linear(f"blk.{at}.attn_output", mixed))
        up = linear(f"blk.{at}.ffn_up", x)
        bent = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        x = norm(f"blk.{at}.layer_output_norm", x + linear(f"blk.{at}.ffn_down", bent))
    mean = x.mean(0)
    return np.asarray(mean / np.linalg.norm(mean))
