"""Line and bar charts as coordinates, which the page draws as SVG: scales, ticks, paths and labels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mmtrain.report.series import Series, thinned

WIDTH, HEIGHT = 560, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 10, 30
_LOG_RATIO = 20.0
"""An axis is logarithmic where the largest value is so many times the smallest and all are above 0."""


@dataclass(frozen=True, slots=True)
class Tick:
    at: float
    """Pixels from the left or the top."""
    label: str


@dataclass(frozen=True, slots=True)
class Line:
    """A series, drawn."""

    name: str
    path: str
    points: tuple[tuple[float, float, str], ...]
    """(x, y, label) of each marked point."""
    style: str
    run: int


@dataclass(frozen=True, slots=True)
class Bar:
    x: float
    y: float
    width: float
    height: float
    label: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A plot of `WIDTH` by `HEIGHT` pixels."""

    title: str
    x_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...] = ()
    bars: tuple[Bar, ...] = ()
    is_log: bool = False

    width, height = WIDTH, HEIGHT
    left, right, bottom, top = _LEFT, WIDTH - _RIGHT, HEIGHT - _BOTTOM, _TOP


@dataclass(frozen=True, slots=True)
class _Scale:
    """Maps values to pixels, linearly or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.is_log else value
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)


def line_chart(title: str, series: Sequence[Series], unit: str = "", allow_log: bool = False) -> Chart | None:
    """A chart of values over steps; None where no series has a finite value."""
    series = [_finite(one) for one in series]
    series = [thinned(one) for one in series if len(one.values)]
    if not series:
        return None
    steps = np.concatenate([one.steps for one in series])
    values = np.concatenate([one.values for one in series])
    is_log = allow_log and values.min() > 0 and values.max() >= _LOG_RATIO * values.min()
    x_ticks, x_scale = _linear_axis(steps.min(), steps.max(), _LEFT, WIDTH - _RIGHT, tight=True)
    make_axis = _log_axis if is_log else _linear_axis
    y_ticks, y_scale = make_axis(values.min(), values.max(), HEIGHT - _BOTTOM, _TOP)
    return Chart(
        title=title + (f" ({unit})" if unit else ""),
        x_label="step",
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        lines=tuple(_drawn(one, x_scale, y_scale) for one in series),
        is_log=bool(is_log),
    )


def bar_chart(title: str, x_label: str, ranges: Sequence[tuple[int, int]], counts: Sequence[int]) -> Chart:
    """A bar for each range of whole numbers, first to last, all of the same width; of many ranges some are written."""
    y_ticks, y_scale = _linear_axis(0, max(counts), HEIGHT - _BOTTOM, _TOP)
    width = (WIDTH - _RIGHT - _LEFT) / len(ranges)
    every = -(-len(ranges) // 6)
    bars, ticks = [], []
    for i, ((first, last), count) in enumerate(zip(ranges, counts, strict=True)):
        left, name = _LEFT + i * width, f"{first:,}–{last:,}"
        if count:
            y, label = y_scale(count), f"{name}: {count:,}"
            bars.append(Bar(round(left + 1, 1), y, max(round(width - 2, 1), 0.5), y_scale(0) - y, label))
        if i % every == 0:
            ticks.append(Tick(round(left + width / 2, 1), name))
    return Chart(title, x_label, tuple(ticks), y_ticks, bars=tuple(bars))


def short_number(value: float) -> str:
    """A figure in few characters: 98,210 or 1.246 or 3.2e-05."""
    if value and abs(value) < 1e-3:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _short(value: float) -> str:
    """A figure next to an axis, where there is room for seven characters: 98,210 or 1e+06."""
    return f"{value:.3g}" if abs(value) >= 1e6 else short_number(value)


def _finite(series: Series) -> Series:
    kept = np.isfinite(series.values)
    return replace(series, steps=series.steps[kept], values=series.values[kept])


def _drawn(series: Series, x_scale: _Scale, y_scale: _Scale) -> Line:
    points = tuple(
        (x_scale(step), y_scale(value), f"{series.name}, step {step:,.0f}: {short_number(value)}")
        for step, value in zip(series.steps, series.values, strict=True)
    )
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y, _ in points)
    is_marked = series.marked or len(points) == 1
    return Line(series.name, path, points if is_marked else (), series.style, series.run)


def _linear_axis(
    low: float, high: float, start: float, end: float, tight: bool = False
) -> tuple[tuple[Tick, ...], _Scale]:
    """Ticks at multiples of 1, 2 or 5 times a power of ten, about five; `tight`: the axis ends at the last value."""
    if low == high:
        low, high = (low - 1, high + 1) if tight else (min(low, 0.0), high or 1.0)
    if low == high:
        high = low + 1
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    if not tight:
        low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    scale = _Scale(low, high, start, end)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(Tick(scale(i * step), _short(i * step)) for i in range(first, last + 1)), scale


def _log_axis(low: float, high: float, start: float, end: float) -> tuple[tuple[Tick, ...], _Scale]:
    """Ticks at powers of ten, with 2 and 5 times them where these are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    scale = _Scale(first, last, start, end, is_log=True)
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    every = 1 + (last - first) // 8
    values = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    return tuple(Tick(scale(value), _short(value)) for value in values if value <= 10.0**last), scale
