"""What a run is trained and evaluated on, checked before the first step."""

import functools
import math
from collections.abc import Callable
from typing import Any

from mmtrain.config import Config
from mmtrain.config.schema import Train
from mmtrain.dataset.encode_all import EncodingSpec
from mmtrain.dataset.plan import Plan
from mmtrain.dataset.samples import StoredSamples
from mmtrain.dataset.validate import CheckedSamples, FaultPolicy, check_samples
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError
from mmtrain.model.load import length_limit
from mmtrain.progress import Progress
from mmtrain.train.eval_sets import eval_sources, make_eval_sets
from mmtrain.train.watched import check_watched


class Dataset:
    """The training samples, the evaluation sets and the plan of steps of one config.

    Raises UserError with every sample of every source that cannot be used.
    """

    def __init__(self, config: Config, processor: ChatProcessor, progress: Progress) -> None:
        sources = eval_sources(config)
        specs = {f"evaluation set {name}": EncodingSpec.of(config, [source]) for name, source in sources.items()}
        train_spec = EncodingSpec.of(config, config.data.train)
        limit = length_limit(config.model.path, config.data.max_length)
        check = functools.partial(check_samples, processor=processor, limit=limit, policy=FaultPolicy.of(config.data))
        (self.train, self.checked), *found = _check_all({"train": train_spec, **specs}, check, progress)
        self.encoder = train_spec.encoder(processor)
        self.eval = make_eval_sets(config, self.encoder, found)
        check_watched(config, self.eval)
        self.plan = _plan(config, self.train, self.checked)
        self.num_steps = self.num_steps_of(config.train)

    def num_steps_of(self, settings: Train) -> int:
        """The steps of a run with these settings over the same samples."""
        by_epochs = max(1, math.ceil((settings.epochs or 1.0) * self.plan.steps_per_epoch))
        return settings.steps if settings.steps is not None else by_epochs

    def summary(self) -> str:
        """What was read, in one line, and what was dropped."""
        used = self.checked.used
        tokens, supervised = self.checked.num_tokens.sum(), self.checked.num_supervised.sum()
        line = (
            f"{len(used):,} samples, {self.checked.num_images:,} images, {tokens:,} tokens "
            f"({supervised / tokens:.1%} trained on); {self.num_steps:,} steps, {self.plan.steps_per_epoch:,} an epoch"
        )
        long, faulty = (sum(len(getattr(one, name)) for one in self._all_checked) for name in ("dropped", "skipped"))
        left_out = [
            f"{number:,} samples {why}"
            for number, why in ((long, "dropped as too long"), (faulty, "skipped because of faults"))
            if number
        ]
        if not left_out:
            return line
        num_read = sum(len(one.num_tokens) for one in self._all_checked)
        return f"{line}; of {num_read:,} read, {', '.join(left_out)}, listed in dropped.jsonl"

    def dropped_rows(self) -> list[dict[str, Any]]:
        """A row for each sample that is left out by `data.too_long: drop` or `data.on_fault: skip`."""
        sets = [self.train, *(one.samples for one in self.eval)]
        return [
            {"file": str(place.file), "line": place.line, "place": str(place), "reason": reason}
            for samples, checked in zip(sets, self._all_checked, strict=True)
            for index, reason in checked.left_out
            for place in [samples.place(index)]
        ]

    @property
    def _all_checked(self) -> list[CheckedSamples]:
        return [self.checked, *(one.checked for one in self.eval)]


def _check_all(
    specs: dict[str, EncodingSpec],
    check: Callable[..., tuple[StoredSamples, CheckedSamples]],
    progress: Progress,
) -> list[tuple[StoredSamples, CheckedSamples]]:
    """Check each, by name, and raise the faults of all of them together."""
    found, faults = [], []
    for name, spec in specs.items():
        try:
            with progress.task(f"checking {name}"):
                found.append(check(spec, progress=progress))
        except UserError as error:
            faults += error.faults
    if faults:
        raise UserError(faults)
    return found


def _plan(config: Config, samples: StoredSamples, checked: CheckedSamples) -> Plan:
    """The steps over the used samples. Raises UserError where a source has none of them."""
    source_of = samples.records.sources_of(checked.used)
    by_source = [checked.used[source_of == number] for number in range(samples.records.num_sources)]
    weights = [source.weight for source in config.data.train]
    return Plan(by_source, weights, config.train.batch_size, config.train.seed)
