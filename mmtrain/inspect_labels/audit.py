"""The audit of a whole data set: every sample encoded as in training, its labels checked, and what was found counted.

Samples are looked at in chunks by several processes and added up in their own order, so that the report does not
depend on how many there are.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text as Plain

from mmtrain.config import Config
from mmtrain.config.schema import Source
from mmtrain.data.chat import Conversation, SampleError, Text
from mmtrain.data.encode import Encoded, Encoder
from mmtrain.data.images import Picture, decode
from mmtrain.data.pool import map_in_processes, num_cores
from mmtrain.data.processor import load_processor
from mmtrain.data.samples import SampleSet
from mmtrain.errors import UserError
from mmtrain.inspect_labels.checks import IGNORED, Checker, Finding
from mmtrain.inspect_labels.view import view_sample
from mmtrain.model.load import length_limit

REFUSED, TOO_LONG, BROKEN, UNCHECKED = "refused", "too long", "does not decode", "cannot be checked"
_CHUNK = 64
_NUM_LONGEST, _NUM_DUPLICATES, _NUM_SHOWN = 10, 10, 20
_MANY, _MANY_TO_DECODE = 16_000, 1_000
"""Samples from which on a second process is worth the seconds that it takes to start."""


_Task = tuple[Config, str, bool, bool, bool]  # what a worker is made from


@dataclass(frozen=True, slots=True)
class _Sample:
    """What the audit keeps of one sample. `num_tokens` is 0 where it is refused."""

    index: int
    num_tokens: int = 0
    num_supervised: int = 0
    sizes: tuple[tuple[int, int], ...] = ()
    digest: bytes = b""
    findings: tuple[Finding, ...] = ()
    row: dict[str, Any] | None = None


def _sources(config: Config, split: str) -> Sequence[Source]:
    sources = config.data.train if split == "train" else config.data.eval
    if not sources:
        raise UserError(f"data.{split}: there is no source to audit")
    return sources


class _Worker:
    """Looks at samples: the processor is loaded and the files are opened once a process."""

    def __init__(self, config: Config, split: str, decode: bool, with_rows: bool, with_tokens: bool) -> None:
        labels = config.labels
        processor = load_processor(config.model.path)
        self.samples = SampleSet(_sources(config, split), Encoder(processor, labels.train_on, labels.end_of_turn))
        self._checker = Checker(processor, labels.train_on, labels.end_of_turn)
        self._limit = length_limit(config.model.path, config.data.max_length)
        self._too_long = config.data.too_long
        self._decode, self._with_rows, self._with_tokens = decode, with_rows, with_tokens

    def look_at(self, index: int) -> _Sample:
        samples, place = self.samples, self.samples.place(index)
        try:
            encoded = samples.encoded(index)
        except SampleError as error:
            row = {"source": str(place.file), "line": place.line, "index": index, "refused": str(error)}
            return _Sample(index, findings=(Finding(REFUSED, True, str(error)),), row=row if self._with_rows else None)
        conversation = samples.conversation(index)
        return _Sample(
            index,
            encoded.num_tokens,
            encoded.num_supervised,
            tuple(span.picture.size for span in encoded.images),
            _digest(conversation, [span.picture for span in encoded.images]),
            tuple(self._findings(encoded, conversation)),
            view_sample(samples, index).row(self._with_tokens) if self._with_rows else None,
        )

    def _findings(self, encoded: Encoded, conversation: Conversation) -> Iterator[Finding]:
        if encoded.num_tokens > self._limit:
            reason = f"{encoded.num_tokens:,} tokens, over the {self._limit:,} allowed (data.max_length)"
            yield Finding(TOO_LONG, self._too_long == "error", reason)
        labels = np.where(encoded.supervised, encoded.ids, IGNORED).tolist()
        sizes = [span.picture.size for span in encoded.images]
        try:
            yield from self._checker.check(encoded.ids.tolist(), labels, conversation, sizes)
        except SampleError as error:
            yield Finding(UNCHECKED, True, str(error))
        for span in encoded.images if self._decode else ():
            try:
                decode(span.picture)
            except SampleError as error:
                yield Finding(BROKEN, True, str(error))


_workers: list[_Worker] = []  # the one of this process, where it is a pool's


def _start_worker(*task: Any) -> None:
    _workers[:] = [_Worker(*task)]


def _look_in_pool(indices: range) -> list[_Sample]:
    return list(map(_workers[0].look_at, indices))


def _digest(conversation: Conversation, pictures: list[Picture], with_bytes: bool = False) -> bytes:
    """A hash of the words and, of the pictures, of their sizes and numbers of bytes; or of the bytes themselves."""
    made = hashlib.blake2b(digest_size=16)
    for message in conversation.messages:
        parts = [part.text if isinstance(part, Text) else None for part in message.parts]
        made.update(repr((message.role, message.train, parts)).encode())
    for picture in pictures:
        data = picture.source
        if with_bytes:
            data = data.read_bytes() if isinstance(data, Path) else data
            made.update(hashlib.sha256(data).digest())
        num_bytes = data.stat().st_size if isinstance(data, Path) else len(data)
        made.update(repr((picture.size, num_bytes)).encode())
    return made.digest()


@dataclass(slots=True)
class SourceReport:
    """What one source of the config holds."""

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
    """What the audit of one split found. Places are `file:line`."""

    split: str
    sources: list[SourceReport]
    lengths: Counter[int] = field(default_factory=Counter)
    image_sides: Counter[int] = field(default_factory=Counter)  # the longer side of each picture
    longest: list[tuple[int, str]] = field(default_factory=list)
    """(number of tokens, place), the longest first."""
    num_duplicates: int = 0
    """Samples that are the same as an earlier one."""
    duplicates: list[list[str]] = field(default_factory=list)  # the places of the first groups
    faults: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """Of each kind (place, reason), in the order of the samples."""
    notes: Counter[str] = field(default_factory=Counter)
    first_notes: dict[str, tuple[str, str]] = field(default_factory=dict)

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
            **{name: self.total(name) for name in _COUNTS},
            "supervised_share": self.total("num_supervised") / tokens if tokens else 0.0,
            "sources": [{name: getattr(source, name) for name in ("path", *_COUNTS)} for source in self.sources],
            "length_histogram": _histogram(self.lengths),
            "image_histogram": _histogram(self.image_sides),
            "longest": [{"num_tokens": length, "place": place} for length, place in self.longest],
            "num_duplicates": self.num_duplicates,
            "duplicates": self.duplicates,
            "faults": {kind: list(map(_named, found)) for kind, found in self.faults.items()},
            "notes": dict(self.notes),
        }

    def print(self, console: Console) -> None:
        """The report for a person, in 80 columns."""
        table = Table(box=None, pad_edge=False, title=f"Audit of data.{self.split}", title_justify="left")
        table.add_column("source", overflow="fold", max_width=26)
        for name in ("samples", "refused", "tokens", "learned", "images", "faults"):
            table.add_column(name, justify="right", no_wrap=True)
        everything = SourceReport("all", *map(self.total, _COUNTS))
        for source in [*self.sources, everything] if len(self.sources) > 1 else self.sources:
            samples, refused, tokens, learned, images, faults = (getattr(source, name) for name in _COUNTS)
            counts = [f"{count:,}" for count in (samples, refused, tokens, images, faults)]
            counts.insert(3, f"{learned / tokens if tokens else 0:.1%}")
            table.add_row(Plain(Path(source.path).name), *counts)
        console.print(table)
        for line in self._lines():
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _lines(self) -> Iterator[str]:
        yield from _bars("Tokens of a sample", _histogram(self.lengths))
        yield from _bars("Longer side of a picture, in pixels", _histogram(self.image_sides))
        yield "\nLongest samples" if self.longest else ""
        yield from (f"  {length:>9,} tokens  {place}" for length, place in self.longest)
        if self.num_duplicates:
            yield f"\n{self.num_duplicates:,} samples are the same as an earlier one, such as"
            yield from (f"  {' = '.join(places[:3])}{' …' if len(places) > 3 else ''}" for places in self.duplicates)
        for kind, count in self.notes.items():
            yield f"\nNote: {kind}: {count:,} times, first at\n  {': '.join(self.first_notes[kind])}"
        for kind, found in self.faults.items():
            yield f"\nFault: {kind}: {len(found):,} times"
            yield from (f"  {place}: {reason}" for place, reason in found[:_NUM_SHOWN])
            if len(found) > _NUM_SHOWN:
                yield f"  and {len(found) - _NUM_SHOWN:,} more"
        yield f"\n{self.num_faults:,} faults" if self.faults else "\nNo faults"


def _named(found: tuple[str, str]) -> dict[str, str]:
    return {"place": found[0], "reason": found[1]}


def _histogram(counts: Counter[int]) -> list[dict[str, int]]:
    """Bins from a power of two to the next: `from` and `to` are both in the bin. Empty bins between are kept."""
    bins: Counter[int] = Counter()
    for value, count in counts.items():
        bins[value.bit_length()] += count
    numbers = range(min(bins), max(bins) + 1) if bins else range(0)
    return [{"from": 2**number // 2, "to": 2**number - 1, "count": bins[number]} for number in numbers]


def _bars(title: str, bins: list[dict[str, int]]) -> Iterator[str]:
    most = max((one["count"] for one in bins), default=0)
    yield f"\n{title}" if bins else ""
    for one in bins:
        label = f"{one['from']:,}-{one['to']:,}"
        yield f"  {label:>17} {one['count']:>11,} {'#' * -(-30 * one['count'] // most)}"


class _Counting:
    """Adds samples up, one after the other."""

    def __init__(self, samples: SampleSet, config: Config, split: str) -> None:
        self.report = AuditReport(split, [SourceReport(source.path) for source in _sources(config, split)])
        self._samples = samples
        self._same: dict[bytes, list[int]] = {}

    def add(self, sample: _Sample) -> None:
        report, place = self.report, self._samples.place(sample.index)
        source = report.sources[self._samples.source(sample.index)]
        source.num_samples += 1
        source.num_refused += not sample.num_tokens
        source.num_tokens += sample.num_tokens
        source.num_supervised += sample.num_supervised
        source.num_images += len(sample.sizes)
        for finding in sample.findings:
            if finding.is_fault:
                source.num_faults += 1
                report.faults.setdefault(finding.kind, []).append((str(place), finding.reason))
            else:
                report.notes[finding.kind] += 1
                report.first_notes.setdefault(finding.kind, (str(place), finding.reason))
        report.image_sides.update(map(max, sample.sizes))
        if sample.num_tokens:
            report.lengths[sample.num_tokens] += 1
            report.longest.append((sample.num_tokens, str(place)))
            report.longest.sort(key=lambda one: -one[0])  # stable: of equals the first comes first
            del report.longest[_NUM_LONGEST:]
            self._same.setdefault(sample.digest, []).append(sample.index)

    def finish(self) -> AuditReport:
        """The report, with the samples that are the same: the bytes of pictures are read only where all else is."""
        report = self.report
        for indices in self._same.values():
            for group in self._really_same(indices) if len(indices) > 1 else ():
                report.num_duplicates += len(group) - 1
                report.duplicates.append([str(self._samples.place(index)) for index in group])
        del report.duplicates[_NUM_DUPLICATES:]
        return report

    def _really_same(self, indices: list[int]) -> list[list[int]]:
        groups: dict[bytes, list[int]] = {}
        for index in indices:
            pictures = [span.picture for span in self._samples.encoded(index).images]
            groups.setdefault(_digest(self._samples.conversation(index), pictures, True), []).append(index)
        return [group for group in groups.values() if len(group) > 1]


def audit(
    config: Config,
    split: str = "train",
    decode: bool = False,
    workers: int | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
    with_tokens: bool = False,
) -> AuditReport:
    """Look at every sample of `split` ("train" or "eval").

    `decode`: decode every picture too. `workers`: processes, by itself as many as the set is worth. `on_row` gets
    each sample's JSON object, in order, `with_tokens` or without. Raises UserError where a source cannot be read.
    """
    task = (config, split, decode, on_row is not None, with_tokens)
    here = _Worker(*task)
    samples, console = here.samples, Console(stderr=True)
    if workers is None:
        workers = num_cores() if len(samples) >= (_MANY_TO_DECODE if decode else _MANY) else 1
    counting = _Counting(samples, config, split)
    chunks = [range(len(samples))[start : start + _CHUNK] for start in range(0, len(samples), _CHUNK)]
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(f"auditing {split}", total=len(samples))
        for chunk in _look_at_all(here, task, chunks, min(workers, len(chunks))):
            for sample in chunk:
                counting.add(sample)
                if on_row is not None and sample.row is not None:
                    on_row(sample.row)
            progress.advance(bar, len(chunk))
    return counting.finish()


def _look_at_all(here: _Worker, task: _Task, chunks: list[range], workers: int) -> Iterator[list[_Sample]]:
    """Every chunk in order; a few are under way at a time, so that memory does not grow with the set."""
    if workers <= 1:
        yield from (list(map(here.look_at, chunk)) for chunk in chunks)
        return
    yield from map_in_processes(_look_in_pool, chunks, workers, _start_worker, task, __name__)
