"""The plot of the study as SVG: a dot with its interval for each set of components, in three panels."""

from collections.abc import Callable, Iterator
from html import escape

from component_study.table import Row

_ROW, _LEFT, _PANEL, _GAP, _TOP = 22, 220, 230, 30, 50
_COLOURS = {"lora": "#1f77b4", "full": "#d62728", "none": "#555555"}
_PANELS: tuple[tuple[str, Callable[[Row], list[float]]], ...] = (
    ("exact match, %", lambda row: [100 * value for value in row["exact_match"]]),
    ("other task: exact match, %", lambda row: [100 * value for value in row["other_exact_match"]]),
    ("other task: KL from base, nats", lambda row: row["other_divergence"]),
)


def draw(rows: list[Row]) -> str:
    width = _LEFT + len(_PANELS) * (_PANEL + _GAP)
    height = _TOP + len(rows) * _ROW + 30
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
            'font-size="12">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *_names(rows),
            *(line for number, panel in enumerate(_PANELS) for line in _panel(rows, number, *panel)),
            "</svg>\n",
        ]
    )


def _y(number: int) -> float:
    return _TOP + (number + 0.5) * _ROW


def _names(rows: list[Row]) -> Iterator[str]:
    for number, row in enumerate(rows):
        name = f"{row['mode']}: {' + '.join(row['components'])}" if row["components"] else "base"
        colour = _COLOURS[row["mode"]]
        yield f'<text x="{_LEFT - 10}" y="{_y(number) + 4}" text-anchor="end" fill="{colour}">{escape(name)}</text>'


def _panel(rows: list[Row], number: int, title: str, values: Callable[[Row], list[float]]) -> Iterator[str]:
    """One measure: its axis from 0 (or the lowest end) to the highest end of an interval."""
    found = [values(row) for row in rows]
    low, high = min(0.0, *(one[1] for one in found)), max(one[2] for one in found) or 1.0
    left = _LEFT + number * (_PANEL + _GAP)

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * _PANEL

    bottom = _TOP + len(rows) * _ROW
    yield f'<text x="{left}" y="{_TOP - 22}" font-weight="bold">{escape(title)}</text>'
    for part in range(5):
        value = low + (high - low) * part / 4
        yield f'<line x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{_TOP}" y2="{bottom}" stroke="#dddddd"/>'
        yield f'<text x="{x(value):.1f}" y="{bottom + 16}" text-anchor="middle" fill="#555555">{value:.3g}</text>'
    for place, (row, (mean, start, end)) in enumerate(zip(rows, found, strict=True)):
        colour, y = _COLOURS[row["mode"]], _y(place)
        yield f'<line x1="{x(start):.1f}" x2="{x(end):.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>'
        yield f'<circle cx="{x(mean):.1f}" cy="{y}" r="4" fill="{colour}"/>'
