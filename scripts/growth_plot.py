"""Line plots as one SVG file, by hand: panels side by side, each with axes, ticks and a legend."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from pathlib import Path

Points = list[tuple[float, float]]
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 380, 320, 62, 58, 18, 52
COLOURS = ("#1f5fa8", "#b4531a", "#3c7d3c")


@dataclass(frozen=True)
class Panel:
    """`lines`: name to points, x rising. Where `log_x` is off x may be 0; y is always logarithmic, and at least a
    tenfold range of it is shown, so that what hardly changes looks flat."""

    title: str
    x: str
    y: str
    lines: dict[str, Points]
    log_x: bool = True


def draw(panels: list[Panel], caption: list[str], path: Path) -> None:
    """Write the panels, with lines of text below."""
    height = HEIGHT + 16 * len(caption) + 14
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH * len(panels)}" height="{height}" '
        'font-family="sans-serif" font-size="11" fill="#222">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, panel in enumerate(panels):
        parts += [f'<g transform="translate({number * WIDTH} 0)">', *_panel(panel), "</g>"]
    parts += [_text(12, HEIGHT + 16 * (n + 1), line, "start") for n, line in enumerate(caption)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")


def _panel(panel: Panel) -> list[str]:
    xs = [x for points in panel.lines.values() for x, _ in points]
    ys = [y for points in panel.lines.values() for _, y in points]
    low, high = _range(ys)
    first, last = (math.log10(min(xs)), math.log10(max(xs))) if panel.log_x else (min(xs), max(xs))
    span = last - first or 1.0
    inner, bottom = WIDTH - LEFT - RIGHT, HEIGHT - BOTTOM

    def across(x: float) -> float:
        return LEFT + inner * ((math.log10(x) if panel.log_x else x) - first) / span

    def up(y: float) -> float:
        return bottom - (bottom - TOP) * (math.log10(y) - low) / (high - low)

    parts = [_text(WIDTH / 2, 18, panel.title, "middle", "bold"), _text(WIDTH / 2, HEIGHT - 14, panel.x, "middle")]
    parts.append(_text(LEFT - 50, TOP - 24, panel.y, "start"))
    for x in sorted(set(xs)):
        parts += [_line(across(x), bottom, across(x), bottom + 4), _text(across(x), bottom + 17, _short(x), "middle")]
    for exponent in range(math.floor(low), math.ceil(high) + 1):
        for tick in (1, 2, 5):
            y = tick * 10.0**exponent
            if low - 1e-9 <= math.log10(y) <= high + 1e-9:
                parts += [
                    _line(LEFT, up(y), WIDTH - RIGHT, up(y), "#ddd"),
                    _text(LEFT - 6, up(y) + 4, _short(y), "end"),
                ]
    parts += [_line(LEFT, TOP, LEFT, bottom), _line(LEFT, bottom, WIDTH - RIGHT, bottom)]
    for number, (name, points) in enumerate(panel.lines.items()):
        colour, key = COLOURS[number], TOP - 24 + 13 * number
        track = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
        parts.append(f'<polyline points="{track}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3" fill="{colour}"/>' for x, y in points]
        parts += [_line(WIDTH - 190, key - 4, WIDTH - 172, key - 4, colour, 2), _text(WIDTH - 166, key, name, "start")]
    return parts


def _range(ys: list[float]) -> tuple[float, float]:
    """Logarithms of the lower and the upper end of the axis."""
    low, high = math.log10(min(ys)), math.log10(max(ys))
    spare = max(0.15, (1.0 - (high - low)) / 2)
    return low - spare, high + spare


def _short(value: float) -> str:
    for factor, unit in ((1e6, "M"), (1e3, "k")):
        if value >= factor and value % (factor / 10) == 0:
            return f"{value / factor:g}{unit}"
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


def _text(x: float, y: float, words: str, anchor: str, weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str = "#222", width: int = 1) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{colour}" stroke-width="{width}"/>'
