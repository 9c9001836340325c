"""Measure an exported model: loss and perplexity on held-out text, samples, and parity with llama.cpp.

    python check.py tiny|demo DIR MODEL.gguf [--engine] [--samples] [--late]

The GGUF's own weights (dequantized by the ``gguf`` package) run in torch, so the numbers are those of the file.
--engine needs llama-cpp-python's bindings: compares tokens and logits of llama.cpp with ours, and lets it answer.
--late asks questions at the end of conversations of about 3,500 tokens and counts the right answers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import calls
import corpus
import facts
import gguf
import jinja2
import numpy as np
import tiny_corpus
import torch
from exchanges import cap
from export import TEMPLATES
from grammar import pseudo_word
from model import SHAPES, Model
from rows import END, HELD_OUT_SEED, LEARNED, START, TEXT_END, documents
from tokenizer import HELD_OUT
from tokenizers import Tokenizer
from torch.nn import functional
from train import held_out

UNSEEN_SEED = 777
QUESTIONS = (
    ["Hello!"], ["who are you??"], ["What is cloister?"], ["Can the operator read my messages?"], ["so nobody can read this, right?"], ["What does attestation prove, and what not?"],
    ["What is a nonce?"], ["whats sev snp"], ["Is this enclave real or simulated?"], ["Explain post-quantum encryption.", "tell me more", "summarise that"],
    ["My name is Marek.", "Tell me a joke", "another one", "What is my name?"], ["Tell me a story about a penguin."], ["Write a poem about the rain."], ["What is 7 plus 8?", "And what is 6 times 7?"],
    ["What's the capital of Portugal?"], ["What is the weather in Oslo?"], ["Who was Nikola Tesla?"], ["How do I repair a gearbox?"], ["My tooth hurts, which pills should I take?"], ["I feel a bit lonely today"],
    ["My favourite colour is teal.", "What day comes after Friday?", "What is my favourite colour?"], ["Anna has 12 pears. How many pears does Anna have?"], ["Why is the sky blue?"], ["What did the Romans eat for breakfast?"], ["Which is heavier, iron or feathers?"],
    ["What is a sealed app?", "How do I deploy one?"], ["What does the broker do?"], ["which command makes an API key"], ["What is a receipt?", "and how do I check it"],
    ["Remember the number 37.", "Name three birds as JSON.", "What was the number?"], ["Add milk and eggs to my shopping list.", "add tea", "what is on my list?"], ["What is 23 plus 19?", "double it"],
    ["Sort these numbers: 14, 3, 27, 9"], ["Ada is 31 years old and lives in Oslo. Write this as JSON."], ["Put this into the past: Tom opens the old box."], ["Ask me a question.", "Paris"], ["Write a thank-you note to Nora for the scarf."],
    ["On Monday Ben went to the harbour and bought a red lamp. It rained. There were many people. Summarise this, please."], ["Tell me a long story about a lighthouse keeper."], ["Can you recommend a laptop?"], ["What is the airspeed of a swallow?"],
)  # fmt: skip

WEATHER = {"name": "get_weather", "description": "Get the weather of a city.", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}  # fmt: skip
SYSTEM_QUESTIONS = (
    ("Answer in capital letters.", "What is a nonce?"), ("Your name is Bruno.", "who are you?"), ("Answer briefly.", "What is attestation?", "Can the host read my prompt?"), ("End every answer with Ahoy!", "What is the capital of Japan?"),
    (calls.offer("", [WEATHER]), "What is the weather in Bergen?", "What is an enclave?"),
)  # fmt: skip


def load(name: str, path: Path) -> Model:
    """The weights of the file itself, as f32; the file must have exactly the model's tensors."""
    model = Model(SHAPES[name])
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    state = {k: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for k, t in tensors.items()}
    model.load_state_dict(state)
    return model.eval()


