"""Train ``tiny`` or ``demo``.

    python train.py tiny DIR                                      two CPU cores, rows from files
    python train.py demo DIR --gpu --minutes 7.5 --out OUT        one GPU, rows made by the CPU's cores meanwhile

Matrices learn by Muon (momentum, orthogonalised by five Newton-Schulz steps), embeddings and norms by Adam. The rate is
constant at first and then falls to 0, in time or in steps. A third of the short rows skip ahead in their positions at one
random place, so that long distances are met before the rows are long. Writes OUT/loss.csv and, every minute and at the
end, OUT/weights-1.pt and weights-2.pt (f16).
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from model import SHAPES, Model
from rows import LEARNED, Makers, Rows
from torch import Tensor
from torch._dynamo import config as compiling
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Plan:
    """``parts``: (row length, rows per step, up to which share of the run). ``steps``: unless minutes are given.

    The rate rises over ``warmup`` steps and is constant up to ``hold`` of the run. ``room``: rows kept of each length.
    """

    parts: tuple[tuple[int, int, float], ...]
    steps: int
    warmup: int
    hold: float
    room: int
    matrix_rate: float
    other_rate: float


PLANS = {
    "tiny": Plan(((256, 16, 1.0),), 1400, 30, 0.64, 6016, 0.02, 4e-3),
    "demo": Plan(((1024, 64, 0.8), (4096, 16, 1.0)), 8000, 100, 0.45, 32768, 0.02, 3e-3),
}
DECAY = 0.05


def orthogonal(grads: Tensor) -> Tensor:
    """Newton-Schulz on a stack of matrices of one shape (Muon's coefficients)."""
    x = grads / (grads.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.bfloat16() if x.is_cuda else x
    tall = x.shape[1] > x.shape[2]
    x = x.transpose(1, 2) if tall else x
    for _ in range(5):
        a = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.transpose(1, 2) if tall else x).float() * max(1.0, grads.shape[1] / grads.shape[2]) ** 0.5


class Learner:
    """Muon for the matrices, grouped by shape, and Adam for the rest."""

    def __init__(self, model: Model, plan: Plan) -> None:
        named = list(model.named_parameters())
        matrices = [p for n, p in named if p.ndim == 2 and n != "token_embd.weight"]
        others = [p for n, p in named if p.ndim != 2 or n == "token_embd.weight"]
        shapes = sorted({tuple(p.shape) for p in matrices})
        self.plan = plan
        self.groups = [[p for p in matrices if tuple(p.shape) == s] for s in shapes]
        self.momenta = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]
        self.adam = torch.optim.AdamW(others, lr=plan.other_rate, betas=(0.9, 0.95), weight_decay=0.0)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        move = self.plan.matrix_rate * rate
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            grads = torch.stack([p.grad for p in group])
            momentum.mul_(0.95).add_(grads)
            updates = orthogonal(grads.add(momentum, alpha=0.95)).unbind()
            torch._foreach_mul_(group, 1 - move * DECAY)
            torch._foreach_add_(group, updates, alpha=-move)
            for p in group:
                p.grad = None
        for settings in self.adam.param_groups:
            settings["lr"] = self.plan.other_rate * rate
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)


def positions(rows: int, length: int, context: int, device: torch.device) -> Tensor:
    at = torch.arange(length, device=device).expand(rows, -1)
    if context <= length:
        return at
    place = torch.randint(1, length, (rows, 1), device=device)
    jump = torch.randint(1, context - length, (rows, 1), device=device) * (torch.rand(rows, 1, device=device) < 0.33)
    return at + (at >= place) * jump


def loss_of(model: Model, rows: Tensor, at: Tensor, *, bf16: bool) -> Tensor:
    """Mean cross-entropy (nats per token) over the tokens to be learned; the others need no logits."""
    tokens, wanted = (rows % LEARNED).long(), rows[:, 1:] >= LEARNED
    with torch.autocast(rows.device.type, dtype=torch.bfloat16, enabled=bf16):
        logits = model.logits(model.hidden(tokens[:, :-1], at)[wanted])
    return functional.cross_entropy(logits.float(), tokens[:, 1:][wanted])


def held_out(model: Model, folder: Path, length: int, batch: int, *, bf16: bool) -> float:
    """Nats per token. Gradients stay on, because a compiled model would be compiled anew without them."""
    device = model.token_embd.weight.device
    rows = torch.from_numpy(np.load(folder / f"held-out-{length}.npy").astype(np.int32)).to(device)
    losses, counts = [], []
    for part in rows.split(batch):
        at = torch.arange(length, device=device).expand(len(part), -1)
        losses.append(loss_of(model, part, at, bf16=bf16).item())
        counts.append(int((part[:, 1:] >= LEARNED).sum()))
    return float(np.average(losses, weights=counts))


