"""A small GGUF header, piece by piece, so that every piece can be wrong."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

TEXT, ARRAY, U32, F32 = 8, 9, 4, 6


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def array(kind: int, entries: Sequence[bytes], count: int | None = None) -> bytes:
    return struct.pack("<IQ", kind, len(entries) if count is None else count) + b"".join(entries)


def tensor(name: str, shape: Sequence[int], kind: int, offset: int) -> bytes:
    dimensions = b"".join(struct.pack("<Q", length) for length in shape)
    return text(name) + u32(len(shape)) + dimensions + struct.pack("<IQ", kind, offset)


PAIRS: Mapping[str, tuple[int, bytes]] = {
    "general.architecture": (TEXT, text("llama")),
    "general.name": (TEXT, text("toy")),
    "general.license": (TEXT, text("mit")),
    "general.file_type": (U32, u32(7)),
    "llama.block_count": (U32, u32(2)),
    "llama.context_length": (U32, u32(512)),
    "llama.embedding_length": (U32, u32(64)),
    "llama.feed_forward_length": (U32, u32(96)),
    "llama.attention.head_count": (U32, u32(4)),
    "llama.attention.head_count_kv": (ARRAY, array(U32, [u32(2), u32(1)])),
    "tokenizer.ggml.tokens": (ARRAY, array(TEXT, [text("a"), text("b"), text("")])),
    "tokenizer.chat_template": (TEXT, text("{{ messages }}\x1b[2J")),
}
TENSORS = (("token_embd.weight", (64, 3), 8, 0), ("norm.weight", (64,), 0, 224))  # 8: Q8_0, 0: F32
DATA = 224 + 256  # 64 * 3 / 32 blocks of 34 bytes, up to a multiple of 32; then 64 numbers


@dataclass(frozen=True)
class Header:
    magic: bytes = b"GGUF"
    version: int = 3
    pairs: Mapping[str, tuple[int, bytes]] = field(default_factory=lambda: PAIRS)
    tensors: Sequence[tuple[str, Sequence[int], int, int]] = TENSORS
    pair_count: int | None = None
    tensor_count: int | None = None
    repeated: bytes = b""

    def encode(self) -> bytes:
        """The header alone, padded to where the tensors begin."""
        pairs = len(self.pairs) if self.pair_count is None else self.pair_count
        tensors = len(self.tensors) if self.tensor_count is None else self.tensor_count
        head = self.magic + struct.pack("<IQQ", self.version, tensors, pairs)
        head += b"".join(pair(key, *value) for key, value in self.pairs.items()) + self.repeated
        head += b"".join(tensor(*entry) for entry in self.tensors)
        return head + bytes(-len(head) % 32)

    def file(self) -> bytes:
        return self.encode() + bytes(DATA)