class Chat:
    """Greedy answers in torch, without a cache: slow and plain."""

    def __init__(self, model: Model, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.end = tokenizer.token_to_id(END)

    def prompt(self, turns: list[tuple[str, str]]) -> list[int]:
        text = TEXT_END + "".join(f"{START}{role}\n{said}{END}\n" for role, said in turns) + f"{START}assistant\n"
        return self.tokenizer.encode(text).ids

    @torch.no_grad()
    def answer(self, turns: list[tuple[str, str]], limit: int = 90) -> tuple[str, bool]:
        """The answer's text, and whether it ended by itself."""
        tokens, made = self.prompt(turns), []
        for _ in range(limit):
            at = torch.arange(len(tokens) + len(made)).unsqueeze(0)
            hidden = self.model.hidden(torch.tensor([tokens + made]), at)[:, -1]
            token = int(self.model.logits(hidden).argmax())
            if token == self.end:
                return self.tokenizer.decode(made), True
            made.append(token)
        return self.tokenizer.decode(made), False


def samples(chat: Chat) -> None:
    for told, *questions in (*(("", *questions) for questions in QUESTIONS), *SYSTEM_QUESTIONS):
        turns: list[tuple[str, str]] = [("system", told)] if told else []
        print(f"system: {told}\n" if told else "", end="")
        for question in questions:
            turns.append(("user", question))
            answer, ended = chat.answer(turns, 300)
            turns.append(("assistant", answer))
            print(f"> {question}\n{answer}{'' if ended else ' [cut]'}", flush=True)
        print()


def unseen(chat: Chat, count: int) -> None:
    """How many answers are the corpus's own, in new conversations; and calls of tools, whole and exact."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    chats = (c for c in corpus.conversations(UNSEEN_SEED) if not isinstance(c, str))
    for item in islice(chats, count):
        last = max(i for i, turn in enumerate(item) if turn[0] == "assistant")
        last = next((i for i, turn in enumerate(item) if turn[1].startswith("<tool_call>")), last)
        kind = "calls" if item[last][1].startswith("<tool_call>") else "after a system message" if item[0][0] == "system" else "later ones" if last > 1 else "first questions"  # fmt: skip
        answer, _ = chat.answer(item[:last], 400)
        asked[kind] += 1
        right[kind] += answer == item[last][1]
    print("same answer as the corpus:", ", ".join(f"{kind} {right[kind]}/{asked[kind]}" for kind in asked))


def late(chat: Chat, count: int, length: int = 3500) -> None:
    """Tell a name first, talk until ``length`` tokens, then ask; and plain facts there."""
    rng, right, total = random.Random(UNSEEN_SEED), {"name": 0, "name repeated late": 0, "fact": 0, "sum": 0}, 0
    for _ in range(count):
        name = cap(pseudo_word(rng)) if rng.random() < 0.5 else rng.choice(facts.NAMES)
        turns = [("user", f"My name is {name}."), ("assistant", f"Nice to meet you, {name}! How can I help you?")]
        size = 0
        while size < length:
            more = [t for t in corpus.conversation(rng, 1) if t[0] != "system" and "name" not in t[1].lower()]
            if len(more) == 2 and "meet you" not in more[1][1]:
                turns += more
                size += sum(len(chat.tokenizer.encode(t[1]).ids) + 5 for t in more)
        total += 1
        right["name"] += name in chat.answer([*turns, ("user", "What is my name?")], 25)[0]
        again = [*turns[:-20], *turns[:2], *turns[-20:]]
        right["name repeated late"] += name in chat.answer([*again, ("user", "What is my name?")], 25)[0]
        right["fact"] += "Lisbon" in chat.answer([*turns, ("user", "What is the capital of Portugal?")], 25)[0]
        right["sum"] += " 12." in chat.answer([*turns, ("user", "What is 5 plus 7?")], 25)[0]
    print(f"after {length} tokens of conversation, right of {total}: {right}")


def template_agrees(name: str) -> None:
    """The file's chat template makes of messages and tools what the corpus has."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.from_string(TEMPLATES[name])
    same = 0
    source = corpus.conversations(UNSEEN_SEED) if name == "demo" else tiny_corpus.conversations(UNSEEN_SEED)
    chats = list(islice((c for c in source if not isinstance(c, str)), 300))
    for turns in chats:
        messages, tools = as_messages(turns)
        wanted = "".join(f"{START}{role}\n{text}{END}\n" for role, text in turns)
        same += template.render(messages=messages, tools=tools, add_generation_prompt=False) == wanted
    print(f"template and corpus agree on {same} of {len(chats)} conversations")


def as_messages(turns: list[tuple[str, str]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A conversation of the corpus in OpenAI's form, and its tools."""
    messages: list[dict[str, Any]] = []
    tools: list[dict[str, Any]] = []
    for role, text in turns:
        if role == "system" and calls.BEFORE in text:
            told, _, rest = text.partition(calls.BEFORE)
            lines = rest.removesuffix(calls.AFTER).strip().splitlines()
            tools = [{"type": "function", "function": json.loads(line)} for line in lines]
            messages += [{"role": "system", "content": told.strip()}] if told else []
        elif text.startswith("<tool_call>"):
            call = json.loads(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))
            messages.append({"role": role, "tool_calls": [{"type": "function", "function": call}]})
        else:
            messages.append({"role": role, "content": text})
    return messages, tools


def by_position(model: Model, folder: Path) -> None:
    """Loss in four parts of the held-out rows of 4,096 tokens."""
    rows = np.load(folder / "held-out-4096.npy").astype(np.int64)
    total, counts = np.zeros(4), np.zeros(4)
    for row in rows:
        tokens, weight = torch.from_numpy(row % LEARNED), row >= LEARNED
        with torch.no_grad():
            hidden = model.hidden(tokens[None, :-1], torch.arange(4096).unsqueeze(0))[0]
            for part in range(4):
                span = slice(part * 1024, (part + 1) * 1024)
                wanted = torch.from_numpy(weight[1:][span])
                loss = functional.cross_entropy(model.logits(hidden[span][wanted]), tokens[1:][span][wanted])
                total[part] += loss.item() * int(wanted.sum())
                counts[part] += int(wanted.sum())
    print("held-out loss of rows of 4096, by quarter:", " ".join(f"{v:.3f}" for v in total / counts))


class EngineChat(Chat):
    """Greedy answers of llama.cpp itself, through llama-cpp-python's bindings."""

    def __init__(self, name: str, model: Model, tokenizer: Tokenizer, path: Path) -> None:
        import llama_cpp.llama_cpp as lib

        super().__init__(model, tokenizer)
        self.lib, self.size, self.vocabulary = lib, SHAPES[name].context, SHAPES[name].vocab
        self.quiet = lib.llama_log_callback(lambda *_: None)
        lib.llama_log_set(self.quiet, None)
        lib.llama_backend_init()
        self.loaded = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = self.size
        params.n_threads = params.n_threads_batch = 2
        self.context = lib.llama_init_from_model(self.loaded, params)
        self.batch = lib.llama_batch_init(self.size, 0, 1)

    def tokenize(self, text: str) -> list[int]:
        data, vocab = text.encode(), self.lib.llama_model_get_vocab(self.loaded)
        room = (self.lib.llama_token * (len(data) + 8))()
        return list(room[: self.lib.llama_tokenize(vocab, data, len(data), room, len(room), False, True)])  # noqa: FBT003

    def logits(self, tokens: list[int], start: int, *, every: bool = False) -> np.ndarray:
        """Logits after the last token, or after every one; position 0 begins a new sequence."""
        if start == 0:
            self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)  # noqa: FBT003
        self.batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            self.batch.token[i], self.batch.pos[i], self.batch.n_seq_id[i] = token, start + i, 1
            self.batch.seq_id[i][0], self.batch.logits[i] = 0, int(every or i == len(tokens) - 1)
        if self.lib.llama_decode(self.context, self.batch):
            raise SystemExit("llama_decode failed")
        shape = (len(tokens) if every else 1, self.vocabulary)
        return np.ctypeslib.as_array(self.lib.llama_get_logits(self.context), shape=shape).copy()

    def answer(self, turns: list[tuple[str, str]], limit: int = 90) -> tuple[str, bool]:
        tokens, made, at = self.prompt(turns), [], 0
        while len(made) < limit:
            token = int(self.logits(tokens, at)[-1].argmax())
            if token == self.end:
                return self.tokenizer.decode(made), True
            at, tokens = at + len(tokens), [token]
            made.append(token)
        return self.tokenizer.decode(made), False


def parity(name: str, chat: EngineChat) -> None:
    texts = list(islice(documents(name, 512, HELD_OUT_SEED + 5), 600))
    texts += [
        "naïve café — “quoted” 東京 🙂\n\n\tdef f(x):  return x's  123456 ...",
        "  spaces   and\r\nlines \n\n\n end  ",
    ]
    same = sum(chat.tokenize(t) == chat.tokenizer.encode(t).ids for t in texts)
    print(f"tokenizers agree on {same} of {len(texts)} texts")
    tokens = [0, *chat.tokenizer.encode("".join(texts[:200])).ids][: chat.size]
    theirs = chat.logits(tokens, 0, every=True)
    with torch.no_grad():
        ours = chat.model(torch.tensor([tokens]))[0].numpy()
    agree = float((ours.argmax(1) == theirs.argmax(1)).mean())
    worst = np.abs(ours - theirs).max()
    print(
        f"logits of {len(tokens)} tokens: largest difference {worst:.3f}, spread {ours.std():.2f}, same first choice {agree:.4f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    for flag in ("engine", "samples", "late"):
        parser.add_argument(f"--{flag}", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(2)
    sys.stdout.reconfigure(line_buffering=True)
    model, tokenizer = load(args.name, args.file), Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    print(
        f"{args.file.name}: {args.file.stat().st_size} bytes, sha256 {hashlib.sha256(args.file.read_bytes()).hexdigest()}"
    )
    template_agrees(args.name)
    with torch.no_grad():
        loss = held_out(model, args.folder, next(iter(HELD_OUT[args.name])), 4, bf16=False)
    print(f"held-out answers: loss {loss:.4f} nats per token, perplexity {math.exp(loss):.3f}", flush=True)
    chat = Chat(model, tokenizer)
    if args.engine:
        chat = EngineChat(args.name, model, tokenizer, args.file)
        parity(args.name, chat)
    if args.samples:
        samples(chat)
        if args.name == "demo":
            unseen(chat, 200)
    if args.late:
        by_position(model, args.folder)
        late(chat, 10)


if __name__ == "__main__":
    main()
