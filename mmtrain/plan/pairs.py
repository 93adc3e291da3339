"""`mmtrain plan` for a contrastive run: its pairs, steps, disk space, time and memory."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mmtrain.config import Config
from mmtrain.contrastive.load import load_embedder
from mmtrain.plan.memory import image_features, memory_figures
from mmtrain.plan.pair_memory import predict_pair_peak
from mmtrain.plan.report import image_feature_lines, size_text, time_lines, waiting_line
from mmtrain.progress import Progress
from mmtrain.runtime.processes import Runtime
from mmtrain.train.ceiling import matmul_rate
from mmtrain.train.checkpoint import checkpoint_bytes
from mmtrain.train.checkpointing import peak_or_fault
from mmtrain.train.contrastive.learner import make_contrastive_learner
from mmtrain.train.contrastive.pair_dataset import PairDataset
from mmtrain.train.contrastive.step import ContrastiveLearner
from mmtrain.train.peak_memory import PeakMemory, keeping_no_features

NUM_STEPS = 50
"""Steps that are cut, evenly spaced over the first epoch."""


def pair_figures(
    config: Config, device: str, is_elsewhere: bool, counts: Sequence[int], progress: Progress
) -> dict[str, Any]:
    """Every figure, and the waiting for each number of processes in `counts`. `is_elsewhere`: the run is for a GPU,
    which this machine lacks.

    The model is loaded as in the run: it decides how items are encoded. Raises UserError as the run does.
    """
    runtime = Runtime(config.model.dtype, device=device)
    embedder = load_embedder(config, runtime, progress)
    dataset = PairDataset(config, embedder, progress)
    learner = make_contrastive_learner(keeping_no_features(config), embedder, dataset, runtime, progress)
    items = dataset.train.items
    steps = _steps(config, dataset, learner, counts)

    def predict(own: Config, kind: str) -> PeakMemory | str:
        return peak_or_fault(lambda: predict_pair_peak(own, dataset, embedder, kind, progress))

    with progress.task("counting memory"):
        weight_bytes = sum(parameter.nbytes for parameter in learner.model.parameters())
        longest = max(item.row_tokens for item in items)
        is_here = runtime.device.type == "cpu" and not is_elsewhere
        memory = memory_figures(config, predict, weight_bytes, longest, 1, is_here)
    return {
        "data": {
            "pairs": len(dataset.used),
            "items": len(items),
            "items_with_images": sum(bool(item.encoded.images) for item in items),
            "longest": max(item.encoded.num_tokens for item in items),
            "left_out": len(dataset.dropped_rows()),
        },
        "steps": steps,
        "disk": {
            "checkpoint": checkpoint_bytes(learner.model),
            "num_checkpoints": config.run.keep_checkpoints + 1,
            **image_features(config, _feature_bytes(learner)),
        },
        "time": least_time(_operations(dataset, learner), runtime.device, learner.model.dtype),
        **memory,
    }


def least_time(operations: float, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The time of operations that no run can avoid, at the measured rate of a large matrix product on `device`."""
    rate = matmul_rate(device, dtype)
    return {"operations": operations, "rate": rate, "device": device.type, "seconds": operations / rate}


def _feature_bytes(learner: ContrastiveLearner) -> float:
    """Of the features of all images, where those are cached."""
    if not learner.embedder.caches_images:
        return 0.0
    each = learner.model.get_input_embeddings().weight.shape[1] * learner.model.dtype.itemsize
    return float(each) * sum(span.num_placeholders for item in learner.items for span in item.encoded.images)


def _operations(dataset: PairDataset, learner: ContrastiveLearner) -> float:
    """Of all steps; after the first epoch nothing that is cached is computed."""
    numbers, per_epoch = dataset.plan.some_steps(NUM_STEPS), dataset.plan.steps_per_epoch
    first, later = (
        float(np.mean([learner.cuts.of(number + epoch * per_epoch).operations for number in numbers]))
        for epoch in (0, 1)
    )
    num_first = min(dataset.num_steps, per_epoch)
    return num_first * first + (dataset.num_steps - num_first) * later


def _steps(config: Config, dataset: PairDataset, learner: ContrastiveLearner, counts: Sequence[int]) -> dict[str, Any]:
    numbers = dataset.plan.some_steps(NUM_STEPS)
    cuts = [learner.cuts.of(number) for number in numbers]
    return {
        "steps": dataset.num_steps,
        "steps_per_epoch": dataset.plan.steps_per_epoch,
        "batch_size": config.train.batch_size,
        "microbatches": float(np.mean([len(cut.own) for cut in cuts])),
        "items": float(np.mean([len(cut.items) for cut in cuts])),
        "operations": float(np.mean([cut.operations for cut in cuts])),
        "waiting": {
            count: float(np.mean([_waiting(learner, number, count) for number in numbers]))
            for count in counts
            if config.run.microbatches == "auto" or config.run.microbatches % count == 0
        },
    }


def _waiting(learner: ContrastiveLearner, step: int, num_processes: int) -> float:
    """The share of their time that processes wait for the one with the most to compute."""
    cost = learner.cuts.passes(step).cost
    costs = [
        sum(cost(learner.items[number]) for microbatch in own for batch in microbatch for number in batch.numbers)
        for own in learner.cuts.of_all(step, num_processes)
    ]
    return 1 - sum(costs) / (num_processes * max(costs))


def pair_lines(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is printed, each line with its title."""
    data, steps, disk, time = (figures[name] for name in ("data", "steps", "disk", "time"))
    yield (
        "data",
        f"{data['pairs']:,} pairs of {data['items']:,} distinct items, {data['items_with_images']:,} of them with "
        f"images; {data['left_out']:,} left out",
    )
    yield "tokens", f"the longest item has {data['longest']:,}"
    yield "steps", f"{steps['steps']:,} of {steps['batch_size']:,} pairs, {steps['steps_per_epoch']:,} an epoch"
    yield "", f"{steps['items']:.4g} distinct items and {steps['microbatches']:.3g} micro-batches a step on one process"
    yield waiting_line(steps)
    total = disk["checkpoint"] * disk["num_checkpoints"]
    yield "disk", f"{size_text(total)} checkpoints ({disk['num_checkpoints']} x {size_text(disk['checkpoint'])})"
    yield from image_feature_lines(disk)
    yield from time_lines(time)
    yield "", "what run.graph_memory_gib does not keep is computed once more"
