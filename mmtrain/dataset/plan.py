"""Which samples make up which step. This depends only on the seed and the data."""

import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mmtrain.errors import UserError

Indices = npt.NDArray[np.int64]


class Plan:
    """The steps of a run over one or several sources.

    `sources`: the sample indices of each source. `weights`: passes over each source in an epoch; a fraction of a pass
    is a random choice, which differs between epochs. An epoch's last step may be short; no sample is left out.
    Raises UserError where a weight is so small that no sample of its source would be used.
    """

    def __init__(self, sources: Sequence[Indices], weights: Sequence[float], batch_size: int, seed: int) -> None:
        for number, (indices, weight) in enumerate(zip(sources, weights, strict=True)):
            if not round(len(indices) * weight):
                raise UserError(
                    f"data.train.{number}: {weight} passes over {len(indices)} samples use none of them: raise `weight`"
                )
        self._sources = sources
        self._weights = weights
        self._batch_size = batch_size
        self._seed = seed
        self.epoch_samples = sum(round(len(own) * weight) for own, weight in zip(sources, weights, strict=True))
        self.steps_per_epoch = math.ceil(self.epoch_samples / batch_size)
        self._order = functools.lru_cache(maxsize=2)(self._make_order)

    def step(self, number: int) -> list[int]:
        """The sample indices of step `number`, counted from 1."""
        epoch, step = divmod(number - 1, self.steps_per_epoch)
        indices: list[int] = self._order(epoch)[step * self._batch_size : (step + 1) * self._batch_size].tolist()
        return indices

    def _make_order(self, epoch: int) -> Indices:
        chosen = []
        for number, (indices, weight) in enumerate(zip(self._sources, self._weights, strict=True)):
            whole = int(weight)
            rest = round(len(indices) * weight) - whole * len(indices)
            chosen += [indices] * whole
            chosen.append(indices[permutation(len(indices), self._seed, epoch, number + 1)[:rest]])
        together = np.concatenate(chosen)
        return together[permutation(len(together), self._seed, epoch, 0)]


def permutation(length: int, seed: int, epoch: int, stream: int) -> Indices:
    """A random order, the same in every version of numpy: Philox's raw stream is fixed, `permutation` is not.

    `stream`: 0 for the whole epoch, from 1 on for each source.
    """
    key = (seed << 64) | (epoch << 32) | stream
    return np.argsort(np.random.Philox(key=key).random_raw(length), kind="stable")
