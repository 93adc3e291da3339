"""Decides whether the activations of layers are stored or computed again: `run.activation_checkpointing: auto`."""

from collections.abc import Callable
from typing import Any

import torch

from mmtrain.config import GIB, Config
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError
from mmtrain.progress import Progress
from mmtrain.runtime.processes import Runtime
from mmtrain.safe_text import error_line
from mmtrain.train.dataset import Dataset
from mmtrain.train.peak_memory import PeakMemory, predict_peak

RESERVED_BYTES, RESERVED_SHARE = 1.0 * GIB, 0.05
"""What is kept free of a GPU's memory: CUDA's own context and the workspaces of libraries, and a share that an
allocator loses to fragmentation."""


def available(total_bytes: float) -> float:
    """Bytes of a GPU with `total_bytes` that a prediction may use."""
    return total_bytes * (1 - RESERVED_SHARE) - RESERVED_BYTES


def peak_or_fault(predict: Callable[[], PeakMemory]) -> PeakMemory | str:
    """What `predict` gives, or in one line why the memory cannot be predicted. Raises UserError."""
    try:
        return predict()
    except UserError:
        raise
    except Exception as error:  # an unusual family can raise anything without values
        return error_line(error)


def peak_of(found: PeakMemory, config: Config, num_processes: int) -> int:
    """The predicted peak, with the weights sharded if the config says so."""
    return found.sharded(num_processes) if config.run.is_sharded(num_processes) else found.peak


def decide_checkpointing(
    config: Config, dataset: Dataset, processor: ChatProcessor, runtime: Runtime, progress: Progress
) -> Config:
    """The config with `run.activation_checkpointing` true or false. The first process decides for all; on a GPU
    `progress` says in one line what was decided and why.

    `auto`: false on the CPU; on a GPU true if the memory predicted for the longest micro-batch does not fit.
    """
    if config.run.activation_checkpointing != "auto":
        return config
    if runtime.device.type != "cuda":
        return with_checkpointing(config, False)
    count = runtime.num_processes

    def decide() -> tuple[bool, str]:
        total = torch.cuda.get_device_properties(runtime.device).total_memory
        return _decision(config, dataset, processor, count, total, progress)

    is_on, why = runtime.from_first("activation checkpointing", decide)
    progress.say(f"activation checkpointing: {'on' if is_on else 'off'}, {why}")
    return with_checkpointing(config, is_on)


def with_checkpointing(config: Config, value: bool) -> Config:
    """The config with this value of `run.activation_checkpointing`."""
    return config.model_copy(update={"run": config.run.model_copy(update={"activation_checkpointing": value})})


def _decision(
    config: Config, dataset: Dataset, processor: ChatProcessor, count: int, total: int, progress: Progress
) -> tuple[bool, str]:
    """Whether it is on, and why."""
    seed: Any = torch.random.get_rng_state()
    try:
        found = peak_or_fault(lambda: predict_peak(config, dataset, processor, "cuda", count, progress))
    finally:
        torch.random.set_rng_state(seed)
    if isinstance(found, str):
        return True, f"because its memory cannot be predicted: {found}"
    peak = peak_of(found, config, count)
    fits = peak <= available(total)
    return not fits, (
        f"a micro-batch of {found.num_tokens:,} tokens needs {peak / GIB:.1f} GiB without it, and "
        f"{available(total) / GIB:.1f} of the GPU's {total / GIB:.1f} GiB can be used (predicted)"
    )
