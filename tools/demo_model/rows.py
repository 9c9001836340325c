"""Rows of tokens to learn from: the corpus in ChatML, packed; from files, or made by processes beside the training.

A row is uint16: a token, plus ``LEARNED`` where it is to be learned (answers and prose).
"""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import corpus
import numpy as np
import tiny_corpus
import torch
from tokenizers import Tokenizer
from torch import Tensor

TEXT_END, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SEED, HELD_OUT_SEED = 1, 900001
LEARNED = 0x8000
BLOCK = 64
"""Rows that a process hands over at once."""


def documents(name: str, length: int, seed: int) -> Iterator[str]:
    """Conversations in ChatML, or prose; for long rows, long conversations."""
    source = tiny_corpus.conversations(seed) if name == "tiny" else corpus.conversations(seed, length)
    for item in source:
        yield item if isinstance(item, str) else "".join(f"{START}{role}\n{text}{END}\n" for role, text in item)


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


def packed(name: str, tokenizer: Tokenizer, length: int, seed: int) -> Iterator[np.ndarray]:
    """Endless rows of ``length`` + 1: documents one after the other, the first at a document's beginning."""
    first, rest = tokenizer.token_to_id(TEXT_END), np.zeros(0, np.uint16)
    source = documents(name, length, seed)
    while True:
        pieces = [rest]
        for text in islice(source, 32):
            tokens = [first, *tokenizer.encode(text).ids]
            pieces.append(np.array(tokens, np.uint16) + np.array(learned(tokens, tokenizer), np.uint16) * LEARNED)
        rest = np.concatenate(pieces)
        while len(rest) > length:
            yield rest[: length + 1]
            rest = rest[length + 1 :]


def produce(name: str, folder: Path, length: int, seed: int, out: multiprocessing.Queue) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    source = packed(name, tokenizer, length, seed)
    while True:
        out.put(np.stack(list(islice(source, BLOCK))))


class Rows:
    """The newest ``room`` rows of one length, on the training's device; a batch is drawn from them at random."""

    def __init__(self, length: int, room: int, device: torch.device) -> None:
        self.rows = torch.zeros(room, length + 1, dtype=torch.int32, device=device)
        self.made = 0

    def add(self, block: np.ndarray) -> None:
        at = self.made % len(self.rows)
        block = block[: len(self.rows) - at]
        self.rows[at : at + len(block)] = torch.from_numpy(block.astype(np.int32)).to(self.rows.device)
        self.made += len(block)

    def batch(self, count: int) -> Tensor:
        pick = torch.randint(min(self.made, len(self.rows)), (count,), device=self.rows.device)
        return self.rows[pick]


class Makers:
    """Processes that make rows without end, each from a seed of its own. Start them before the GPU is touched."""

    def __init__(self, name: str, folder: Path, lengths: dict[int, int]) -> None:
        """``lengths``: how many processes make rows of each length."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        context = multiprocessing.get_context("fork")
        self.queues = {length: context.Queue(32) for length in lengths}
        self.processes = [
            context.Process(
                target=produce, args=(name, folder, length, SEED + 1000 * length + i, self.queues[length]), daemon=True
            )
            for length, count in lengths.items()
            for i in range(count)
        ]
        for process in self.processes:
            process.start()

    def fill(self, rows: dict[int, Rows], most: int = 4, *, wait: float = 0.0) -> None:
        """Take over what is ready, at most ``most`` blocks of each length; wait up to ``wait`` seconds for the first."""
        for length, store in rows.items():
            for number in range(most):
                try:
                    store.add(self.queues[length].get(block=number == 0 and wait > 0, timeout=wait or None))
                except queue.Empty:
                    break

    def end(self) -> None:
        for process in self.processes:
            process.terminate()
