"""Draw a training run's loss curve as SVG.

    python curve.py DIR/loss.csv OUT.svg

Nats per token over millions of tokens, both axes logarithmic. The same figures give the same bytes.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams.update(
    {"svg.hashsalt": "cloister", "font.family": "DejaVu Sans", "axes.grid": True, "grid.color": "#dddddd"}
)

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402


def draw(axes: Axes, rows: list[dict[str, str]]) -> None:
    """The loss of each twenty steps, the held-out loss where it was taken, and where the rows become longer."""
    tokens = [int(row["tokens"]) / 1e6 for row in rows]
    axes.plot(tokens, [float(row["loss"]) for row in rows], color="#0072B2", linewidth=1, label="training")
    tested = [(at, float(row["held_out_loss"])) for at, row in zip(tokens, rows, strict=True) if row["held_out_loss"]]
    axes.plot(
        *zip(*tested, strict=True),
        color="#D55E00",
        marker="o",
        markersize=4,
        linestyle="none",
        label="held-out (rows of 1,024)",
    )
    longer = next(
        (at for at, row in zip(tokens, rows, strict=True) if row["row_length"] != rows[0]["row_length"]), None
    )
    if longer is not None:
        axes.axvline(
            longer, color="#000000", linestyle=":", label=f"rows of {int(rows[-1]['row_length']):,} from here on"
        )
    axes.set(xscale="log", yscale="log", xlabel="million tokens", ylabel="loss of answers and prose, nats per token")
    for axis, marks in ((axes.xaxis, (1, 3, 10, 30, 100, 300, 800)), (axes.yaxis, (0.1, 0.2, 0.5, 1, 2, 5))):
        axis.set_ticks(marks, [f"{mark:g}" for mark in marks])
        axis.set_ticks([], minor=True)
    axes.legend()


def main() -> None:
    with Path(sys.argv[1]).open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    draw(axes, rows)
    figure.savefig(sys.argv[2], format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
