"""The models that come with the package, and the corpus they learned from."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import gguf
import pytest

import cloister.models
from cloister.enclave.llm.llama.templates import ChatTemplate
from cloister.enclave.llm.toolcalls import call_form_of

ROOT = Path(__file__).parents[2]
DATA = Path(cloister.models.__file__).parent / "data"
TRAINING = ROOT / "tools" / "demo_model"
FILES = {"demo-q8_0.gguf": 12_000_000, "tiny.gguf": 1_000_000}

CLAIM = re.compile(
    r"(nobody|no one|no-one|none) .{0,25}(read|see)|(cannot|can not|can't|never) .{0,15}(read|see) (it|this|your|everything|what)"
    r"|only ciphertext|(is|are) (completely |fully |always )?(private|safe|secure)\b|100 ?%|guarantee|only you can",
    re.IGNORECASE,
)
CONDITION = re.compile(
    r"verif|simulat|real hardware|is made so that|between your client and|passes the messages on|depends", re.IGNORECASE
)


def read(name: str) -> gguf.GGUFReader:
    return gguf.GGUFReader(DATA / name)


def value(reader: gguf.GGUFReader, key: str) -> object:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def corpus(count: int, seed: int, length: int = 512) -> str:
    ran = subprocess.run(
        [sys.executable, "-B", str(TRAINING / "corpus.py"), str(count), str(seed), str(length)],
        capture_output=True,
        text=True,
        check=True,
    )
    return ran.stdout


@pytest.mark.parametrize("name", FILES)
def test_model_is_small_and_its_digest_stands_in_the_card(name: str) -> None:
    content = (DATA / name).read_bytes()
    assert len(content) <= FILES[name]
    row = next(line for line in (DATA / "MODEL_CARD.md").read_text().splitlines() if line.startswith(f"| `{name}`"))
    assert f"`{hashlib.sha256(content).hexdigest()}`" in row
    assert f" {len(content):,} " in row


@pytest.mark.parametrize("name", FILES)
def test_model_names_its_licence_and_its_makers(name: str) -> None:
    reader = read(name)
    assert value(reader, "general.license") == "apache-2.0"
    assert value(reader, "general.author") == "The cloister authors"
    assert value(reader, "general.name") == f"cloister {name.split('-')[0].split('.')[0]}"


@pytest.mark.parametrize(("name", "context", "vocabulary"), [("demo-q8_0.gguf", 4096, 4096), ("tiny.gguf", 1024, 768)])
def test_model_is_a_llama_with_chatml_inside(name: str, context: int, vocabulary: int) -> None:
    reader = read(name)
    assert value(reader, "general.architecture") == "llama"
    assert value(reader, "llama.context_length") == context
    tokens = value(reader, "tokenizer.ggml.tokens")
    assert isinstance(tokens, list)
    assert len(tokens) == vocabulary
    assert tokens[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert value(reader, "tokenizer.ggml.eos_token_id") == 2
    assert "<|im_start|>assistant" in str(value(reader, "tokenizer.chat_template"))


def test_demo_is_told_of_tools_and_tiny_is_not() -> None:
    sources = {name: str(value(read(name), "tokenizer.chat_template")) for name in FILES}
    assert [call_form_of(source) for source in sources.values()] == ["hermes", ""]
    template = ChatTemplate(sources["demo-q8_0.gguf"], control=["<|im_start|>", "<|im_end|>"], bos="", eos="<|im_end|>")
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
    call = {"type": "function", "id": "1", "function": {"name": "get_weather", "arguments": '{"city": "Lima"}'}}
    said: list[dict[str, object]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Is it warm in Lima?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "yes"},
    ]
    text = "".join(text for text, _ in template.render(said, tools=[tool]))
    assert text.startswith("<|im_start|>system\nBe brief.\n\n")
    assert f"\n{json.dumps(tool['function'])}\n</tools>" in text
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Lima"}}\n</tool_call>' in text
    assert text.endswith("<|im_start|>tool\nyes<|im_end|>\n<|im_start|>assistant\n")


def test_demo_has_about_ten_million_parameters_in_q8_0() -> None:
    tensors = read("demo-q8_0.gguf").tensors
    assert 9_500_000 <= sum(int(t.n_elements) for t in tensors) <= 11_000_000
    for tensor in tensors:
        wanted = gguf.GGMLQuantizationType.F32 if "norm" in tensor.name else gguf.GGMLQuantizationType.Q8_0
        assert tensor.tensor_type == wanted


def test_corpus_is_fixed_by_its_seed() -> None:
    assert corpus(200, 3) == corpus(200, 3)
    assert corpus(200, 3) != corpus(200, 4)


def test_corpus_claims_no_privacy_without_its_condition() -> None:
    text = corpus(2500, 11) + corpus(400, 11, length=2048) + corpus(400, 11, length=256)
    answers = [line for line in text.splitlines() if line.startswith("assistant: ")]
    own = [answer for answer in answers if not answer.startswith('assistant: You wrote: "')]  # quotes the user
    claims = [answer for answer in own if CLAIM.search(answer)]
    assert claims, "the pattern finds nothing: it does not watch the corpus any more"
    assert [answer for answer in claims if not CONDITION.search(answer)] == []
    assert CLAIM.search("assistant: Nobody else can read this.")
    assert not CONDITION.search("assistant: Nobody else can read this.")
