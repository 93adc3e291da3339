"""The memory of a contrastive run, found without its weights, as `train/peak_memory.py` finds that of chats."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

from mmtrain.config import GIB, Config
from mmtrain.contrastive.embedder import Embedder
from mmtrain.contrastive.load import without_weights
from mmtrain.progress import Progress
from mmtrain.runtime.planned import PlannedRuntime
from mmtrain.train.contrastive.cuts import Microbatch
from mmtrain.train.contrastive.learner import make_contrastive_learner
from mmtrain.train.contrastive.pair_dataset import PairDataset
from mmtrain.train.contrastive.step import ContrastiveLearner
from mmtrain.train.peak_memory import PeakMemory, counted_on
from mmtrain.train.step import train_step

_NUM_STEPS = 50
"""Steps of the first epoch whose micro-batches are compared, evenly spaced."""


def predict_pair_peak(
    config: Config, dataset: PairDataset, embedder: Embedder, kind: str, progress: Progress
) -> PeakMemory:
    """The memory of one process on a device of `kind` (`cpu` or `cuda`). `embedder`: that of the config, with weights.

    Two steps are taken with the largest micro-batch, the second time twice, when moments and gradients exist. Their
    loss is that of all items of the step. Raises as `predict_peak` does.
    """
    runtime = PlannedRuntime(config.model.dtype, 1, progress.tick)
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
        items = [learner.items[number] for batch in own for number in batch.numbers]
        found = PeakMemory.of(
            learner.model,
            memory,
            kind,
            weights=weights,
            num_tokens=_num_tokens(learner, own),
            num_images=sum(len(item.encoded.images) for item in items),
        )
    others = len(learner.cuts.of(step).own) - 1
    kept = int(min(config.run.graph_memory_gib * GIB, others * found.activations))
    return replace(found, peak=found.peak + kept, kept=kept)


def _as_planned(config: Config) -> Config:
    """No graph is kept: how much memory those take is known. No adapter is read."""
    run = config.run.model_copy(update={"graph_memory_gib": 0.0})
    return config.model_copy(update={"run": run, "model": config.model.model_copy(update={"adapter": None})})


def _largest(learner: ContrastiveLearner, dataset: PairDataset) -> tuple[int, Microbatch]:
    """The step with the micro-batch of the most tokens that is trained on, and that micro-batch."""
    steps = dataset.plan.some_steps(_NUM_STEPS)
    every = itertools.chain.from_iterable(((step, own) for own in learner.cuts.of(step).own if own) for step in steps)
    return max(every, key=lambda one: _num_tokens(learner, one[1]))


def _num_tokens(learner: ContrastiveLearner, own: Microbatch) -> int:
    """Of the batch with the most tokens: those of several kinds go through the model one after another."""
    sizes: Sequence[int] = [
        sum(learner.items[number].row_tokens for number in batch.numbers)
        for batch in own
        if not learner.embedder.is_frozen(batch.kind)
    ]
    return max(sizes, default=0)
