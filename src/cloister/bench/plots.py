"""Plots of what was measured, as PNG and SVG: two kinds, legible in print, told apart by shape as well as by colour.

The same figures give the same SVG, byte for byte, so a plot under version control changes only when its figures do.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cloister.errors import WrongUse

__all__ = ["bars", "lines", "require"]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's palette without its yellow, which is too pale for a line: https://jfly.uni-koeln.de/color/."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h")
_STYLE: Mapping[str, Any] = MappingProxyType(
    {
        "svg.hashsalt": "cloister",
        "svg.fonttype": "path",  # drawn, so that it looks alike where the font is missing
        "font.family": "DejaVu Sans",  # comes with matplotlib
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#dddddd",
        "figure.figsize": (8.0, 5.0),
        "figure.constrained_layout.use": True,
    }
)


def require() -> None:
    """For a command to call before it measures for minutes. Raises: WrongUse when there is no matplotlib."""
    _matplotlib()


def lines(
    path_stem: Path,
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
) -> None:
    """One line with markers for each of `series`, from 0 up; a doubling of x is a step, each x marked.

    Writes `path_stem` with .png and .svg appended. Raises: WrongUse when there is no matplotlib.
    """
    with _figure(path_stem, title, y_label) as axes:
        for at, (name, points) in enumerate(series.items()):
            ordered = sorted(points)
            style = {"color": _COLOURS[at % len(_COLOURS)], "marker": _MARKERS[at % len(_MARKERS)]}
            axes.plot([x for x, _ in ordered], [y for _, y in ordered], label=_plain(name), linewidth=2, **style)
        marks = sorted({x for points in series.values() for x, _ in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(marks, [f"{x:g}" for x in marks])
        axes.minorticks_off()
        axes.set_xlabel(_plain(x_label))
        axes.set_ylim(bottom=0)
        if series:
            axes.legend(frameon=False)


def bars(path_stem: Path, title: str, y_label: str, values: Mapping[str, float]) -> None:
    """One bar for each of `values`, in their order, its figure above it. Writes and raises as `lines` does."""
    with _figure(path_stem, title, y_label) as axes:
        drawn = axes.bar([_plain(name) for name in values], list(values.values()), color=_COLOURS[0], width=0.65)
        axes.bar_label(drawn, labels=[_short(value) for value in values.values()], padding=2)
        axes.grid(visible=False, axis="x")
        axes.margins(y=0.1)
        if len(values) > 6 or any(len(name) > 12 for name in values):
            axes.tick_params(axis="x", rotation=30)
            for label in axes.get_xticklabels():
                label.set_horizontalalignment("right")


@contextmanager
def _figure(path_stem: Path, title: str, y_label: str) -> Iterator[Any]:
    """Axes to draw on, written to both files afterwards. The drawing back ends are named: no display is looked for."""
    matplotlib = _matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # optional package
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
        figure = Figure()
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_title(_plain(title))
        axes.set_ylabel(_plain(y_label))
        yield axes
        path_stem.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(f"{path_stem}.png", dpi=150, metadata={"Software": None})
        figure.savefig(f"{path_stem}.svg", metadata={"Date": None, "Creator": None})


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _plain(text: str) -> str:
    """matplotlib reads what stands between two dollars as mathematics."""
    return text.replace("$", r"\$")


def _matplotlib() -> Any:
    try:
        import matplotlib  # optional package
    except ModuleNotFoundError as error:
        raise WrongUse(
            "Plots need the Python package matplotlib, which is not installed.", hint="pip install 'cloister[bench]'"
        ) from error
    return matplotlib
