"""`mmtrain plan` for a run over chats: its samples, steps, disk space, time and memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mmtrain.config import Config
from mmtrain.encoding.load import processor_of
from mmtrain.plan.memory import image_features, memory_figures, of_chats
from mmtrain.plan.pairs import NUM_STEPS, least_time
from mmtrain.plan.structure import Structure, structure_of
from mmtrain.plan.waiting import Simulation, Step
from mmtrain.progress import Progress
from mmtrain.runtime.device import find_device
from mmtrain.scoring.image_cache import caches_features
from mmtrain.train.dataset import Dataset


def chat_figures(
    config: Config, device_name: str, is_elsewhere: bool, counts: Sequence[int], progress: Progress
) -> dict[str, Any]:
    """Every figure, and the waiting for each number of processes in `counts`. `is_elsewhere`: the run is for a GPU that
    this machine does not have. Raises UserError as the run does."""
    processor = processor_of(config.model)
    dataset = Dataset(config, processor, progress)
    structure = structure_of(config, processor)
    device = find_device(device_name, config.model.dtype)
    figures: dict[str, Any] = {
        "data": _data(dataset),
        "steps": _steps(config, dataset, structure, counts),
        "disk": _disk(config, dataset, structure),
        "time": _time(config, dataset, structure, device),
    }
    weight_bytes = structure.num_parameters * getattr(torch, config.model.dtype).itemsize
    longest = int(dataset.checked.num_tokens.max())
    predict = of_chats(dataset, processor, progress)
    with progress.task("counting memory"):
        is_here = device.type == "cpu" and not is_elsewhere
        return figures | memory_figures(config, predict, weight_bytes, longest, max(counts), is_here)


def _data(dataset: Dataset) -> dict[str, int]:
    checked = dataset.checked
    return {
        "samples": len(checked.used),
        "images": checked.num_images,
        "tokens": int(checked.num_tokens.sum()),
        "supervised": int(checked.num_supervised.sum()),
        "longest": int(checked.num_tokens.max()),
        "left_out": len(checked.left_out),
    }


def _steps(config: Config, dataset: Dataset, structure: Structure, counts: Sequence[int]) -> dict[str, Any]:
    packing = config.run.packing is not False  # auto: the trial at the start is taken to pass
    simulation = Simulation(config.run, dataset.checked, structure.costs, packing)
    steps = [simulation.step(dataset.plan.step(number)) for number in dataset.plan.some_steps(NUM_STEPS)]
    wanted = config.run.microbatches
    waiting = {n: simulation.waiting(steps, n) for n in counts if wanted == "auto" or wanted % n == 0}
    return {
        "steps": dataset.num_steps,
        "steps_per_epoch": dataset.plan.steps_per_epoch,
        "batch_size": config.train.batch_size,
        "microbatches": float(np.mean([len(simulation.cut(step, 1)) for step in steps])),
        "packing": packing,
        "padding_of_rows": _padding(simulation, steps),
        "waiting": waiting,
    }


def _padding(simulation: Simulation, steps: Sequence[Step]) -> float:
    """The share of padding if every sample had a row of its own."""
    tokens = sum(int(step.lengths.sum()) for step in steps)
    positions = sum(step.positions(cut, False) for step in steps for cut in simulation.cut(step, 1, packing=False))
    return 1 - tokens / positions


def _disk(config: Config, dataset: Dataset, structure: Structure) -> dict[str, Any]:
    """Bytes. A checkpoint is the trainable weights and two moments, in float32; one more exists while it is written."""
    checked, store = dataset.checked, dataset.train.store
    features = float(checked.num_image_tokens.sum(dtype=np.int64)) * structure.feature_bytes
    return {
        "checkpoint": 12 * structure.num_trainable,
        "num_checkpoints": config.run.keep_checkpoints + 1,
        "encoded_samples": store.num_bytes,
        **image_features(config, features if caches_features(config, 1) else 0.0),
    }


def _time(config: Config, dataset: Dataset, structure: Structure, device: torch.device) -> dict[str, Any]:
    checked, plan = dataset.checked, dataset.plan
    epochs = dataset.num_steps / plan.steps_per_epoch
    cached = structure.costs.with_cached_features if caches_features(config, 1) else structure.costs

    def epoch(costs: Any) -> float:
        of = checked.num_tokens, checked.num_image_tokens, checked.image_token_pairs, checked.num_supervised
        return 2.0 * float(costs.of(*of).sum()) * plan.epoch_samples / len(checked.used)

    operations = min(epochs, 1.0) * epoch(structure.costs) + max(epochs - 1.0, 0.0) * epoch(cached)
    return least_time(operations, device, getattr(torch, config.model.dtype))
