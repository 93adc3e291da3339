"""The memory of a contrastive run, found without its weights, as `train/peak_memory.py` finds that of chats."""

import itertools
from dataclasses import replace

from mmtrain.config import GIB, Config
from mmtrain.contrastive.embedder import Embedder
from mmtrain.contrastive.load import without_weights
from mmtrain.model.live_memory import LiveMemory
from mmtrain.progress import Progress
from mmtrain.runtime.planned import PlannedRuntime
from mmtrain.train.contrastive.cuts import ItemBatch, Microbatch
from mmtrain.train.contrastive.learner import make_contrastive_learner
from mmtrain.train.contrastive.pair_dataset import PairDataset
from mmtrain.train.contrastive.step import ContrastiveLearner
from mmtrain.train.peak_memory import PeakMemory, counted_on, keeping_no_features
from mmtrain.train.step import train_step

_NUM_STEPS = 50
"""Steps of the first epoch whose micro-batches are compared, evenly spaced."""


def predict_pair_peak(
    config: Config, dataset: PairDataset, embedder: Embedder, kind: str, progress: Progress
) -> PeakMemory:
    """The memory of one process on a device of `kind` (`cpu` or `cuda`). `embedder`: that of the config, with weights.

    Two steps are taken with the largest batches, the second time twice, when moments and gradients exist. Their loss is
    that of all items of the step. Images go through a frozen vision tower in both passes, as where the cache is full.

    Raises as `predict_peak` does.
    """
    config, runtime = keeping_no_features(config), PlannedRuntime(config.model.dtype, 1, progress.tick)
    with counted_on(kind) as memory:
        planned = without_weights(embedder, config, runtime)
        learner = make_contrastive_learner(_as_planned(config), planned, dataset, runtime, Progress(quiet=True))
        step, own = _largest(learner, dataset)
        weights = memory.num_bytes
        memory.reset()
        for number in (1, 2):
            progress.tick()
            batches = (learner.load(own) for _ in range(number))
            train_step(learner, batches, 1.0, step, config.train.max_grad_norm)
        graphs = _graph_bytes(learner, step, own, memory)
        items = [learner.items[number] for batch in own for number in batch.numbers]
        found = PeakMemory.of(
            learner.model,
            memory,
            kind,
            weights=weights,
            num_tokens=max(_num_tokens(learner, batch) for batch in own),
            num_images=sum(len(item.encoded.images) for item in items),
        )
    kept = int(min(config.run.graph_memory_gib * GIB, graphs))
    return replace(found, peak=found.peak + kept, kept=kept)


def _graph_bytes(learner: ContrastiveLearner, step: int, own: Microbatch, memory: LiveMemory) -> float:
    """What the graphs of the step take, without the largest of `own`, the largest batch of each kind."""
    total, sizes = 0.0, []
    for batch in own:
        inputs, before = learner.tensors(batch), memory.num_bytes
        with learner.dropout.at(step, inputs):
            graph = learner.embedder.embed(inputs, batch.kind)
        sizes.append(memory.num_bytes - before)
        del graph
        every = (one for one in itertools.chain.from_iterable(learner.cuts.of(step).own) if one.kind == batch.kind)
        total += sizes[-1] * sum(_num_tokens(learner, one) for one in every) / _num_tokens(learner, batch)
    return total - max(sizes)


def _as_planned(config: Config) -> Config:
    """No graph is kept: how much memory those take is known. No adapter is read."""
    run = config.run.model_copy(update={"graph_memory_gib": 0.0})
    return config.model_copy(update={"run": run, "model": config.model.model_copy(update={"adapter": None})})


def _largest(learner: ContrastiveLearner, dataset: PairDataset) -> tuple[int, Microbatch]:
    """Of the step where they have the most tokens, the largest batch of each kind that is trained."""
    found = {step: _largest_batches(learner, step) for step in dataset.plan.some_steps(_NUM_STEPS)}
    step = max(found, key=lambda step: sum(_num_tokens(learner, batch) for batch in found[step]))
    return step, found[step]


def _largest_batches(learner: ContrastiveLearner, step: int) -> Microbatch:
    largest: dict[str, ItemBatch] = {}
    for batch in itertools.chain.from_iterable(learner.cuts.of(step).own):
        if not learner.embedder.is_frozen(batch.kind):
            largest[batch.kind] = max(largest.get(batch.kind, batch), batch, key=lambda one: _num_tokens(learner, one))
    return tuple(largest.values())


def _num_tokens(learner: ContrastiveLearner, batch: ItemBatch) -> int:
    return sum(learner.items[number].row_tokens for number in batch.numbers)
