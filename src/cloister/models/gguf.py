"""What a GGUF file says of itself, from its header alone, without believing any of it.

The format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, as llama.cpp reads it: little-endian, version 2
or 3, no array in an array, tensors one after the other in the order of their names in the header. Every count is held
against a limit and against the file's size before anything is allocated for it.
"""

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NoReturn, TypeAlias, TypeGuard

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from cloister.errors import MalformedModel, WrongUse

__all__ = ["FULL_PRECISION", "Description", "Tensor", "describe", "read_description"]

FULL_PRECISION = frozenset({"F32", "F16", "BF16"})
"""Tensor types that were not quantized."""

_MAX_HEADER = 1 << 27
_MAX_PAIRS = 1 << 14
_MAX_TENSORS = 1 << 17
_MAX_TEXTS = 1 << 21  # in all arrays together: the largest vocabularies have 256k tokens and twice as many merges
_MAX_KEY = (1 << 16) - 1
_MAX_STRING = 1 << 24
_MAX_NAME = 63
_MAX_DIMENSIONS = 4
_MAX_LAYERS = 4096
_KEPT = 4096
"""An array up to so many numbers is kept: it may hold one for each layer. Of a longer one the length is all we want."""

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_TYPES = {kind.value: (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType if kind in GGML_QUANT_SIZES}
_FILE_TYPES = {kind.value: kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in LlamaFileType}


@dataclass(frozen=True, slots=True)
class Tensor:
    """`shape`: as llama.cpp writes it, the row's length first. `type`: `Q8_0`. `offset` in the file and `size` in
    bytes."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    size: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """One model file. Text is the file's own and may hold anything; "" and 0 stand for what it does not say.

    `quantization`: as the file names it (`Q4_K_M`), else the type that takes the most bytes. `context`: tokens it was
    trained for. `kv_heads`: one number for each layer. `key_length`, `value_length`: numbers per head. `file_size` in
    bytes.
    """

    architecture: str
    name: str
    licence: str
    quantization: str
    chat_template: str | None
    context: int
    vocabulary: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: tuple[int, ...]
    key_length: int
    value_length: int
    tensors: tuple[Tensor, ...]
    file_size: int

    @property
    def parameters(self) -> int:
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def weights(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors)

    @property
    def quantized(self) -> bool:
        return any(tensor.type not in FULL_PRECISION for tensor in self.tensors)

    def by_type(self) -> dict[str, tuple[int, int]]:
        """Tensor type -> (how many tensors, their bytes), the most bytes first."""
        found: dict[str, tuple[int, int]] = {}
        for tensor in self.tensors:
            count, size = found.get(tensor.type, (0, 0))
            found[tensor.type] = count + 1, size + tensor.size
        return dict(sorted(found.items(), key=lambda item: (-item[1][1], item[0])))


def read_description(path: Path) -> Description:
    """Describe the file at `path`. Reads its header and not its weights: whether those are sound is not looked at.

    Raises: MalformedModel, WrongUse (it cannot be read).
    """
    try:
        with path.open("rb") as file:
            return describe(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise WrongUse(f"{path} cannot be read: {error.strerror or error}.") from error


def describe(file: BinaryIO, size: int) -> Description:
    """Describe the model in `file`, a seekable stream at its beginning of `size` bytes. Raises: MalformedModel."""
    source = _Source(file, size)
    if source.take(4) != b"GGUF":
        _refuse("It does not begin with GGUF.", "This is no model file, or not a whole one.")
    version = source.number("<I")
    if version not in (2, 3):
        _refuse(f"It is of version {version & 0xFFFF or version >> 16}, or big-endian.", "Convert the model again.")
    tensor_count, pair_count = source.count("<Q", _MAX_TENSORS, "tensors"), source.count("<Q", _MAX_PAIRS, "keys")
    facts = _Facts(_read_pairs(source, pair_count))
    alignment = facts.whole("general.alignment", 32)
    if alignment < 1 or alignment & (alignment - 1):
        _refuse("Its alignment is no power of two.")
    return _assemble(facts, _read_tensors(source, tensor_count, alignment), size)


def _refuse(what: str, hint: str = "The file may be damaged, or made to do damage.") -> NoReturn:
    raise MalformedModel(f"The model file cannot be described. {what}", hint=hint, step="gguf")


def _refuse_end() -> NoReturn:
    _refuse("It ends in the midst of its header, or the header is too long.")


class _Source:
    """The header's bytes in order; never beyond its limit or the file's end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = min(size, _MAX_HEADER)
        self._texts = _MAX_TEXTS
        self.size = size
        self.position = 0

    def take(self, count: int) -> bytes:
        data = self._file.read(count) if count <= self._left else b""
        if len(data) != count:
            _refuse_end()
        self._left -= count
        self.position += count
        return data

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def count(self, form: str, most: int, what: str) -> int:
        value = self.number(form)
        if value > most:
            _refuse(f"It announces {value} {what}; {most} are the most.")
        return value

    def text(self, most: int, what: str) -> str:
        return self.take(self.count("<Q", most, f"bytes of {what}")).decode("utf-8", "replace")

    def value(self, kind: int) -> "_Value":
        if kind in _SCALARS:
            form = _SCALARS[kind]
            number: int | float | bool = struct.unpack(form, self.take(struct.calcsize(form)))[0]
            return number
        if kind == _STRING:
            return self.text(_MAX_STRING, "text")
        if kind == _ARRAY:
            return self._array()
        _refuse(f"A value has the unknown type {kind}.")

    def _array(self) -> "_Array":
        kind = self.number("<I")
        count = self.count("<Q", self._texts if kind == _STRING else _MAX_HEADER, "entries of an array")
        if kind == _STRING:
            self._texts -= count
            self._skip_texts(count)
            return _Array(count)
        if kind not in _SCALARS:
            _refuse(f"An array has entries of type {kind}.")
        form = _SCALARS[kind]
        data = self.take(count * struct.calcsize(form))
        return _Array(count, struct.unpack(f"<{count}{form[1]}", data) if count <= _KEPT else ())

    def _skip_texts(self, count: int) -> None:
        """There may be a million of them, so without a call for each."""
        read, left = self._file.read, self._left
        for _ in range(count):
            head = read(8)
            length = int.from_bytes(head, "little")
            left -= 8 + length
            if left < 0 or len(head) != 8 or len(read(length)) != length:
                _refuse_end()
        self.position += self._left - left
        self._left = left


@dataclass(frozen=True, slots=True)
class _Array:
    """`values` is empty where they are text or too many."""

    count: int
    values: tuple[int | float | bool, ...] = ()


_Value: TypeAlias = int | float | bool | str | _Array


def _read_pairs(source: _Source, count: int) -> dict[str, _Value]:
    found: dict[str, _Value] = {}
    for _ in range(count):
        key = source.text(_MAX_KEY, "a key")
        if key in found:
            _refuse("A key stands there twice.")
        found[key] = source.value(source.number("<I"))
    return found


def _read_tensors(source: _Source, count: int, alignment: int) -> tuple[Tensor, ...]:
    found: dict[str, Tensor] = {}
    end = 0
    for _ in range(count):
        tensor = _read_tensor(source)
        if tensor.name in found:
            _refuse("Two tensors have one name.")
        if tensor.offset != end:
            _refuse("Its tensors do not lie one after the other.")
        found[tensor.name] = tensor
        end = _align(tensor.offset + tensor.size, alignment)
    start = _align(source.position, alignment)
    placed = tuple(Tensor(t.name, t.shape, t.type, start + t.offset, t.size) for t in found.values())
    if placed and placed[-1].offset + placed[-1].size > source.size:
        _refuse("It is shorter than its tensors.", "This is not the whole file: fetch it again.")
    return placed


def _read_tensor(source: _Source) -> Tensor:
    """`offset` as it stands there: from the end of the header."""
    name = source.text(_MAX_NAME, "a tensor's name")
    dimensions = source.count("<I", _MAX_DIMENSIONS, "dimensions of a tensor")
    shape = tuple(source.number("<Q") for _ in range(dimensions))
    kind, offset = source.number("<I"), source.number("<Q")
    if kind not in _TYPES:
        _refuse(f"A tensor has the unknown type {kind}.", "It may be newer than this release of cloister.")
    type_name, block, block_size = _TYPES[kind]
    elements = math.prod(shape)
    if not 0 < elements < 1 << 60:
        _refuse("A tensor has no possible size.")
    if (shape or (1,))[0] % block:
        _refuse("A tensor's rows are no whole blocks of its type.")
    return Tensor(name, shape, type_name, offset, elements // block * block_size)


def _align(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


class _Facts:
    """The header's pairs by key and kind. What has another kind than the key's refuses the file."""

    def __init__(self, pairs: Mapping[str, _Value]) -> None:
        self._pairs = pairs

    def text(self, key: str) -> str:
        value = self._pairs.get(key, "")
        return value if isinstance(value, str) else _refuse_kind(key)

    def whole(self, key: str, default: int = 0) -> int:
        value = self._pairs.get(key, default)
        return value if _is_whole(value) else _refuse_kind(key)

    def per_layer(self, key: str, layers: int, default: tuple[int, ...]) -> tuple[int, ...]:
        """One number for all layers, or an array with one for each."""
        value = self._pairs.get(key)
        if value is None:
            return default
        if isinstance(value, _Array):
            numbers = tuple(number for number in value.values if _is_whole(number))
            return numbers if len(numbers) == value.count == layers else _refuse_kind(key)
        return (value,) * layers if _is_whole(value) else _refuse_kind(key)

    def length(self, key: str) -> int:
        value = self._pairs.get(key, _Array(0))
        return value.count if isinstance(value, _Array) else _refuse_kind(key)

    def has(self, key: str) -> bool:
        return key in self._pairs


def _is_whole(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 1 << 31


def _refuse_kind(key: str) -> NoReturn:
    _refuse(f"Its {key!a:.80} is not what the format says.")


def _assemble(facts: _Facts, tensors: tuple[Tensor, ...], size: int) -> Description:
    architecture = facts.text("general.architecture")
    if not architecture:
        _refuse("It names no architecture.", "It may hold something else than a language model.")
    layers = facts.whole(f"{architecture}.block_count")
    if layers > _MAX_LAYERS:
        _refuse(f"It announces {layers} layers; {_MAX_LAYERS} are the most.")
    width = facts.whole(f"{architecture}.embedding_length")
    heads = facts.per_layer(f"{architecture}.attention.head_count", layers, (0,) * layers)
    per_head = width // heads[0] if heads and heads[0] else 0
    template = "tokenizer.chat_template"
    description = Description(
        architecture=architecture,
        name=facts.text("general.name"),
        licence=facts.text("general.license"),
        quantization=_FILE_TYPES.get(facts.whole("general.file_type", 1024), ""),
        chat_template=facts.text(template) if facts.has(template) else None,
        context=facts.whole(f"{architecture}.context_length"),
        vocabulary=facts.length("tokenizer.ggml.tokens") or facts.whole(f"{architecture}.vocab_size"),
        width=width,
        feed_forward=max(facts.per_layer(f"{architecture}.feed_forward_length", layers, (0,)), default=0),
        heads=max(heads, default=0),
        kv_heads=facts.per_layer(f"{architecture}.attention.head_count_kv", layers, heads),
        key_length=facts.whole(f"{architecture}.attention.key_length", per_head),
        value_length=facts.whole(f"{architecture}.attention.value_length", per_head),
        tensors=tensors,
        file_size=size,
    )
    if description.quantization in ("", "GUESSED"):
        return replace(description, quantization=next(iter(description.by_type()), ""))
    return description
