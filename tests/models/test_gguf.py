import io
import struct
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
from tests.models.header import ARRAY, PAIRS, TENSORS, TEXT, U32, Header, array, pair, text, u32

from cloister.errors import MalformedModel, WrongUse
from cloister.models.gguf import Description, Tensor, describe, read_description
from cloister.models.store import embedded_path


def read(content: bytes) -> Description:
    return describe(io.BytesIO(content), len(content))


def changed(**values: tuple[int, bytes] | None) -> Header:
    """The pairs with some replaced, or left out where None; `__` in a name stands for a dot."""
    named = {name.replace("__", "."): value for name, value in values.items()}
    return Header(pairs={key: value for key, value in {**PAIRS, **named}.items() if value is not None})


def test_describes_what_the_header_says() -> None:
    header = Header()
    start = len(header.encode())
    assert read(header.file()) == Description(
        architecture="llama",
        name="toy",
        licence="mit",
        quantization="Q8_0",
        chat_template="{{ messages }}\x1b[2J",
        context=512,
        vocabulary=3,
        width=64,
        feed_forward=96,
        heads=4,
        kv_heads=(2, 1),
        key_length=16,
        value_length=16,
        tensors=(
            Tensor("token_embd.weight", (64, 3), "Q8_0", start, 204),
            Tensor("norm.weight", (64,), "F32", start + 224, 256),
        ),
        file_size=start + 480,
    )


def test_counts_parameters_and_types() -> None:
    model = read(Header().file())
    assert (model.parameters, model.weights, model.quantized) == (256, 460, True)
    assert model.by_type() == {"F32": (1, 256), "Q8_0": (1, 204)}


@pytest.mark.parametrize("name", ["demo", "tiny"])
def test_agrees_with_the_gguf_package(name: str) -> None:
    model, reader = read_description(embedded_path(name)), gguf.GGUFReader(embedded_path(name))
    assert [(t.name, t.offset, t.size) for t in model.tensors] == [
        (t.name, int(t.data_offset), int(t.n_bytes)) for t in reader.tensors
    ]
    tokens = reader.get_field("tokenizer.ggml.tokens")
    assert tokens is not None
    assert model.vocabulary == len(tokens.data)


def test_falls_back_to_the_largest_type_and_to_heads_of_equal_width() -> None:
    model = read(changed(general__file_type=None, llama__attention__head_count_kv=None).file())
    assert (model.quantization, model.kv_heads) == ("F32", (4, 4))


def test_the_header_may_name_the_width_of_heads() -> None:
    model = read(changed(llama__attention__key_length=(U32, u32(40))).file())
    assert (model.key_length, model.value_length) == (40, 16)


def test_a_model_without_attention_has_no_cache() -> None:
    model = read(changed(llama__attention__head_count=None, llama__attention__head_count_kv=None).file())
    assert (model.heads, model.kv_heads, model.key_length) == (0, (0, 0), 0)


def test_refuses_a_file_cut_anywhere() -> None:
    content = Header().file()
    for length in range(len(content)):
        with pytest.raises(MalformedModel):
            read(content[:length])


def test_survives_every_byte_changed() -> None:
    """Each byte of the header in turn becomes 0, 255 and its neighbour: a description or MalformedModel, nothing else."""
    content, refused = bytearray(Header().file()), 0
    for at in range(len(Header().encode())):
        before = content[at]
        for value in (0, 255, before ^ 1):
            content[at] = value
            try:
                read(bytes(content))
            except MalformedModel:
                refused += 1
        content[at] = before
    assert refused > 500


HUGE = (1 << 64) - 1
COUNT = struct.pack("<Q", HUGE)


