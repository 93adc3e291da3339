"""Which samples make up which step, and how a step is cut into micro-batches.

A step follows from the seed and the data alone. The cut decides only how it is computed.
"""

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


def cut_step(lengths: Sequence[int], max_tokens: int, packing: bool, multiple: int = 1) -> list[list[int]]:
    """Cut a step into micro-batches: lists of places in `lengths`, their number a multiple of `multiple`.

    A micro-batch costs the sum of its lengths when packed and rows times the longest when padded. It costs at most
    `max_tokens`, or is one longer sample alone. Some may be empty where there are fewer samples than `multiple`.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    cuts = _pack(order, lengths, max_tokens) if packing else _pad(order, lengths, max_tokens)
    num_wanted = math.ceil(len(cuts) / multiple) * multiple
    while len(cuts) < min(num_wanted, len(lengths)):
        widest = max(cuts, key=lambda cut: (len(cut) > 1, sum(lengths[i] for i in cut)))
        cuts.append([widest.pop() for _ in range(len(widest) // 2)])
    cuts += [[] for _ in range(num_wanted - len(cuts))]
    return [sorted(cut) for cut in cuts]


def _pack(order: list[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """First fit, longest first: near the fewest micro-batches there can be."""
    cuts: list[list[int]] = []
    loads: list[int] = []
    for i in order:
        number = next((n for n, load in enumerate(loads) if load + lengths[i] <= max_tokens), len(cuts))
        if number == len(cuts):
            cuts.append([])
            loads.append(0)
        cuts[number].append(i)
        loads[number] += lengths[i]
    return cuts


def _pad(order: list[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Neighbours in length together, so that little is padded."""
    cuts: list[list[int]] = []
    for i in order:
        if cuts and (len(cuts[-1]) + 1) * lengths[cuts[-1][0]] <= max_tokens:
            cuts[-1].append(i)
        else:
            cuts.append([i])
    return cuts
