"""The audit of a data set: counts what training reads and what the checks of the labels found.

Samples are encoded and checked once, when they are stored for training. The audit reads that store.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmtrain.checks.findings import REFUSED, Finding
from mmtrain.config import Config
from mmtrain.config.data_section import Source
from mmtrain.dataset.encoding_spec import EncodingSpec
from mmtrain.dataset.samples import StoredSamples
from mmtrain.dataset.selection import Selected, equal_samples
from mmtrain.encoding.encode import Encoder
from mmtrain.encoding.load import processor_of
from mmtrain.errors import grouped
from mmtrain.inspect_labels.selected_samples import open_selected, selected_sources
from mmtrain.inspect_labels.view import view_sample
from mmtrain.progress import Progress

TOO_LONG = "too long"
NUM_SHOWN = 20
"""Faults of a kind that are printed."""
_NUM_LONGEST, _NUM_DUPLICATES = 10, 10


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
            "faults": {kind: list(map(_named, found)) for kind, found in self.faults.items()},
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
            yield f"\n{self.num_records:,} conversations gave {self.total('num_samples'):,} sequences"
        if self.shapes:
            yield f"\nRead as {', '.join(f'{shape} ({count:,})' for shape, count in self.shapes.most_common())}"
        if self.roles:
            yield f"Turns: {', '.join(f'{role} ({count:,})' for role, count in self.roles.most_common())}"
        yield from bars("Tokens of a sample", histogram(self.lengths))
        yield from bars("Longer side of an image, in pixels", histogram(self.image_sides))
        yield "\nLongest samples" if self.longest else ""
        yield from (f"  {length:>9,} tokens  {place}" for length, place in self.longest)
        if self.num_duplicates:
            yield f"\n{self.num_duplicates:,} samples are the same as an earlier one, such as"
            yield from (f"  {' = '.join(places[:3])}{' …' if len(places) > 3 else ''}" for places in self.duplicates)
        for why, count in self.left_out.items():
            yield f"\nLeft out: {count:,} {why}"
        for kind, count in self.notes.items():
            yield f"\nNote: {kind}: {count:,} times, first at\n  {': '.join(self.first_notes[kind])}"
        for kind, found in self.faults.items():
            yield f"\nFault: {kind}: {len(found):,} times"
            yield from fault_lines(found)
        yield f"\n{self.num_faults:,} faults" if self.faults else "\nNo faults"


def print_audit(
    split: str, titles: Sequence[str], rows: Sequence[Sequence[str]], lines: Iterable[str], console: Console
) -> None:
    """Print an audit: a table with the path and the figures of each source, then `lines`."""
    table = Table(box=None, pad_edge=False, title=f"Audit of data.{split}", title_justify="left")
    table.add_column("source", overflow="fold", max_width=26)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for path, *figures in rows:
        table.add_row(Text(Path(path).name), *figures)
    console.print(table)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def fault_lines(faults: Sequence[tuple[str, str]]) -> Iterator[str]:
    """The first of some (place, reason), similar ones together."""
    lines = grouped([f"{place}: {reason}" for place, reason in faults])
    yield from (f"  {line}" for line in lines[:NUM_SHOWN])
    if len(lines) > NUM_SHOWN:
        yield f"  and {len(lines) - NUM_SHOWN:,} more"


def _named(found: tuple[str, str]) -> dict[str, str]:
    return {"place": found[0], "reason": found[1]}


def histogram(counts: Counter[int]) -> list[dict[str, int]]:
    """Bins between powers of two; `from` and `to` are both in the bin. Empty bins between others are included."""
    bins: Counter[int] = Counter()
    for value, count in counts.items():
        bins[value.bit_length()] += count
    numbers = range(min(bins), max(bins) + 1) if bins else range(0)
    return [{"from": 2**number // 2, "to": 2**number - 1, "count": bins[number]} for number in numbers]


def bars(title: str, bins: list[dict[str, int]]) -> Iterator[str]:
    most = max((one["count"] for one in bins), default=0)
    yield f"\n{title}" if bins else ""
    for one in bins:
        label = f"{one['from']:,}-{one['to']:,}"
        yield f"  {label:>17} {one['count']:>11,} {'#' * -(-30 * one['count'] // most)}"


class _Counting:
    """Adds samples to a report, one after another."""

    def __init__(self, samples: StoredSamples, sources: Sequence[Source], split: str) -> None:
        self.report = AuditReport(split, [SourceReport(source.path) for source in sources])
        self.report.num_records = len(np.unique(samples.store.records))
        self._samples = samples
        self._encoded: list[int] = []
        for kind, note in samples.store.notes.items():
            self.report.notes[kind] = note.count
            self.report.first_notes[kind] = (str(samples.place(note.first)), note.reason)
        self._faults: dict[int, list[Finding]] = {}
        for fault in samples.store.faults:
            self._faults.setdefault(fault.index, []).append(Finding(fault.kind, True, fault.reason))

    def leave_out(self, found: Selected, split: str) -> None:
        """Count what the config does not select."""
        held_out = "held out for evaluation" if split == "train" else "trained on"
        numbers = {"duplicates": len(found.duplicates), held_out: len(found.other_side)}
        numbers["over max_samples"] = len(found.over_max)
        self.report.left_out.update({why: number for why, number in numbers.items() if number})

    def add(self, index: int, too_long: Finding | None) -> list[Finding]:
        """Count sample `index`, with the finding about its length if there is one. Returns all its findings."""
        report, store, place = self.report, self._samples.store, str(self._samples.place(index))
        source, num_tokens = report.sources[self._samples.records.source(index)], int(store.num_tokens[index])
        source.num_samples += 1
        source.num_refused += not num_tokens
        source.num_tokens += num_tokens
        source.num_supervised += int(store.num_supervised[index])
        source.num_images += int(store.num_images[index])
        found = self._faults.get(index, []) + ([] if too_long is None else [too_long])
        for finding in found:
            if finding.is_fault:
                source.num_faults += 1
                report.faults.setdefault(finding.kind, []).append((place, finding.reason))
            else:
                report.notes[finding.kind] += 1
                report.first_notes.setdefault(finding.kind, (place, finding.reason))
        report.image_sides.update(store.spans_of(index)[:, 3:].max(axis=1).tolist())
        if num_tokens:
            report.lengths[num_tokens] += 1
            report.longest.append((num_tokens, place))
            report.longest.sort(key=lambda one: -one[0])  # stable: equal lengths stay in order
            del report.longest[_NUM_LONGEST:]
            conversation = self._samples.records.conversation(index)
            report.shapes[conversation.shape] += 1
            report.roles.update(message.role for message in conversation.messages)
            self._encoded.append(index)
        return found

    def finish(self) -> AuditReport:
        """The report, with equal samples."""
        groups = equal_samples(self._samples, self._encoded)
        self.report.num_duplicates = sum(len(group) - 1 for group in groups)
        self.report.duplicates = [
            [str(self._samples.place(index)) for index in group] for group in groups[:_NUM_DUPLICATES]
        ]
        return self.report


def audit(
    config: Config,
    split: str = "train",
    on_row: Callable[[dict[str, Any]], None] | None = None,
    with_tokens: bool = False,
) -> AuditReport:
    """Audit every sample of `split` ("train" or "eval"), as it is stored for training.

    `on_row` is called with the JSON object of each sample, in order, with or without tokens. Raises UserError if a
    source cannot be read.
    """
    processor, progress = processor_of(config.model), Progress()
    with progress.task(f"checking {split}"):
        found = open_selected(config, split, processor, progress)
    samples, limit, store = found.samples, found.limit, found.samples.store
    sources = selected_sources(config, split).sources
    encoder = EncodingSpec.of(config, sources).encoder(processor)
    counting = _Counting(samples, sources, split)
    counting.leave_out(found.left_out, split)
    left_out = set(found.left_out.indices.tolist())
    with progress.task(f"auditing {split}", len(samples)) as task:
        for index in range(len(samples)):
            if index in left_out:
                task.advance()
                continue
            num_tokens = int(store.num_tokens[index])
            is_too_long, is_fault = num_tokens > limit.num_tokens, config.data.too_long == "error"
            reason = limit.reason(num_tokens, store.num_placeholders(index)) if is_too_long else None
            findings = counting.add(index, None if reason is None else Finding(TOO_LONG, is_fault, reason))
            if on_row is not None:
                on_row(_row(samples, encoder, index, findings, with_tokens))
            task.advance()
    return counting.finish()


def _row(
    samples: StoredSamples, encoder: Encoder, index: int, found: Sequence[Finding], with_tokens: bool
) -> dict[str, Any]:
    """The sample as one JSON object, with its faults if it has any."""
    place = samples.place(index)
    for finding in found:
        if finding.kind == REFUSED:
            record = samples.records.record(index)
            return {"source": str(place.file), "line": place.line, "index": record, "refused": finding.reason}
    faults = [{"kind": finding.kind, "reason": finding.reason} for finding in found if finding.is_fault]
    return view_sample(samples, encoder, index).row(with_tokens) | ({"faults": faults} if faults else {})
