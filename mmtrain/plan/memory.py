"""Whether a run fits on a GPU, and which keys of the config make it fit."""

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from mmtrain.config import GIB, Config
from mmtrain.config.tune_section import Full, Lora
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.progress import Progress
from mmtrain.train.checkpointing import available, peak_or_fault, with_checkpointing
from mmtrain.train.dataset import Dataset
from mmtrain.train.peak_memory import PeakMemory, predict_peak

CARDS = {"24 GB": 23.5, "48 GB": 44.4, "80 GB": 79.1, "141 GB": 139.7}
"""GiB that torch finds on such a GPU; of several with the same name the least."""
Predict = Callable[[Config, str], PeakMemory | str]
"""The memory of one process on a kind of device (`cpu` or `cuda`), or why it cannot be predicted."""
_ROUNDED = 256
"""Tokens that a proposed `run.microbatch_tokens` is a multiple of."""


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """The memory of one GPU under some keys of the config."""

    checkpointing: bool
    """`run.activation_checkpointing`"""
    quantization: str | None
    """`model.quantization`"""
    shards: int
    """Processes over which the weights are sharded; 1: replicated."""
    peak: int
    """Bytes, for the longest micro-batch of the config."""
    fits: list[str]
    """The cards on which it fits."""
    largest: dict[str, int | None]
    """By card the largest `run.microbatch_tokens` that fits, None where the longest sample does not."""


def of_chats(dataset: Dataset, processor: ChatProcessor, progress: Progress) -> Predict:
    """The memory of runs on these chats."""
    return lambda config, kind: peak_or_fault(lambda: predict_peak(config, dataset, processor, kind, 1, progress))


def memory_figures(
    config: Config, predict: Predict, weight_bytes: int, longest: int, num_processes: int, is_here: bool
) -> dict[str, Any]:
    """The memory on this machine's CPU, if the run `is_here`, and on GPUs, if it can be on one."""
    figures = {}
    if is_here:
        figures["cpu_memory"] = cpu_memory(config, predict, weight_bytes)
    if config.run.device != "cpu":
        figures["gpu_memory"] = gpu_memory(config, predict, longest, num_processes)
    return figures


def image_features(config: Config, num_bytes: float) -> dict[str, float]:
    """Bytes of the features that are cached, and how many of them on disk."""
    on_disk = min(num_bytes, config.run.image_cache.disk_gib * GIB)
    return {"image_features": num_bytes, "image_features_on_disk": on_disk}


def gpu_memory(config: Config, predict: Predict, longest: int, num_processes: int) -> dict[str, Any]:
    """The rows of the table, and the longest micro-batch; or the reason why the memory cannot be predicted. `longest`:
    tokens that a micro-batch has at least."""
    rows: list[MemoryRow] = []
    weights = 0
    for own in _variants(config):
        predicted = predict(own, "cuda")
        if isinstance(predicted, str):
            return {"fault": predicted}
        found = predicted
        weights = found.weights if not rows else weights
        if config.run.weights == "replicate" or num_processes == 1:
            rows.append(_row(own, found, longest, 1))
        if num_processes > 1 and own.model.quantization is None:
            rows.append(_row(own, found, longest, num_processes))
        if set(rows[0].fits) == set(CARDS):
            break  # nothing has to be changed
    return {
        "microbatch_tokens": found.num_tokens,
        "microbatch_images": found.num_images,
        "weights": weights,
        "rows": [asdict(row) for row in sorted(rows, key=lambda row: row.shards)],
    }


def _variants(config: Config) -> Iterator[Config]:
    """The config with the values of keys that are predicted, each needing less memory than the one before."""
    if config.run.activation_checkpointing is not True:
        yield with_checkpointing(config, False)
    yield with_checkpointing(config, True)
    has_adapter = any(isinstance(mode, Lora) for mode in config.tune.trainable.values())
    is_possible = has_adapter and not isinstance(config.tune.language, Full) and config.run.weights == "replicate"
    if config.model.quantization is None and is_possible and config.objective.kind == "chat":
        quantized = config.model_copy(update={"model": config.model.model_copy(update={"quantization": "nf4"})})
        yield with_checkpointing(quantized, True)


def _row(config: Config, found: PeakMemory, longest: int, num_processes: int) -> MemoryRow:
    peak = found.peak if num_processes == 1 else found.sharded(num_processes)
    largest = {}
    for name, size in CARDS.items():
        room = available(size * GIB) - (peak - found.activations)
        tokens = int(room * found.num_tokens / found.activations) // _ROUNDED * _ROUNDED
        largest[name] = tokens if tokens >= longest else None
    fits = [name for name, size in CARDS.items() if peak <= available(size * GIB)]
    checkpointing = config.run.activation_checkpointing is True
    return MemoryRow(checkpointing, config.model.quantization, num_processes, peak, fits, largest)


def cpu_memory(config: Config, predict: Predict, weight_bytes: int) -> dict[str, Any]:
    """What one process of the run takes of this machine's memory, besides libraries; or why that is not predicted."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if weight_bytes > total:
        return {"fault": f"the weights alone need {weight_bytes / GIB:.1f} of this machine's {total / GIB:.1f} GiB"}
    plain = with_checkpointing(config, config.run.activation_checkpointing is True)
    found = predict(plain, "cpu")
    if isinstance(found, str):
        return {"fault": found}
    return {
        "peak": found.peak,
        "total": total,
        "microbatch_tokens": found.num_tokens,
        "microbatch_images": found.num_images,
    }
