"""Line plots next to each other, drawn by matplotlib (`pip install "mmtrain[plots]"`)."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """`lines`: name to points, with rising x. x may be 0 unless `log_x`. y is always logarithmic and covers at least a
    factor of ten, so that small changes look small."""

    title: str
    x: str
    y: str
    lines: dict[str, Points]
    log_x: bool = True


def require_matplotlib() -> None:
    """End the program with a message where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit('--plot: matplotlib is missing: expected the extra "plots", pip install -e ".[plots]"')


def draw(panels: list[Panel], caption: list[str], path: Path) -> None:
    """Write the panels, with lines of text below them, to a file of the kind that its name says, such as .svg."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(panels), 3.9), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_panel(axes, panel)
    figure.supxlabel("\n".join(caption), fontsize=8, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.fonttype": "none"}):  # text stays text
        figure.savefig(path)


def _draw_panel(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    for name, points in panel.lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    low, high = _range([y for points in panel.lines.values() for _, y in points])
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y, yscale="log", ylim=(low, high))
    if panel.log_x:
        axes.set_xscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", alpha=0.3)
    axes.legend()


def _range(ys: list[float]) -> tuple[float, float]:
    """The lower and the upper end of the axis."""
    low, high = math.log10(min(ys)), math.log10(max(ys))
    margin = max(0.15, (1.0 - (high - low)) / 2)
    return 10 ** (low - margin), 10 ** (high + margin)
