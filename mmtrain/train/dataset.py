"""What a run is trained and evaluated on, checked before the first step."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmtrain.config import Config
from mmtrain.config.schema import Train
from mmtrain.dataset.encoding_spec import EncodingSpec
from mmtrain.dataset.plan import Indices, Plan
from mmtrain.dataset.samples import StoredSamples
from mmtrain.dataset.selection import SelectedSources
from mmtrain.dataset.stream import Stream
from mmtrain.dataset.validate import CheckedSamples, FaultPolicy, LengthLimit, SampleSizes, check_samples
from mmtrain.encoding.load import processor_of
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError, collected
from mmtrain.model.load import length_limit
from mmtrain.progress import Progress
from mmtrain.train.eval_sets import eval_sources, make_eval_sets
from mmtrain.train.folder import dropped_row
from mmtrain.train.watched import chat_names, check_watched


class Dataset:
    """The training samples, the evaluation sets and the plan of steps of one config.

    With `data.streaming` the run takes its samples from `stream`, and `train`, `checked` and `plan` are those of its
    first window alone, from which memory is predicted.

    Raises UserError with every sample of every source that cannot be used.
    """

    def __init__(self, config: Config, processor: ChatProcessor, progress: Progress) -> None:
        sources = eval_sources(config)
        selected = {
            f"evaluation set {name}": SelectedSources.for_evaluation(config.data, [source])
            for name, source in sources.items()
        }
        if config.data.streaming is None:
            selected = {"train": SelectedSources.for_training(config.data), **selected}
        limit = length_limit(config.model.path, config.data.max_length)
        check = functools.partial(check_samples, processor=processor, limit=limit, policy=FaultPolicy.of(config.data))
        found = _check_all(config, selected, check, progress)
        self.stream = _open_stream(config, limit, progress)
        self.train, self.checked = found.pop(0) if self.stream is None else self.stream.head.checked_samples
        self.encoder = EncodingSpec.of(config, config.data.train).encoder(processor)
        self.eval = make_eval_sets(config, self.encoder, found)
        check_watched(config, chat_names(self.eval))
        if self.stream is None:
            self.plan = Plan.of(config, self.train.records, self.checked.used)
        else:
            self.plan = Plan([self.checked.used], [1.0], config.train.batch_size, config.train.seed)
        self.num_steps = num_steps(config.train, self.plan)
        self.num_trained = len(self.checked.used) if self.stream is None else self.num_steps * config.train.batch_size
        """The samples that are trained on; with a stream a sample counts in each epoch."""

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch

    def step(self, number: int) -> list[int]:
        """The samples of a step, counted from 1."""
        return self.plan.step(number)

    def sizes(self, samples: list[int]) -> SampleSizes:
        """Of these samples."""
        return self.checked.sizes(samples)

    def dropped_rows(self) -> list[dict[str, Any]]:
        """A row for each sample that is left out by `data.too_long: drop` or `data.on_fault: skip`."""
        sets = [] if self.stream else [(self.train, self.checked)]
        sets += [(one.samples, one.checked) for one in self.eval]
        return [
            dropped_row(samples.place(index), reason) for samples, checked in sets for index, reason in checked.left_out
        ]

    @property
    def used(self) -> Indices:
        """The indices of the training samples that are used."""
        return self.checked.used

    @property
    def image_files(self) -> frozenset[Path]:
        return self.checked.image_files

    @property
    def eval_files(self) -> list[tuple[list[Path], list[Path]]]:
        """For each evaluation set its files of records, and its image files."""
        records = [one.samples.records for one in self.eval]
        files = [[file for i in range(own.num_sources) for file in own.files_of(i)] for own in records]
        return [(found, sorted(one.checked.image_files)) for found, one in zip(files, self.eval, strict=True)]

    @property
    def template(self) -> str:
        return self.encoder.processor.template.source

    @property
    def all_checked(self) -> list[CheckedSamples]:
        """Of all sets."""
        return [self.checked, *(one.checked for one in self.eval)]


def _check_all(
    config: Config,
    selected: dict[str, SelectedSources],
    check: Callable[..., tuple[StoredSamples, CheckedSamples]],
    progress: Progress,
) -> list[tuple[StoredSamples, CheckedSamples]]:
    """Check each, by name, and raise the faults of all of them together."""
    found, faults = [], list[str]()
    for name, one in selected.items():
        with collected(faults), progress.task(f"checking {name}"):
            found.append(check(EncodingSpec.of(config, one.sources), progress=progress, choices=one.choices))
    if faults:
        raise UserError(dict.fromkeys(faults))  # the two sides of a file that is split have the same
    return found


def _open_stream(config: Config, limit: LengthLimit, progress: Progress) -> Stream | None:
    if config.data.streaming is None:
        return None
    with progress.task("reading the first samples"):
        processor = processor_of(config.model, tried=True)  # for its own thread
        return Stream(config, processor, limit, progress.tick)


def num_steps(settings: Train, plan: Plan) -> int:
    """The steps of a run: as many as the config says, or as its epochs have."""
    by_epochs = max(1, math.ceil((settings.epochs or 1.0) * plan.steps_per_epoch))
    return settings.steps if settings.steps is not None else by_epochs
