"""Train ``tiny`` or ``demo`` on the rows that ``tokenizer.py`` wrote. Resumable: run the same command again.

    python train.py tiny|demo DIR [--minutes M]

Phases have fixed step counts; --minutes ends the run early at a checkpoint. Matrices learn by Muon (momentum,
orthogonalised by five Newton-Schulz steps), embeddings and norms by Adam. A third of the short rows skip ahead in their
positions at one random place, so that long distances are met before the rows are long.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from model import SHAPES, Model
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Phase:
    """``steps`` steps of ``batch`` rows of ``length`` tokens; the learning rate goes linearly from ``first`` to ``last``."""

    length: int
    batch: int
    steps: int
    first: float
    last: float


PHASES = {
    "tiny": (Phase(256, 16, 900, 1.0, 1.0), Phase(256, 16, 500, 1.0, 0.0)),
    "demo": (
        Phase(512, 8, 220, 1.0, 1.0),
        Phase(512, 8, 120, 1.0, 0.61),
        Phase(256, 16, 100, 0.9, 0.9),
        Phase(512, 8, 180, 0.8, 0.29),
        Phase(2048, 2, 20, 0.32, 0.25),
        Phase(2048, 2, 18, 0.25, 0.05),
        Phase(4096, 1, 5, 0.05, 0.0),
        Phase(512, 8, 480, 0.5, 0.1),
        Phase(2048, 2, 24, 0.1, 0.05),
        Phase(4096, 1, 8, 0.05, 0.0),
        Phase(512, 8, 330, 0.45, 0.06),
        Phase(2048, 2, 16, 0.06, 0.03),
        Phase(4096, 1, 10, 0.03, 0.0),
    ),
}  # fmt: skip
MATRIX_RATE, OTHER_RATE, DECAY = 0.02, 4e-3, 0.05


def orthogonal(grads: Tensor) -> Tensor:
    """Newton-Schulz on a stack of matrices of one shape (Muon's coefficients)."""
    x = grads / (grads.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.transpose(1, 2) if tall else x
    for _ in range(5):
        a = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.transpose(1, 2) if tall else x) * max(1.0, grads.shape[1] / grads.shape[2]) ** 0.5


class Learner:
    """Muon for the matrices, grouped by shape, and Adam for the rest."""

    def __init__(self, model: Model) -> None:
        named = list(model.named_parameters())
        matrices = [p for n, p in named if p.ndim == 2 and n != "token_embd.weight"]
        others = [p for n, p in named if p.ndim != 2 or n == "token_embd.weight"]
        shapes = sorted({tuple(p.shape) for p in matrices})
        self.groups = [[p for p in matrices if tuple(p.shape) == s] for s in shapes]
        self.momenta = [torch.zeros(len(g), *g[0].shape) for g in self.groups]
        self.adam = torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            grads = torch.stack([p.grad for p in group])
            momentum.mul_(0.95).add_(grads)
            for p, update in zip(group, orthogonal(grads.add(momentum, alpha=0.95)), strict=True):
                p.mul_(1 - MATRIX_RATE * rate * DECAY).add_(update, alpha=-MATRIX_RATE * rate)
                p.grad = None
        for settings in self.adam.param_groups:
            settings["lr"] = OTHER_RATE * rate
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)

    def state(self) -> dict[str, object]:
        return {"momenta": self.momenta, "adam": self.adam.state_dict()}

    def load(self, state: dict[str, object]) -> None:
        self.momenta = state["momenta"]
        self.adam.load_state_dict(state["adam"])


def positions(rows: int, length: int, context: int, rng: np.random.Generator) -> Tensor:
    at = np.tile(np.arange(length), (rows, 1))
    for row in at:
        if context > length and rng.random() < 0.33:
            row[rng.integers(1, length) :] += rng.integers(1, context - length)
    return torch.from_numpy(at)


def loss_of(model: Model, rows: np.ndarray, weights: np.ndarray, at: Tensor, *, bf16: bool) -> Tensor:
    """Mean cross-entropy (nats per token) over the tokens to be learned; the others need no logits."""
    tokens = torch.from_numpy(rows.astype(np.int64))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        wanted = torch.from_numpy(weights[:, 1:] > 0)
        logits = model.logits(model.hidden(tokens[:, :-1], at)[wanted])
    return functional.cross_entropy(logits.float(), tokens[:, 1:][wanted])


@torch.no_grad()
def held_out(model: Model, folder: Path, length: int, *, bf16: bool) -> float:
    rows, weights = (np.load(folder / f"held-out-{kind}-{length}.npy") for kind in ("rows", "weights"))
    losses, counts = [], []
    for i in range(0, len(rows), 8):
        at = torch.arange(length).expand(len(rows[i : i + 8]), -1)
        losses.append(loss_of(model, rows[i : i + 8], weights[i : i + 8], at, bf16=bf16).item())
        counts.append(int(weights[i : i + 8, 1:].sum()))
    return float(np.average(losses, weights=counts))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = Model(SHAPES[args.name])
    learner, done, start = Learner(model), [0] * len(PHASES[args.name]), time.monotonic()
    checkpoint = args.folder / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        learner.load(state["learner"])
        done = [*state["done"], *done][: len(done)]
    print(f"{sum(p.numel() for p in model.parameters())} parameters, done {done}", flush=True)

    def save() -> None:
        fresh = checkpoint.with_suffix(".new")
        torch.save({"model": model.state_dict(), "learner": learner.state(), "done": done}, fresh)
        fresh.replace(checkpoint)

    for number, phase in enumerate(PHASES[args.name]):
        rows = np.load(args.folder / f"rows-{phase.length}.npy", mmap_mode="r")
        weights = np.load(args.folder / f"weights-{phase.length}.npy", mmap_mode="r")
        used = sum(p.batch * p.steps for p in PHASES[args.name][:number] if p.length == phase.length)
        while done[number] < phase.steps:
            step = done[number]
            rng = np.random.default_rng((number, step))
            pick = (used + step * phase.batch + np.arange(phase.batch)) % len(rows)
            at = positions(phase.batch, phase.length, model.shape.context, rng)
            loss = loss_of(model, rows[pick], weights[pick], at, bf16=args.bf16)
            loss.backward()
            rate = phase.first + (phase.last - phase.first) * step / phase.steps
            learner.step(rate * min(1.0, (sum(done) + 1) / 30))
            done[number] += 1
            if done[number] % 10 == 0:
                elapsed = time.monotonic() - start
                print(f"{elapsed:.0f}s phase {number} step {done[number]} loss {loss.item():.3f}", flush=True)
            if done[number] % 20 == 0 or done[number] == phase.steps:
                save()
            if done[number] % 100 == 0 or done[number] == phase.steps:
                loss = held_out(model, args.folder, PHASES[args.name][0].length, bf16=args.bf16)
                print(f"held-out {loss:.4f}", flush=True)
            if time.monotonic() - start > args.minutes * 60:
                save()
                return


if __name__ == "__main__":
    main()
