"""How a step of pairs is cut: its distinct items, those of one kind together, in micro-batches."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mmtrain.config import Config
from mmtrain.config.run_section import Run
from mmtrain.config.tune_section import Frozen
from mmtrain.contrastive.embedder import Embedder, EncodedItem, Kind, Passes
from mmtrain.contrastive.relation import Numbers, Relation, relate
from mmtrain.dataset.microbatches import cut_step
from mmtrain.dataset.plan import Plan
from mmtrain.train.contrastive.pair_dataset import PairDataset
from mmtrain.train.objective import Cut


@dataclass(frozen=True, slots=True)
class ItemBatch:
    """Items of one kind that go through the model at once, by number."""

    kind: Kind
    numbers: tuple[int, ...]


Microbatch = tuple[ItemBatch, ...]
"""At most one batch of each kind: their gradients are added as one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairCut(Cut):
    """One step, what is compared in it, and the micro-batches of this process."""

    items: Numbers
    """(num_items,) the numbers of all distinct items of the step, ascending"""
    relation: Relation

    def rows(self, numbers: Sequence[int]) -> Numbers:
        """The positions of these items among the step's."""
        return np.searchsorted(self.items, np.array(numbers, np.int64))


class PairCuts:
    """How the steps of a data set are cut. A kind in `alone` goes through the model one item at a time: its embeddings
    are cached, so they must not depend on their neighbours."""

    def __init__(
        self,
        dataset: PairDataset,
        settings: Run,
        num_processes: int,
        index: int,
        packing: bool,
        alone: frozenset[Kind],
        passes: Passes,
        later_passes: Passes,
    ) -> None:
        """`passes`: of the first epoch; `later_passes`: of those after it, when what is cached is known."""
        self._plan: Plan = dataset.plan
        self._samples, self._settings = dataset.train, settings
        self._num_processes, self._index = num_processes, index
        self._packing, self._alone = packing, alone
        self._passes, self._later_passes = passes, later_passes
        self.of = functools.lru_cache(maxsize=256)(self._cut)
        """The cut of a step, counted from 1."""

    def microbatches(self, first: int, last: int) -> Iterator[Microbatch]:
        """This process's micro-batches that are not empty, of the steps `first` to `last`."""
        return (own for step in range(first, last + 1) for own in self.of(step).own if own)

    def of_all(self, step: int, num_processes: int) -> list[tuple[Microbatch, ...]]:
        """The micro-batches of each of so many processes, some perhaps empty; every process has as many."""
        relation = self._relation(step)
        of_kind: dict[Kind, list[int]] = {}
        for number in np.union1d(relation.queries, relation.documents).tolist():
            of_kind.setdefault(self._samples.items[number].kind, []).append(number)
        wanted = self._settings.microbatches
        multiple = num_processes if wanted == "auto" else wanted
        cost = self.passes(step).cost
        every = _joined([self._batches(kind, own, multiple, cost) for kind, own in sorted(of_kind.items())], multiple)
        share = len(every) // num_processes
        return [tuple(every[index * share : (index + 1) * share]) for index in range(num_processes)]

    def _relation(self, step: int) -> Relation:
        return relate([self._samples.pairs[index] for index in self._plan.step(step)])

    def _cut(self, step: int) -> PairCut:
        samples, relation = tuple(self._plan.step(step)), self._relation(step)
        numbers = np.union1d(relation.queries, relation.documents)
        items = [self._samples.items[number] for number in numbers]
        num_tokens = sum(item.row_tokens for item in items)
        return PairCut(
            samples=samples,
            own=self.of_all(step, self._num_processes)[self._index],
            count=len(samples),
            figures={"num_tokens": num_tokens, "num_pairs": len(samples), "num_items": len(items)},
            operations=2.0 * sum(map(self.passes(step).cost, items)),
            items=numbers,
            relation=relation,
        )

    def passes(self, step: int) -> Passes:
        """How often each item of a step is computed. It follows from the step alone, as its cut must."""
        return self._passes if step <= self._plan.steps_per_epoch else self._later_passes

    def _batches(
        self, kind: Kind, numbers: Sequence[int], multiple: int, cost: Callable[[EncodedItem], float]
    ) -> list[ItemBatch]:
        """Runs of as many batches as each other, `multiple` of them; some batches may be empty."""
        items: list[EncodedItem] = [self._samples.items[number] for number in numbers]
        limit = 1 if kind in self._alone else self._settings.microbatch_tokens
        lengths, costs = [item.row_tokens for item in items], list(map(cost, items))
        cuts = cut_step(lengths, limit, self._packing, multiple, costs if any(costs) else None)
        return [ItemBatch(kind, tuple(numbers[i] for i in cut)) for cut in cuts]


def passes_of(config: Config, embedder: Embedder, cached: frozenset[Kind]) -> tuple[Passes, Passes]:
    """Of the first epoch, and of those after it, when the embeddings of the kinds `cached` are known."""
    is_frozen = {name: isinstance(mode, Frozen) for name, mode in config.tune.modes.items()}
    text, image = (1.0 if is_frozen[name] and is_frozen["projector"] else 3.0 for name in ("language", "vision"))
    knows_images = embedder.caches_images or "image" in cached
    return Passes(text, image), Passes(0.0 if "text" in cached else text, 0.0 if knows_images else image)


def _joined(kinds: Sequence[Sequence[ItemBatch]], multiple: int) -> list[Microbatch]:
    """Micro-batches with a batch of each kind, so that every run of them has its share of each kind."""
    runs = []
    for run in range(multiple):
        own = [batches[run * len(batches) // multiple : (run + 1) * len(batches) // multiple] for batches in kinds]
        runs.append([tuple(one for one in group if one and one.numbers) for group in itertools.zip_longest(*own)])
    longest = max(map(len, runs))
    return [microbatch for run in runs for microbatch in (*run, *[()] * (longest - len(run)))]
