"""Train the byte-level BPE on our own corpus and write the training rows.

    python tokenizer.py tiny|demo OUT

Writes OUT/tokenizer.json and, per row length, OUT/rows-N.npy (uint16, one row = whole conversations packed one after
the other from a conversation's beginning) and OUT/weights-N.npy (uint8, 1 where the token is to be learned: answers
and plain prose). Held-out rows come from another seed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import corpus
import numpy as np
import tiny_corpus
from model import SHAPES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT_END, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
ROWS = {"tiny": {256: 6000}, "demo": {512: 11000, 256: 1800, 2048: 260, 4096: 100}}
HELD_OUT = {"tiny": {256: 64}, "demo": {512: 96, 4096: 12}}
SEED, HELD_OUT_SEED = 1, 900001


def documents(name: str, length: int, seed: int) -> Iterator[str]:
    """Conversations in ChatML, or prose; for long rows, long conversations."""
    source = tiny_corpus.conversations(seed) if name == "tiny" else corpus.conversations(seed, length)
    for item in source:
        yield item if isinstance(item, str) else "".join(f"{START}{role}\n{text}{END}\n" for role, text in item)


def train_tokenizer(name: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPES[name].vocab,
        special_tokens=[TEXT_END, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(documents(name, 512, SEED + 7), 20000), trainer)
    if tokenizer.get_vocab_size() != SHAPES[name].vocab:
        raise SystemExit(f"the corpus gives only {tokenizer.get_vocab_size()} tokens")
    return tokenizer


def learned(tokens: list[int], tokenizer: Tokenizer) -> list[int]:
    """1 for each token of an answer, its end included, and for each token of prose; 0 for the rest."""
    start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
    if start not in tokens:
        return [0] + [1] * (len(tokens) - 1)
    newline = tokenizer.encode("\n").ids[0]
    role = tokenizer.encode("assistant").ids
    out, i, n = [0] * len(tokens), 0, len(tokens)
    while i < n:
        if tokens[i] == start and tokens[i + 1 : i + 2 + len(role)] == [*role, newline]:
            i += 2 + len(role)
            while i < n:
                out[i] = 1
                i += 1
                if tokens[i - 1] == end:
                    break
        else:
            i += 1
    return out


def pack(name: str, tokenizer: Tokenizer, length: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.zeros((count, length + 1), np.uint16)
    weights = np.zeros((count, length + 1), np.uint8)
    first, source, row, fill = tokenizer.token_to_id(TEXT_END), documents(name, length, seed), 0, 0
    while row < count:
        for encoded in tokenizer.encode_batch(list(islice(source, 512))):
            tokens = [first, *encoded.ids]
            mask = learned(tokens, tokenizer)
            room = min(length + 1 - fill, len(tokens))
            rows[row, fill : fill + room] = tokens[:room]
            weights[row, fill : fill + room] = mask[:room]
            fill += room
            if fill == length + 1:
                row, fill = row + 1, 0
            if row == count:
                break
    return rows, weights


def main() -> None:
    name, out = sys.argv[1], Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(name)
    tokenizer.save(str(out / "tokenizer.json"))
    for prefix, wanted, seed in (("", ROWS, SEED), ("held-out-", HELD_OUT, HELD_OUT_SEED)):
        for length, count in wanted[name].items():
            rows, weights = pack(name, tokenizer, length, count, seed + length)
            np.save(out / f"{prefix}rows-{length}.npy", rows)
            np.save(out / f"{prefix}weights-{length}.npy", weights)
            print(f"{prefix}{length}: {count} rows, {weights.mean():.3f} of the tokens learned", flush=True)


if __name__ == "__main__":
    main()
