import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.enclave.llm.llama.random_encoder import write_encoder
from tests.enclave.llm.llama.random_model import byte_alphabet

from cloister.enclave.llm.llama import LoopSettings
from cloister.enclave.llm.llama.model import Model
from cloister.enclave.llm.llama.vocabulary import longest_text

CONTROL, NORMAL, RSTRIP = 1 << 3, 1 << 2, 1 << 8
RAW = [f"<0x{byte:02X}>" for byte in range(256)]


def longest(kind: str, texts: list[str], attributes: dict[str, int] | None = None, blank: str = "Ġ") -> int | None:
    """Of a vocabulary that llama.cpp would describe so; `blank` is its token for a blank."""

    def describe(_model: Any, _key: bytes, buffer: Any, _size: int) -> int:
        buffer.value = kind.encode()
        return len(kind)

    library = SimpleNamespace(
        llama_get_model=lambda _context: None,
        llama_model_get_vocab=lambda _model: None,
        llama_model_meta_val_str=describe,
        llama_vocab_get_text=lambda _vocab, token: texts[token].encode(),
        llama_vocab_get_attr=lambda _vocab, token: (attributes or {}).get(texts[token], NORMAL),
    )
    model = SimpleNamespace(context=None, vocabulary=len(texts), tokenize=lambda _text: [texts.index(blank)])
    return longest_text(library, model)


def test_letters_of_byte_level_tokens_count_as_bytes_and_control_tokens_as_they_stand() -> None:
    assert longest("gpt2", [*byte_alphabet(), "ĠĠĠĠ"]) == 4
    assert longest("gpt2", [*byte_alphabet(), "ĠĠĠĠ", "<ééé>"], {"<ééé>": CONTROL}) == 8


@pytest.mark.parametrize("kind", ["llama", "gemma4", "gpt2"])
def test_tokens_that_are_texts_count_with_their_escaped_blanks(kind: str) -> None:
    assert longest(kind, [*RAW, "▁", "▁▁▁"], blank="▁") == 9


@pytest.mark.parametrize("kind", ["bert", "t5", "whitespace", "hybriddna", "rwkv", ""])
def test_of_tokenizers_that_leave_things_out_nobody_can_say(kind: str) -> None:
    assert longest(kind, [*RAW, *byte_alphabet()]) is None


def test_nobody_can_say_where_blanks_are_swallowed_or_a_byte_is_no_token() -> None:
    assert longest("gpt2", [*byte_alphabet(), "<end>"], {"<end>": CONTROL | RSTRIP}) is None
    assert longest("gpt2", [letter for letter in byte_alphabet() if letter != "x"]) is None
    assert longest("llama", [*RAW[:-20], "▁"], blank="▁") is None
    never = {byte_alphabet()[byte] for byte in (0xC0, 0xC1, *range(0xF5, 0x100))}
    assert longest("gpt2", [letter for letter in byte_alphabet() if letter not in never]) == 1


def test_no_text_of_a_real_tokenizer_has_fewer_tokens(library: Any, model: Model) -> None:
    found = longest_text(library, model)
    assert found == len("<|im_start|>")
    rng = random.Random(5)
    texts = ["<|im_start|>" * 9, "th" * 50, "é€😀" * 9, " " * 99]
    texts += ["".join(chr(rng.choice([32, 116, 104, 233, 0x4F60])) for _ in range(50)) for _ in range(20)]
    for text in texts:
        for meant in (True, False):
            assert len(model.tokenize(text, parse_special=meant)) * found >= len(text.encode())


def test_of_an_encoders_words_nobody_can_say(library: Any, tmp_path: Path) -> None:
    write_encoder(tmp_path / "m.gguf")
    model = Model(library, tmp_path / "m.gguf", LoopSettings())
    assert longest_text(library, model) is None
    model.close()
