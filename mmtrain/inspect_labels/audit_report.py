"""What an audit of a data set found: as plain data, and as text in 80 columns."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmtrain.errors import grouped
from mmtrain.safe_text import counted, visible

NUM_SHOWN = 20
"""Faults of a kind that are printed."""


@dataclass(slots=True)
class SourceReport:
    """The counts of one source of the config."""

    path: str
    num_samples: int = 0
    num_refused: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    num_images: int = 0
    num_faults: int = 0


_COUNTS = [name for name in SourceReport.__slots__ if name != "path"]


@dataclass(slots=True)
class AuditReport:
    """The results of the audit of one split. Places are `file:line`."""

    split: str
    sources: list[SourceReport]
    num_records: int = 0
    """Fewer than samples where the replies of a conversation are trained on in sequences of their own."""
    lengths: Counter[int] = field(default_factory=Counter)
    image_sides: Counter[int] = field(default_factory=Counter)  # the longer side of each image
    longest: list[tuple[int, str]] = field(default_factory=list)
    """(number of tokens, place), the longest first."""
    num_duplicates: int = 0
    """Samples that are the same as an earlier one."""
    duplicates: list[list[str]] = field(default_factory=list)  # the places of the first groups
    faults: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """By kind, (place, reason) in the order of the samples."""
    notes: Counter[str] = field(default_factory=Counter)
    first_notes: dict[str, tuple[str, str]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    """Samples that the config does not select, by the reason. They are in no other count."""
    roles: Counter[str] = field(default_factory=Counter)
    """How many turns of these samples have each role."""
    shapes: Counter[str] = field(default_factory=Counter)
    """How many of the samples that are not refused have each shape of record."""

    @property
    def num_faults(self) -> int:
        return sum(map(len, self.faults.values()))

    def total(self, name: str) -> int:
        return sum(getattr(source, name) for source in self.sources)

    def row(self) -> dict[str, Any]:
        """The report as one JSON object."""
        tokens = self.total("num_tokens")
        return {
            "split": self.split,
            "num_records": self.num_records,
            **{name: self.total(name) for name in _COUNTS},
            "supervised_share": self.total("num_supervised") / tokens if tokens else 0.0,
            "sources": [{name: getattr(source, name) for name in ("path", *_COUNTS)} for source in self.sources],
            "length_histogram": histogram(self.lengths),
            "image_histogram": histogram(self.image_sides),
            "longest": [{"num_tokens": length, "place": place} for length, place in self.longest],
            "num_duplicates": self.num_duplicates,
            "duplicates": self.duplicates,
            "faults": {
                kind: [{"place": place, "reason": reason} for place, reason in found]
                for kind, found in self.faults.items()
            },
            "notes": dict(self.notes),
            "left_out": dict(self.left_out),
            "roles": dict(self.roles),
            "shapes": dict(self.shapes),
        }

    def print(self, console: Console) -> None:
        """Print the report in 80 columns."""
        everything = SourceReport("all", *map(self.total, _COUNTS))
        rows = []
        for source in [*self.sources, everything] if len(self.sources) > 1 else self.sources:
            samples, refused, tokens, supervised, images, faults = (getattr(source, name) for name in _COUNTS)
            counts = [f"{count:,}" for count in (samples, refused, tokens, images, faults)]
            counts.insert(3, f"{supervised / tokens if tokens else 0:.1%}")
            rows.append((source.path, *counts))
        titles = ("samples", "refused", "tokens", "trained on", "images", "faults")
        print_audit(self.split, titles, rows, self._lines(), console)

    def _lines(self) -> Iterator[str]:
        if self.num_records < self.total("num_samples"):
            yield f"\n{counted(self.num_records, 'conversation')} gave {counted(self.total('num_samples'), 'sequence')}"
        if self.shapes:
            yield f"\nRead as {', '.join(f'{shape} ({count:,})' for shape, count in self.shapes.most_common())}"
        if self.roles:
            yield f"Turns: {', '.join(f'{role} ({count:,})' for role, count in self.roles.most_common())}"
        yield from bars("Tokens of a sample", histogram(self.lengths))
        yield from bars("Longer side of an image, in pixels", histogram(self.image_sides))
        if self.longest:
            yield "\nLongest samples"
        yield from (f"  {length:>9,} tokens  {place}" for length, place in self.longest)
        if self.num_duplicates:
            yield f"\n{counted(self.num_duplicates, 'sample')} the same as an earlier one, such as"
            yield from (f"  {' = '.join(places[:3])}{' …' if len(places) > 3 else ''}" for places in self.duplicates)
        for why, count in self.left_out.items():
            yield f"\nLeft out: {count:,} {why}"
        for kind, count in self.notes.items():
            yield f"\nNote: {kind}: {counted(count, 'time')}, first at\n  {': '.join(self.first_notes[kind])}"
        for kind, found in self.faults.items():
            yield f"\nFault: {kind}: {counted(len(found), 'time')}"
            yield from fault_lines(found)
        yield verdict(self.num_faults)


def print_audit(
    split: str, titles: Sequence[str], rows: Sequence[Sequence[str]], lines: Iterable[str], console: Console
) -> None:
    """Print an audit: a table with the path and the figures of each source, then `lines`."""
    table = Table(box=None, pad_edge=False, title=f"Audit of data.{split}", title_justify="left")
    table.add_column("source", overflow="fold", max_width=26)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for path, *figures in rows:
        table.add_row(Text(visible(Path(path).name)), *figures)
    console.print(table)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def verdict(num_faults: int) -> str:
    """The last line of an audit, and what to do where there are faults."""
    if not num_faults:
        return "\nNo faults"
    return f"\n{counted(num_faults, 'fault')}: correct the data, or leave such samples out with data.on_fault: skip"


def fault_lines(faults: Sequence[tuple[str, str]]) -> Iterator[str]:
    """The first of some (place, reason), similar ones together."""
    lines = grouped([f"{place}: {reason}" for place, reason in faults])
    yield from (f"  {line}" for line in lines[:NUM_SHOWN])
    if len(lines) > NUM_SHOWN:
        yield f"  and {len(lines) - NUM_SHOWN:,} more"


def histogram(counts: Counter[int]) -> list[dict[str, int]]:
    """Bins between powers of two; `from` and `to` are both in the bin. Empty bins between others are included."""
    bins: Counter[int] = Counter()
    for value, count in counts.items():
        bins[value.bit_length()] += count
    numbers = range(min(bins), max(bins) + 1) if bins else range(0)
    return [{"from": 2**number // 2, "to": 2**number - 1, "count": bins[number]} for number in numbers]


def bars(title: str, bins: list[dict[str, int]]) -> Iterator[str]:
    most = max((one["count"] for one in bins), default=0)
    if bins:
        yield f"\n{title}"
    for one in bins:
        label = f"{one['from']:,}-{one['to']:,}"
        yield f"  {label:>17} {one['count']:>11,} {'#' * -(-30 * one['count'] // most)}"
