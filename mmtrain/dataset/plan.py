"""Which samples make up which step. This depends only on the seed and the data."""

import functools
from collections.abc import Sequence, Set

import numpy as np
import numpy.typing as npt

from mmtrain.config import Config
from mmtrain.errors import UserError
from mmtrain.records.record_set import RecordSet

Indices = npt.NDArray[np.int64]
_OWN, _STEPS = 2**31, 2**32 - 1


class Plan:
    """The steps of a run over one or several sources.

    `sources`: the sample indices of each source. `weights`: passes over each source in an epoch; a fraction of a pass
    is a random choice, which differs between epochs. `own`: the sources whose samples share a step with no other
    source; the steps of an epoch are then in random order. In an epoch the last step of the mixed sources, and that of
    each own one, may be short; no sample is left out. Raises UserError where a weight is so small that no sample of its
    source would be used.
    """

    def __init__(
        self,
        sources: Sequence[Indices],
        weights: Sequence[float],
        batch_size: int,
        seed: int,
        own: Set[int] = frozenset(),
    ) -> None:
        for number, (indices, weight) in enumerate(zip(sources, weights, strict=True)):
            if not round(len(indices) * weight):
                raise UserError(
                    f"data.train.{number}: {weight} passes over {len(indices)} samples use none of them: raise `weight`"
                )
        self._sources = sources
        self._weights = weights
        self._seed = seed
        self._batch_size = batch_size
        mixed = [number for number in range(len(sources)) if number not in own]
        self._groups = [group for group in (mixed, *([number] for number in sorted(own))) if group]
        sizes = [round(len(indices) * weight) for indices, weight in zip(sources, weights, strict=True)]
        self.epoch_samples = sum(sizes)
        self._bounds = np.concatenate(
            [[0], *(_step_sizes(sum(sizes[number] for number in group), batch_size) for group in self._groups)]
        ).cumsum()
        """Where the steps of an epoch begin and end among its samples, before the steps are put in random order."""
        self.steps_per_epoch = len(self._bounds) - 1
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    @classmethod
    def of(cls, config: Config, records: RecordSet, used: Indices) -> "Plan":
        """The steps over the samples `used` of `data.train`. Raises UserError where a source has none of them."""
        source_of = records.sources_of(used)
        by_source = [used[source_of == number] for number in range(records.num_sources)]
        own = frozenset(number for number, source in enumerate(config.data.train) if source.batch == "own")
        weights = [source.weight for source in config.data.train]
        return cls(by_source, weights, config.train.batch_size, config.train.seed, own)

    def step(self, number: int) -> list[int]:
        """The sample indices of step `number`, counted from 1."""
        epoch, step = divmod(number - 1, self.steps_per_epoch)
        samples, steps = self._epoch(epoch)
        at = steps[step]
        indices: list[int] = samples[self._bounds[at] : self._bounds[at + 1]].tolist()
        return indices

    def some_steps(self, number: int) -> list[int]:
        """The numbers of at most so many steps, evenly spaced over the first epoch."""
        evenly: list[int] = np.unique(np.linspace(1, self.steps_per_epoch, number).astype(int)).tolist()
        return evenly

    def short_steps(self) -> list[int]:
        """The numbers of the steps of the first epoch that have fewer samples than `batch_size`."""
        _, steps = self._epoch(0)
        found: list[int] = (1 + np.flatnonzero(np.diff(self._bounds)[steps] < self._batch_size)).tolist()
        return found

    def _make_epoch(self, epoch: int) -> tuple[Indices, Indices]:
        """The samples of an epoch, step by step, and the order of the steps."""
        samples = np.concatenate([self._shuffled(group, epoch) for group in self._groups])
        if len(self._groups) == 1:
            return samples, np.arange(self.steps_per_epoch)
        return samples, permutation(self.steps_per_epoch, self._seed, epoch, _STEPS)

    def _shuffled(self, group: Sequence[int], epoch: int) -> Indices:
        """The samples of some sources in an epoch, in random order."""
        chosen = []
        for number in group:
            indices, weight = self._sources[number], self._weights[number]
            whole = int(weight)
            rest = round(len(indices) * weight) - whole * len(indices)
            chosen += [indices] * whole
            chosen.append(indices[permutation(len(indices), self._seed, epoch, number + 1)[:rest]])
        together = np.concatenate(chosen)
        stream = 0 if group is self._groups[0] else _OWN + group[0]
        return together[permutation(len(together), self._seed, epoch, stream)]


def _step_sizes(num_samples: int, batch_size: int) -> list[int]:
    whole, rest = divmod(num_samples, batch_size)
    return [batch_size] * whole + [rest] * bool(rest)


def permutation(length: int, seed: int, epoch: int, stream: int) -> Indices:
    """A random order, the same in every version of numpy: Philox's raw stream is fixed, `permutation` is not.

    `stream`: 0 for the samples of the first group, from 1 on for the choice of each source, from `_OWN` on for the
    samples of each own source, `_STEPS` for the order of the steps.
    """
    key = (seed << 64) | (epoch << 32) | stream
    return np.argsort(np.random.Philox(key=key).random_raw(length), kind="stable")
