"""The audit of pairs: every one that cannot be used, and what makes a data set of pairs worse than it looks."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console

from mmtrain.config import Config
from mmtrain.config.data_section import Source
from mmtrain.contrastive.embedder import Embedder
from mmtrain.contrastive.pair_samples import PairSamples
from mmtrain.contrastive.relation import relate
from mmtrain.contrastive.selected_pairs import read_selected
from mmtrain.dataset.plan import Plan
from mmtrain.dataset.selection import SelectedSources
from mmtrain.dataset.validate import FaultPolicy
from mmtrain.errors import UserError
from mmtrain.inspect_labels.audit_report import NUM_SHOWN, bars, fault_lines, histogram, print_audit, verdict
from mmtrain.progress import Progress
from mmtrain.safe_text import counted

_EVERYTHING = FaultPolicy("drop", "skip", 10**9)
"""Leaves out whatever cannot be used, so that all of it is seen."""


@dataclass(slots=True)
class PairAudit:
    """The results of the audit of one split. Places are `file:line`."""

    split: str
    sources: list[dict[str, Any]]
    """By source its path, and how many pairs were read, are used and have a fault."""
    num_items: int
    lengths: Counter[int]
    """Tokens of the distinct items that have a text."""
    faults: list[tuple[str, str]]
    """(place, reason)"""
    notes: dict[str, list[str]] = field(default_factory=dict)
    """What is no fault but worth a look: the places of the pairs, by kind."""

    def row(self) -> dict[str, Any]:
        """The report as one JSON object."""
        return {
            "split": self.split,
            "sources": self.sources,
            "num_items": self.num_items,
            "length_histogram": histogram(self.lengths),
            "num_faults": len(self.faults),
            "faults": [{"place": place, "reason": reason} for place, reason in self.faults],
            "notes": {
                kind: {"count": len(places), "places": places[:NUM_SHOWN]} for kind, places in self.notes.items()
            },
        }

    def print(self, console: Console) -> None:
        """Print the report in 80 columns."""
        titles = ("pairs", "used", "faults")
        rows = [(source["path"], *(f"{source[f'num_{name}']:,}" for name in titles)) for source in self.sources]
        print_audit(self.split, titles, rows, self._lines(), console)

    def _lines(self) -> Iterator[str]:
        yield f"\n{self.num_items:,} distinct items"
        yield from bars("Tokens of an item", histogram(self.lengths))
        for kind, places in self.notes.items():
            yield f"\nNote: {kind}: {counted(len(places), 'pair')}, first at\n  {places[0]}"
        yield verdict(len(self.faults))
        yield from fault_lines(self.faults)


def audit_pairs(config: Config, split: str, embedder: Embedder, progress: Progress) -> PairAudit:
    """Audit every pair of `split` ("train" or "eval"). Raises UserError where no pair can be used."""
    sides = {
        "train": SelectedSources.for_training(config.data),
        "eval": SelectedSources.for_evaluation(config.data, config.data.eval),
    }
    selected, others = sides[split], sides["eval" if split == "train" else "train"]
    if not selected.sources:
        raise UserError(f"data.{split}: there are no sources in the config")
    sources, samples = selected.sources, _read(config, selected, embedder, progress)
    faults = [*samples.skipped, *(samples.dropped if config.data.too_long == "error" else ())]
    report = PairAudit(
        split,
        _counts(sources, samples, [index for index, _ in faults]),
        len(samples.items),
        Counter(len(item.encoded.ids) for item in samples.items if len(item.encoded.ids)),
        [(str(samples.place(index)), reason) for index, reason in sorted(faults)],
    )
    notes = _notes(samples)
    if config.data.too_long == "drop":
        notes["too long, dropped"] = [index for index, _ in samples.dropped]
    if split == "train" and all(source["num_used"] for source in report.sources):
        notes["no negative in its step"] = _without_negative(Plan.of(config, samples.records, samples.used), samples)
    if others.sources:
        notes |= _leaks(samples, _read(config, others, embedder, progress), "eval" if split == "train" else "train")
    report.notes = {kind: [str(samples.place(index)) for index in found] for kind, found in notes.items() if found}
    return report


def _read(config: Config, selected: SelectedSources, embedder: Embedder, progress: Progress) -> PairSamples:
    return read_selected(selected, embedder, config.data, progress, _EVERYTHING)


def _counts(sources: Sequence[Source], samples: PairSamples, faulty: Sequence[int]) -> list[dict[str, Any]]:
    records = samples.records
    of_all, of_used, of_faulty = (
        np.bincount(records.sources_of(np.array(indices, np.int64)), minlength=len(sources))
        for indices in (range(len(records)), samples.used, sorted(set(faulty)))
    )
    return [
        {"path": source.path, "num_pairs": int(read), "num_used": int(used), "num_faults": int(faults)}
        for source, read, used, faults in zip(sources, of_all, of_used, of_faulty, strict=True)
    ]


def _notes(samples: PairSamples) -> dict[str, list[int]]:
    """Pairs that contradict or repeat others."""
    notes: dict[str, list[int]] = {
        "same as an earlier pair": [],
        "its query is its positive": [],
        "a negative is a positive": [],
    }
    seen = set()
    for index, pair in samples.pairs.items():
        content = (pair.query, frozenset(pair.positives), frozenset(pair.negatives))
        if content in seen:
            notes["same as an earlier pair"].append(index)
        seen.add(content)
        if pair.query in pair.positives:
            notes["its query is its positive"].append(index)
        if set(pair.negatives) & set(pair.positives):
            notes["a negative is a positive"].append(index)
    return notes


def _without_negative(plan: Plan, samples: PairSamples) -> list[int]:
    """The pairs whose query is compared with nothing in its step of the first epoch."""
    found = []
    for number in range(1, plan.steps_per_epoch + 1):
        indices = plan.step(number)
        relation = relate([samples.pairs[index] for index in indices])
        left_out = np.bincount(relation.left_out_rows, minlength=len(relation.queries))
        alone = set(relation.queries[left_out == len(relation.documents)].tolist())
        found += [index for index in indices if samples.pairs[index].query in alone]
    return sorted(set(found))


def _leaks(samples: PairSamples, others: PairSamples, split: str) -> dict[str, list[int]]:
    """The pairs whose query and a positive, or whose images, are also in the other split."""
    known = {item.key for item in others.items}
    matched = {
        (others.items[pair.query].key, others.items[positive].key)
        for pair in others.pairs.values()
        for positive in pair.positives
    }
    whole, images = f"the same pair is in data.{split}", f"an image is in data.{split} too"
    notes: dict[str, list[int]] = {whole: [], images: []}
    for index, pair in samples.pairs.items():
        own = [samples.items[number] for number in (pair.query, *pair.positives)]
        if any((own[0].key, positive.key) in matched for positive in own[1:]):
            notes[whole].append(index)
        elif any(item.encoded.images and item.key in known for item in own):
            notes[images].append(index)
    return notes
