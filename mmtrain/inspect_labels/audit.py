"""The audit of a data set: counts what training reads and what the checks of the labels found.

Samples are encoded and checked once, when they are stored for training. The audit reads that store.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mmtrain.checks.findings import REFUSED, Finding
from mmtrain.config import Config
from mmtrain.config.data_section import Source
from mmtrain.dataset.encoding_spec import EncodingSpec
from mmtrain.dataset.samples import StoredSamples
from mmtrain.dataset.selection import Selected, equal_samples
from mmtrain.encoding.encode import Encoder
from mmtrain.encoding.load import processor_of
from mmtrain.inspect_labels.audit_report import AuditReport, SourceReport
from mmtrain.inspect_labels.selected_samples import open_selected, selected_sources
from mmtrain.inspect_labels.view import view_sample
from mmtrain.progress import Progress

TOO_LONG = "too long"
_NUM_LONGEST, _NUM_DUPLICATES = 10, 10


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
            self._faults.setdefault(fault.index, []).append(Finding.fault(fault.kind, fault.reason))

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
            findings = counting.add(index, None if reason is None else Finding(TOO_LONG, reason, is_fault))
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
