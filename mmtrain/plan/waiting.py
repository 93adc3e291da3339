"""How long processes wait for each other, and what padding costs: steps are cut as training cuts them.

Time is counted in multiply-additions, from the shape of the model: its weights are not read. With `run.weights:
replicate` processes wait once per step, with `shard` after every micro-batch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmtrain.config.run_section import Run
from mmtrain.dataset.microbatches import Cut, cut_step
from mmtrain.dataset.validate import CheckedSamples
from mmtrain.model.cost import CostModel, Values


@dataclass
class Step:
    """The samples of one step: their tokens, their images' tokens and those squared, and what each costs alone."""

    lengths: Any
    image_tokens: Any
    image_token_pairs: Any
    costs: Values

    def positions(self, cut: Sequence[int], packing: bool) -> int:
        """Positions that a micro-batch takes, padding counted."""
        own = self.lengths[list(cut)]
        return int(own.sum() if packing else len(cut) * own.max(initial=0))


@dataclass
class Waiting:
    """Time of the mean and of the slowest process, summed over steps."""

    mean: float = 0.0
    slowest: float = 0.0

    def add(self, mean: float, slowest: float) -> None:
        self.mean += mean
        self.slowest += slowest

    @property
    def share(self) -> float:
        """The share of all processes' time in which they wait for the slowest."""
        return 1 - self.mean / self.slowest if self.slowest else 0.0


class Simulation:
    """Cuts steps of checked samples, and computes what each process has to do."""

    def __init__(self, settings: Run, checked: CheckedSamples, costs: CostModel, packing: bool) -> None:
        self._settings, self._checked, self._costs = settings, checked, costs
        self.packing = packing

    def step(self, samples: Sequence[int]) -> Step:
        """The step of these sample indices."""
        chosen, checked = list(samples), self._checked
        of = checked.num_tokens[chosen], checked.num_image_tokens[chosen], checked.image_token_pairs[chosen]
        return Step(*of, self._costs.of(*of, checked.num_supervised[chosen]))

    def cut(self, step: Step, multiple: int, packing: bool | None = None) -> Cut:
        """Its micro-batches, in a multiple of `multiple`."""
        packing = self.packing if packing is None else packing
        limit = self._settings.microbatch_tokens
        return cut_step(step.lengths.tolist(), limit, packing, multiple, step.costs.tolist())

    def times(self, step: Step, cuts: Sequence[Cut]) -> Values:
        """(processes, micro-batches) what each costs; padding is computed like any token."""
        times = np.zeros((len(cuts), max(map(len, cuts))))
        for at in ((p, n) for p, own in enumerate(cuts) for n in range(len(own))):
            cut = cuts[at[0]][at[1]]
            if self.packing or not cut:
                times[at] = step.costs[cut].sum()
            else:
                longest = np.full(len(cut), step.lengths[cut].max())
                padded = self._costs.of(longest, step.image_tokens[cut], step.image_token_pairs[cut])
                times[at] = padded.sum()
        return times

    def add(self, waiting: Waiting, times: Values) -> None:
        """Processes wait for each other after every micro-batch (sharded weights), else once."""
        waits = times if self._settings.weights == "shard" else times.sum(1, keepdims=True)
        waiting.add(float(waits.mean(0).sum()), float(waits.max(0).sum()))

    def waiting(self, steps: Iterable[Step], num_processes: int) -> float:
        """The share of time in which so many processes wait for the slowest, over `steps`."""
        found, wanted = Waiting(), self._settings.microbatches
        for step in steps:
            cuts = self.cut(step, num_processes if wanted == "auto" else wanted)
            share = len(cuts) // num_processes
            self.add(found, self.times(step, [cuts[n : n + share] for n in range(0, len(cuts), share)]))
        return found.share
