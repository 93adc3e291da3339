"""Which samples make up which step: it follows from the seed and the data alone."""

import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mmtrain.errors import UserError

Indices = npt.NDArray[np.int64]


class Plan:
    """The steps of a run over one or several sources.

    `sources`: the sample numbers of each source. `weights`: passes over each source in an epoch; a part of a pass is
    a random choice, another one in every epoch. An epoch's last step may be short; no sample is left out.
    Raises UserError where a weight is so small that its source would never be drawn.
    """

    def __init__(self, sources: Sequence[Indices], weights: Sequence[float], batch_size: int, seed: int) -> None:
        for number, (ids, weight) in enumerate(zip(sources, weights, strict=True)):
            if not round(len(ids) * weight):
                raise UserError(
                    f"data.train.{number}: {weight} passes over {len(ids)} samples draw none: raise `weight`"
                )
        self._sources = sources
        self._weights = weights
        self._batch_size = batch_size
        self._seed = seed
        self.epoch_samples = sum(round(len(ids) * weight) for ids, weight in zip(sources, weights, strict=True))
        self.steps_per_epoch = math.ceil(self.epoch_samples / batch_size)
        self._order = functools.lru_cache(maxsize=2)(self._make_order)

    def step(self, number: int) -> list[int]:
        """The sample numbers of step `number`, counted from 1."""
        epoch, at = divmod(number - 1, self.steps_per_epoch)
        chosen: list[int] = self._order(epoch)[at * self._batch_size : (at + 1) * self._batch_size].tolist()
        return chosen

    def _make_order(self, epoch: int) -> Indices:
        chosen = []
        for number, (ids, weight) in enumerate(zip(self._sources, self._weights, strict=True)):
            whole = int(weight)
            rest = round(len(ids) * weight) - whole * len(ids)
            chosen += [ids] * whole
            chosen.append(ids[_permutation(len(ids), self._seed, epoch, number + 1)[:rest]])
        together = np.concatenate(chosen)
        return together[_permutation(len(together), self._seed, epoch, 0)]


def _permutation(length: int, seed: int, epoch: int, place: int) -> Indices:
    """A random order that no version of numpy changes: Philox's raw stream is fixed, `permutation` is not."""
    key = (seed << 64) | (epoch << 32) | place
    return np.argsort(np.random.Philox(key=key).random_raw(length), kind="stable")
