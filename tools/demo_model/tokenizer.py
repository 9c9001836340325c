"""Train the byte-level BPE on our own corpus, and write the held-out rows (and, for ``tiny``, the rows to learn).

    python tokenizer.py tiny|demo DIR

Writes DIR/tokenizer.json and, per row length, DIR/held-out-N.npy and DIR/rows-N.npy (see ``rows``; from other seeds).
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

import numpy as np
from model import SHAPES
from rows import END, HELD_OUT_SEED, SEED, START, TEXT_END, documents, packed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROWS = {"tiny": {256: 6000}, "demo": {}}
HELD_OUT = {"tiny": {256: 64}, "demo": {1024: 64, 4096: 16}}


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


def main() -> None:
    name, out = sys.argv[1], Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(name)
    tokenizer.save(str(out / "tokenizer.json"))
    for prefix, wanted, seed in (("rows", ROWS, SEED), ("held-out", HELD_OUT, HELD_OUT_SEED)):
        for length, count in wanted[name].items():
            rows = np.stack(list(islice(packed(name, tokenizer, length, seed + length), count)))
            np.save(out / f"{prefix}-{length}.npy", rows)
            print(f"{prefix} {length}: {count} rows, {(rows > 0x7FFF).mean():.3f} of the tokens learned", flush=True)


if __name__ == "__main__":
    main()