def save(model: Model, out: Path) -> None:
    """Half of the weights in each of two files, as f16."""
    state = [(k, v.half().cpu()) for k, v in model.state_dict().items()]
    total, halves = 0, ({}, {})
    for key, value in state:
        halves[total * 2 >= sum(v.numel() for _, v in state)][key] = value
        total += value.numel()
    for number, half in enumerate(halves, 1):
        fresh = out / f"weights-{number}.new"
        torch.save(half, fresh)
        fresh.replace(out / f"weights-{number}.pt")


def sources(name: str, folder: Path, makers: int) -> Makers | None:
    """A quarter of the processes makes the longest rows."""
    lengths = [length for length, _, _ in PLANS[name].parts]
    if not makers:
        return None
    long = max(1, makers // 4)
    return Makers(name, folder, {lengths[0]: makers - long, lengths[-1]: long})


def main() -> None:
    start = time.monotonic()
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--makers", type=int, help="processes that make rows; 0: rows from files")
    parser.add_argument("--batch", type=float, default=1.0, help="share of the usual rows per step")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    args = parser.parse_args()
    plan, shape, out = PLANS[args.name], SHAPES[args.name], args.out or args.folder
    out.mkdir(parents=True, exist_ok=True)
    cores = (os.cpu_count() or 2) - 1
    makers = sources(args.name, args.folder, cores if args.makers is None and args.gpu else args.makers or 0)
    device = torch.device("cuda" if args.gpu else "cpu")
    torch.set_num_threads(2)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = Model(shape).to(device)
    learner = Learner(model, plan)
    if args.gpu and not args.eager:
        compiling.suppress_errors = True
        compiling.recompile_limit = 64
        for block in model.blk:
            block.compile(dynamic=False)
    stores = {length: Rows(length, plan.room * plan.parts[0][0] // length, device) for length, _, _ in plan.parts}
    for length, store in stores.items():
        if not makers:
            store.add(np.load(args.folder / f"rows-{length}.npy"))
        while store.made < 256 and makers:
            makers.fill({length: store}, wait=60.0)
    print(
        f"{sum(p.numel() for p in model.parameters())} parameters, ready after {time.monotonic() - start:.0f} s",
        flush=True,
    )
    step, tokens, losses, tested, saved = 0, 0, [], -1e9, time.monotonic()
    with (out / "loss.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["seconds", "steps", "tokens", "row_length", "rate", "loss", "held_out_loss"])
        progress = 0.0
        while progress < 1.0:
            length, batch, _ = next(part for part in plan.parts if progress < part[2])
            batch = max(1, round(batch * args.batch))
            if makers:
                makers.fill(stores)
            at = positions(batch, length, shape.context, device)
            loss = loss_of(model, stores[length].batch(batch), at, bf16=args.gpu)
            loss.backward()
            rate = min(1.0, (step + 1) / plan.warmup, (1.0 - progress) / (1.0 - plan.hold))
            learner.step(rate)
            step, tokens = step + 1, tokens + batch * length
            losses.append(loss.detach())
            now = time.monotonic()
            progress = (now - start) / (60 * args.minutes) if args.minutes else step / (args.steps or plan.steps)
            if step % 20 == 0 or progress >= 1.0:
                test = now - tested > 20 or progress >= 1.0
                length_tested, rows_tested, _ = plan.parts[0]
                found = held_out(model, args.folder, length_tested, max(1, round(rows_tested * args.batch)), bf16=args.gpu) if test else None  # fmt: skip
                mean = torch.stack(losses).mean().item()
                losses, tested = [], now if test else tested
                table.writerow([f"{now - start:.1f}", step, tokens, length, f"{rate:.4f}", f"{mean:.4f}", "" if found is None else f"{found:.4f}"])  # fmt: skip
                if test:
                    file.flush()
                    print(f"{now - start:.0f} s, step {step}, {tokens / 1e6:.1f} M tokens, loss {mean:.4f}, held-out {found:.4f}", flush=True)  # fmt: skip
            if now - saved > 60:
                save(model, out)
                saved = now
    save(model, out)
    rows_made = {length: store.made for length, store in stores.items()}
    print(f"done after {time.monotonic() - start:.0f} s; rows made: {rows_made}", flush=True)
    if makers:
        makers.end()


if __name__ == "__main__":
    main()
