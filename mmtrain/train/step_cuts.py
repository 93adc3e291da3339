"""The micro-batches of every step, as this process computes them."""

import functools
from collections.abc import Iterator
from dataclasses import replace

from mmtrain.config.schema import Run
from mmtrain.dataset.batch import Batch
from mmtrain.runtime.shard import Filled
from mmtrain.train.dataset import Dataset, StepCut
from mmtrain.train.step import Learner


class StepCuts:
    """How each step is cut, and the batches of a range of steps."""

    def __init__(self, dataset: Dataset, learner: Learner, settings: Run) -> None:
        self._dataset, self._learner, self._settings = dataset, learner, settings
        self._filled = Filled(dataset.train, dataset.checked) if learner.sharded else None
        self.of = functools.lru_cache(maxsize=256)(self._cut)
        """The cut of a step, counted from 1."""

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """The batches of this process's micro-batches that are not empty, of the steps `first` to `last`."""
        microbatches = (indices for step in range(first, last + 1) for indices in self.of(step).own if indices)
        return self._learner.batches(self._filled or self._dataset.train, microbatches)

    def _cut(self, step: int) -> StepCut:
        learner, runtime = self._learner, self._learner.runtime
        # from the second epoch on every image was seen; a rule that follows from the step alone, as the cut must
        is_cached = learner.make_inputs.store is not None and step > self._dataset.plan.steps_per_epoch
        costs = learner.costs.with_cached_features if is_cached else learner.costs
        packing, index, count = learner.packing, runtime.index, runtime.num_processes
        cut = self._dataset.cut(step, self._settings, packing, costs, index, count)
        return cut if self._filled is None else replace(cut, own=tuple(map(self._filled.fill, cut.own)))
