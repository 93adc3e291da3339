"""How each step is cut into micro-batches, and the batches that this process computes."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mmtrain.config.run_section import Run
from mmtrain.dataset.batch import Batch
from mmtrain.dataset.microbatches import cut_step
from mmtrain.model.cost import CostModel
from mmtrain.runtime.shard import Filled
from mmtrain.train.dataset import Dataset
from mmtrain.train.step import Learner


@dataclass(frozen=True, slots=True)
class StepCut:
    """One step: its samples, and the micro-batches, some perhaps empty, that this process computes."""

    samples: tuple[int, ...]
    own: tuple[tuple[int, ...], ...]
    num_tokens: int
    num_supervised: int
    sum_weights: float
    """Of its supervised tokens; their number where each counts 1."""
    operations: float
    """What it must compute, over all processes: a multiplication and an addition are two."""

    @property
    def count(self) -> float:
        return self.sum_weights

    @property
    def figures(self) -> dict[str, Any]:
        """The step's sizes in its row of metrics.jsonl."""
        return {"num_tokens": self.num_tokens, "num_supervised": self.num_supervised}


class StepCuts:
    """How the steps of a data set are cut for `learner`, as `settings` say."""

    def __init__(self, dataset: Dataset, learner: Learner, settings: Run) -> None:
        self._dataset, self._learner, self._settings = dataset, learner, settings
        self._filled = Filled(dataset.train, dataset.checked) if learner.sharded else None
        self.of = functools.lru_cache(maxsize=256)(self._cut)
        """The cut of a step, counted from 1."""

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """The batches of this process's micro-batches that are not empty, of the steps `first` to `last`."""
        microbatches = (indices for step in range(first, last + 1) for indices in self.of(step).own if indices)
        return self._learner.batches(self._filled or self._dataset.train, microbatches)

    def of_all(self, step: int) -> list[tuple[int, ...]]:
        """The micro-batches of all processes, one process after the other; each has as many."""
        samples = self._dataset.plan.step(step)
        lengths, _, cost = self._sizes(step, samples)
        settings, runtime = self._settings, self._learner.runtime
        multiple = runtime.num_processes if settings.microbatches == "auto" else settings.microbatches
        limit = settings.microbatch_tokens if self._learner.processor.lays_out_together else 1
        cuts = cut_step(lengths.tolist(), limit, self._learner.packing, multiple, cost.tolist())
        return [tuple(samples[i] for i in cut) for cut in cuts]

    def _cut(self, step: int) -> StepCut:
        samples, runtime = self._dataset.plan.step(step), self._learner.runtime
        lengths, supervised, cost = self._sizes(step, samples)
        every = self.of_all(step)
        share = len(every) // runtime.num_processes
        own = every[runtime.index * share : (runtime.index + 1) * share]
        if self._filled is not None:
            own = list(map(self._filled.fill, own))
        sum_weights = float(self._dataset.checked.sum_weights[samples].sum())
        counts = int(lengths.sum()), int(supervised.sum())
        return StepCut(tuple(samples), tuple(own), *counts, sum_weights, 2.0 * float(cost.sum()))

    def _sizes(self, step: int, samples: list[int]) -> tuple[Any, Any, Any]:
        """(num_samples,) each: tokens, supervised tokens and cost."""
        checked = self._dataset.checked
        lengths, supervised = checked.num_tokens[samples], checked.num_supervised[samples]
        image_tokens, pairs = checked.num_image_tokens[samples], checked.image_token_pairs[samples]
        return lengths, supervised, self._costs(step).of(lengths, image_tokens, pairs, supervised)

    def _costs(self, step: int) -> CostModel:
        # from the second epoch on every image was seen; a rule that follows from the step alone, as the cut must
        is_cached = self._learner.make_inputs.store is not None and step > self._dataset.plan.steps_per_epoch
        return self._learner.costs.with_cached_features if is_cached else self._learner.costs
