"""How much memory a run takes at most, found without its weights: its own code is run on tensors without values.

The model is made as the config says, and takes two steps: with the first micro-batch of the plan, then with the
longest one, when the optimizer's moments exist. See `model/without_values.py`.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mmtrain.config import Config
from mmtrain.config.run_section import ImageCache
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.model.live_memory import LiveMemory
from mmtrain.model.load import load_without_weights
from mmtrain.model.planned_device import planned_on
from mmtrain.model.without_values import WithoutValues
from mmtrain.progress import Progress
from mmtrain.runtime.planned import PlannedRuntime
from mmtrain.runtime.shard import repeated_blocks
from mmtrain.train.checkpoint import trainable_parameters
from mmtrain.train.dataset import Dataset
from mmtrain.train.learner import make_learner
from mmtrain.train.step import Learner, train_step
from mmtrain.train.step_cuts import StepCuts

_BLOCKS = {"cuda": 512}
"""Bytes that an allocator rounds up to, by kind of device."""
_NUM_STEPS = 200
"""Steps of the first epoch whose micro-batches are compared, evenly spaced."""

Microbatch = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """Bytes on the device of one process."""

    weights: int
    """Of the model, frozen and trainable."""
    trainable: int
    """Of the trainable weights, and of their gradients."""
    peak: int
    """The most at once: weights, gradients, moments and activations."""
    num_tokens: int
    """Of the longest micro-batch."""
    num_images: int
    whole: int = 0
    """Of weights that are whole at a time where the others are sharded."""
    kept: int = 0
    """Of activations that are kept between the two passes of a contrastive step."""

    @property
    def activations(self) -> int:
        """What grows with the micro-batch."""
        return self.peak - self.weights - 3 * self.trainable - self.kept

    @classmethod
    def of(cls, model: Any, memory: LiveMemory, kind: str, **sizes: int) -> "PeakMemory":
        """After steps of `model`, without gradients, that were counted in `memory`."""
        trainable = sum(parameter.nbytes for parameter in trainable_parameters(model).values())
        update = memory.num_bytes + trainable + trainable * (kind == "cuda")  # foreach: one copy of all at once
        return cls(trainable=trainable, peak=max(memory.peak, update), **sizes)

    def sharded(self, num_processes: int) -> int:
        """The peak where the weights, their gradients and moments are sharded over so many processes."""
        state = self.weights + 3 * self.trainable
        return self.peak - state + state // num_processes + self.whole


def predict_peak(
    config: Config, dataset: Dataset, processor: ChatProcessor, kind: str, num_processes: int, progress: Progress
) -> PeakMemory:
    """The memory of one of `num_processes` processes on devices of `kind` (`cpu` or `cuda`), weights replicated.

    `progress` is ticked. Raises NeedsValuesError where what the model allocates depends on values, and whatever the
    model raises where it cannot be run. Random states change.
    """
    quiet = Progress(progress.tick, quiet=True)
    config = _as_planned(keeping_no_features(config))
    runtime = PlannedRuntime(config.model.dtype, num_processes, progress.tick)
    with counted_on(kind) as memory:
        learner = make_learner(config, processor, runtime, quiet, lambda: load_without_weights(config.model))
        first, longest = _microbatches(StepCuts(dataset, learner, config.run), dataset, learner.packing)
        weights = memory.num_bytes
        memory.reset()
        for step, microbatches in ((1, [first]), (2, [first, longest])):
            progress.tick()
            _take_step(learner, dataset, microbatches, step, config.train.max_grad_norm)
        return PeakMemory.of(
            learner.model,
            memory,
            kind,
            weights=weights,
            num_tokens=int(dataset.checked.num_tokens[list(longest)].sum()),
            num_images=int(dataset.train.store.num_images[list(longest)].sum()),
            whole=_whole_at_a_time(learner.model),
        )


@contextmanager
def counted_on(kind: str) -> Iterator[LiveMemory]:
    """Inside, tensors have no values, and their memory on a device of `kind` is counted."""
    memory = LiveMemory(_BLOCKS.get(kind, 1))
    counting = WithoutValues(memory)
    with planned_on(kind, counting), counting:
        yield memory


def _as_planned(config: Config) -> Config:
    """Without what changes no memory on a GPU, or cannot be run without values."""
    changes = {
        "weights": "replicate",
        "compile": False,
        "activation_checkpointing": config.run.activation_checkpointing is True,
    }
    run, model = config.run.model_copy(update=changes), config.model.model_copy(update={"adapter": None})
    return config.model_copy(update={"run": run, "model": model})


def keeping_no_features(config: Config) -> Config:
    """Image features are computed as with the config's cache, and none is kept: on a GPU they are in host memory."""
    cache = config.run.image_cache
    if not max(cache.memory_gib, cache.disk_gib):
        return config
    run = config.run.model_copy(update={"image_cache": ImageCache(memory_gib=1e-9, disk_gib=0.0)})
    return config.model_copy(update={"run": run})


def _microbatches(cuts: StepCuts, dataset: Dataset, packing: bool) -> tuple[Microbatch, Microbatch]:
    """The first one, and the one with the most tokens, padding included; of equal ones the one with the most of
    images."""
    checked = dataset.checked
    every = [own for step in dataset.plan.some_steps(_NUM_STEPS) for own in cuts.of_all(step) if own]
    every.append((int(checked.num_tokens.argmax()),))

    def size(own: Sequence[int]) -> tuple[int, int]:
        lengths = checked.num_tokens[list(own)]
        num_tokens = lengths.sum() if packing else len(own) * lengths.max()
        return int(num_tokens), int(checked.num_image_tokens[list(own)].sum())

    return every[0], max(every, key=size)


def _take_step(
    learner: Learner, dataset: Dataset, microbatches: Sequence[Microbatch], step: int, max_grad_norm: float | None
) -> None:
    samples = list(itertools.chain.from_iterable(microbatches))
    num_supervised = max(1, int(dataset.checked.num_supervised[samples].sum()))
    train_step(learner, learner.batches(dataset.train, microbatches), num_supervised, step, max_grad_norm)


def _whole_at_a_time(model: Any) -> int:
    """Bytes of the weights outside of repeated blocks, which FSDP2 does not free between the two passes, and of two
    blocks: the one that is computed and the next one, which is being gathered."""
    sizes = [_num_bytes(block) for block in repeated_blocks(model)]
    return _num_bytes(model) - sum(sizes) + 2 * max(sizes, default=0)


def _num_bytes(module: Any) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
