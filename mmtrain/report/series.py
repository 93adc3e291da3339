"""Series of a run's figures over its steps, smoothed, and thinned for a plot without losing its extremes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

MAX_AVERAGED = 50
"""Steps, up to each one, whose average is the smoothed value, as on the progress bar; in a run of fewer than ten times
as many steps a tenth of them, so that the average follows the values."""
NUM_BUCKETS = 400
"""A plot of more than twice as many steps shows the lowest and the highest value of each bucket of steps."""

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a plot."""

    name: str
    steps: Values
    """(num_points,)"""
    values: Values
    """(num_points,)"""
    style: str = "line"
    """The class that the page draws it with: `line`, `faint` or `dashed`, with the points marked or not."""
    marked: bool = False
    run: int = 0
    """Which run it is of, where several are compared: its colour."""


def smoothed(values: Values) -> Values:
    """The mean of each value and those before it, as many as `num_averaged` says, fewer at the start. Same shape."""
    num = num_averaged(len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - num, 0)
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts))


def num_averaged(num_steps: int) -> int:
    return max(1, min(MAX_AVERAGED, num_steps // 10))


def thinned(series: Series) -> Series:
    """The series with at most two points for each bucket: those of the lowest and the highest value."""
    if len(series.values) <= 2 * NUM_BUCKETS:
        return series
    kept: set[int] = {0, len(series.values) - 1}
    for bucket in np.array_split(np.arange(len(series.values)), NUM_BUCKETS):
        values = series.values[bucket]
        kept |= {int(bucket[values.argmin()]), int(bucket[values.argmax()])}
    chosen = np.array(sorted(kept))
    return replace(series, steps=series.steps[chosen], values=series.values[chosen])


def column(rows: Sequence[dict[str, float]], key: str) -> tuple[Values, Values]:
    """The steps and the values of one key in the rows that have it."""
    found = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.array(steps, np.float64), np.array(values, np.float64)
