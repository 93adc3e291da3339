"""How each step is cut into micro-batches, and the batches that this process computes."""

import functools
from collections.abc import Iterator

from mmtrain.config.run_section import Run
from mmtrain.dataset.batch import Batch
from mmtrain.dataset.microbatches import cut_step
from mmtrain.dataset.stream import Stream
from mmtrain.dataset.validate import SampleSizes
from mmtrain.errors import UserError
from mmtrain.model.cost import Values
from mmtrain.runtime.shard import WithFiller
from mmtrain.train.dataset import Dataset
from mmtrain.train.objective import Cut
from mmtrain.train.step import Learner


class StepCuts:
    """How the steps of a data set are cut for `learner`, as `settings` say."""

    def __init__(self, dataset: Dataset, learner: Learner, settings: Run, stream: Stream | None = None) -> None:
        """`stream`: has the samples in place of the data set."""
        self._samples: Dataset | Stream = stream or dataset
        self._learner, self._settings = learner, settings
        self._filled = WithFiller(dataset.train, dataset.checked) if learner.sharded else None
        self.of = functools.lru_cache(maxsize=256)(self._cut)
        """The cut of a step, counted from 1."""

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """The batches of this process's micro-batches that are not empty, of the steps `first` to `last`."""
        return self._learner.batches(self._filled or self._samples.train, self._own(first, last))

    def _own(self, first: int, last: int) -> Iterator[tuple[int, ...]]:
        for step in range(first, last + 1):
            try:
                own = self.of(step).own
            except UserError:
                return  # of a stream; the step itself raises it when the ones before it are done
            yield from (indices for indices in own if indices)

    def of_all(self, step: int) -> list[tuple[int, ...]]:
        """The micro-batches of all processes, one process after the other; each has as many."""
        samples = self._samples.step(step)
        sizes = self._samples.sizes(samples)
        settings, runtime = self._settings, self._learner.runtime
        multiple = runtime.num_processes if settings.microbatches == "auto" else settings.microbatches
        limit = 1 if self._learner.alone else settings.microbatch_tokens
        cuts = cut_step(
            sizes.num_tokens.tolist(), limit, self._learner.packing, multiple, self._cost(step, sizes).tolist()
        )
        return [tuple(samples[i] for i in cut) for cut in cuts]

    def _cut(self, step: int) -> Cut:
        samples, runtime = self._samples.step(step), self._learner.runtime
        sizes = self._samples.sizes(samples)
        every = self.of_all(step)
        share = len(every) // runtime.num_processes
        own = every[runtime.index * share : (runtime.index + 1) * share]
        if self._filled is not None:
            own = list(map(self._filled.fill, own))
        figures = {"num_tokens": int(sizes.num_tokens.sum()), "num_supervised": int(sizes.num_supervised.sum())}
        operations = 2.0 * float(self._cost(step, sizes).sum())
        return Cut(tuple(samples), tuple(own), float(sizes.sum_weights.sum()), figures, operations)

    def _cost(self, step: int, sizes: SampleSizes) -> Values:
        """(num_samples,)"""
        # from the second epoch on every image was seen; a rule that follows from the step alone, as the cut must
        learner, per_epoch = self._learner, self._samples.steps_per_epoch
        is_cached = learner.make_inputs.store is not None and per_epoch is not None and step > per_epoch
        costs = learner.costs.with_cached_features if is_cached else learner.costs
        return costs.of(sizes.num_tokens, sizes.num_image_tokens, sizes.image_token_pairs, sizes.num_supervised)
