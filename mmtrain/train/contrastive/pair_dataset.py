"""The pairs that a run is trained and evaluated on, checked before the first step."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmtrain.config import Config
from mmtrain.contrastive.embedder import Embedder
from mmtrain.contrastive.relation import relate
from mmtrain.contrastive.selected_pairs import read_selected
from mmtrain.dataset.plan import Indices, Plan
from mmtrain.dataset.selection import SelectedSources
from mmtrain.errors import UserError, collected
from mmtrain.progress import Progress
from mmtrain.retrieval.evaluation import RetrievalEvaluation
from mmtrain.safe_text import counted
from mmtrain.train.dataset import num_steps
from mmtrain.train.eval_sets import eval_sources
from mmtrain.train.folder import dropped_row
from mmtrain.train.watched import check_watched, retrieval_names

_STEPS_TRIED = 20


class PairDataset:
    """The training pairs, the evaluation sets and the plan of steps of one config.

    Raises UserError with every sample of every source that cannot be used.
    """

    stream = None

    def __init__(self, config: Config, embedder: Embedder, progress: Progress) -> None:
        self.template = embedder.template
        faults: list[str] = []
        with collected(faults), progress.task("checking train"):
            selected = SelectedSources.for_training(config.data)
            self.train = read_selected(selected, embedder, config.data, progress)
        self.eval: dict[str, RetrievalEvaluation] = {}
        for name, source in eval_sources(config).items():
            with collected(faults), progress.task(f"checking evaluation set {name}"):
                self.eval[name] = RetrievalEvaluation(config, [source], embedder, progress)
        if faults:
            raise UserError(dict.fromkeys(faults))
        check_watched(config, retrieval_names({name: one.way_names for name, one in self.eval.items()}))
        self.plan = Plan.of(config, self.train.records, self.train.used)
        self.num_steps = num_steps(config.train, self.plan)
        self._loss = config.objective.loss
        self._check_negatives()

    def _check_negatives(self) -> None:
        """Raise UserError where no step that is tried has a negative: with `infonce` nothing would be trained."""
        steps = ([self.train.pairs[index] for index in self.plan.step(n)] for n in self.plan.some_steps(_STEPS_TRIED))
        if self._loss == "infonce" and not any(relate(pairs).num_negatives for pairs in steps):
            raise UserError(
                "no step has a negative, so the loss is 0 and nothing is trained: expected a larger train.batch_size, "
                "or pairs with negatives"
            )

    def notes(self) -> Iterator[str]:
        """A line for each step of the first epoch that is short and has no negative."""
        for number in self.plan.short_steps() if self._loss == "infonce" else ():
            pairs = [self.train.pairs[index] for index in self.plan.step(number)]
            if not relate(pairs).num_negatives:
                yield (
                    f"step {number:,} of the first epoch has {counted(len(pairs), 'pair')} and no negative, so its "
                    "loss is 0: another train.batch_size leaves more for it"
                )

    def summary(self) -> str:
        """What was read, in one line, and what was dropped."""
        items = self.train.items
        num_images = sum(bool(item.encoded.images) for item in items)
        line = (
            f"{len(self.train.pairs):,} pairs of {len(items):,} distinct items, {num_images:,} of them with images; "
            f"{self.num_steps:,} steps, {self.plan.steps_per_epoch:,} an epoch"
        )
        if self.train.num_other_side:
            line += f"; {counted(self.train.num_other_side, 'pair')} held out for evaluation"
        num_left_out = len(self.dropped_rows())
        return f"{line}; {num_left_out:,} pairs left out, listed in dropped.jsonl" if num_left_out else line

    def dropped_rows(self) -> list[dict[str, Any]]:
        """A row for each pair that is left out by `data.too_long: drop` or `data.on_fault: skip`."""
        return [
            dropped_row(samples.place(index), reason)
            for samples in (self.train, *(one.samples for one in self.eval.values()))
            for index, reason in samples.left_out
        ]

    @property
    def used(self) -> Indices:
        """The indices of the training pairs that are used."""
        return self.train.used

    @property
    def image_files(self) -> frozenset[Path]:
        """Those of the training pairs."""
        return self.train.image_files

    @property
    def eval_files(self) -> list[tuple[list[Path], list[Path]]]:
        """For each evaluation set its files of records, and its image files."""
        sets = [one.samples for one in self.eval.values()]
        files = [[file for n in range(one.records.num_sources) for file in one.records.files_of(n)] for one in sets]
        return [(own, sorted(one.image_files)) for own, one in zip(files, sets, strict=True)]