@pytest.mark.parametrize(
    "header",
    [
        Header(magic=b"GGML"),
        Header(version=1),
        Header(version=4),
        Header(version=3 << 24),
        Header(pair_count=HUGE),
        Header(pair_count=1 << 14),
        Header(tensor_count=HUGE),
        Header(tensor_count=len(TENSORS) + 1),
        Header(pair_count=len(PAIRS) + 1, repeated=pair("general.name", TEXT, text("twice"))),
        Header(pair_count=len(PAIRS) + 1, repeated=pair("x", 13, b"")),
        Header(pair_count=len(PAIRS) + 1, repeated=pair("x", TEXT, COUNT)),
        Header(pair_count=len(PAIRS) + 1, repeated=pair("x", ARRAY, array(U32, [], HUGE))),
        Header(pair_count=len(PAIRS) + 1, repeated=pair("x", ARRAY, array(TEXT, [], 1 << 22))),
        Header(pair_count=len(PAIRS) + 1, repeated=pair("x", ARRAY, array(TEXT, [COUNT]))),
        Header(pair_count=len(PAIRS) + 1, repeated=pair("x", ARRAY, array(ARRAY, [array(U32, [])]))),
        Header(pair_count=len(PAIRS) + 1, repeated=COUNT),
        changed(general__architecture=None),
        changed(general__architecture=(U32, u32(1))),
        changed(general__name=(U32, u32(1))),
        changed(general__alignment=(U32, u32(0))),
        changed(general__alignment=(U32, u32(33))),
        changed(general__alignment=(TEXT, text("32"))),
        changed(llama__block_count=(U32, u32(3))),  # two numbers of key-value heads
        changed(llama__block_count=(U32, u32(HUGE >> 32))),
        changed(llama__block_count=(10, struct.pack("<Q", HUGE))),
        changed(llama__context_length=(5, struct.pack("<i", -1))),
        changed(llama__context_length=(7, b"\1")),
        changed(llama__embedding_length=(6, struct.pack("<f", float("nan")))),
        changed(llama__attention__head_count_kv=(ARRAY, array(TEXT, [text("2"), text("1")]))),
        changed(llama__attention__head_count_kv=(TEXT, text("2"))),
        changed(tokenizer__ggml__tokens=(TEXT, text("a"))),
        changed(tokenizer__chat_template=(ARRAY, array(U32, []))),
        Header(tensors=[("a", (64,), 0, 0), ("a", (64,), 0, 256)]),
        Header(tensors=[("a", (64,), 0, 32)]),
        Header(tensors=[("a", (64,), 0, 0), ("b", (64,), 0, 0)]),
        Header(tensors=[("a" * 64, (64,), 0, 0)]),
        Header(tensors=[("a", (64,), 99, 0)]),
        Header(tensors=[("a", (4,), 4, 0)]),  # a type that was withdrawn
        Header(tensors=[("a", (33,), 8, 0)]),
        Header(tensors=[("a", (0,), 0, 0)]),
        Header(tensors=[("a", (1 << 32, 1 << 32), 0, 0)]),
        Header(tensors=[("a", (HUGE, HUGE, HUGE, HUGE), 0, 0)]),
        Header(tensors=[("a", (1, 1, 1, 1, 1), 0, 0)]),
        Header(tensors=[("a", (1 << 20,), 0, 0)]),
    ],
)
def test_refuses_a_header_that_does_not_hold(header: Header) -> None:
    read(replace(Header(), magic=b"GGUF").file())
    with pytest.raises(MalformedModel):
        read(header.file())


def test_texts_in_arrays_are_limited_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a sparse file they cost their maker nothing."""
    monkeypatch.setattr("cloister.models.gguf._MAX_TEXTS", 100)
    tokens = "tokenizer__ggml__tokens"
    assert read(changed(**{tokens: (ARRAY, array(TEXT, [text("")] * 100))}).file()).vocabulary == 100
    with pytest.raises(MalformedModel, match="announces 101"):
        read(changed(**{tokens: (ARRAY, array(TEXT, [text("")] * 101))}).file())


def test_a_file_that_cannot_be_read_is_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(WrongUse):
        read_description(tmp_path / "missing.gguf")
