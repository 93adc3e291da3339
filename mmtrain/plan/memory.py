"""Whether a run fits on a GPU, and which keys of the config make it fit."""

import os
from dataclasses import asdict, dataclass
from typing import Any

from mmtrain.config import Config
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError
from mmtrain.progress import Progress
from mmtrain.safe_text import one_line
from mmtrain.train.checkpointing import GIB, available, with_checkpointing
from mmtrain.train.dataset import Dataset
from mmtrain.train.peak_memory import PeakMemory, predict_peak

CARDS = {"24 GB": 23.5, "48 GB": 44.4, "80 GB": 79.1, "141 GB": 139.7}
"""GiB that torch finds on such a GPU; of several with the same name the least."""
_ROUNDED = 256
"""Tokens that a proposed `run.microbatch_tokens` is a multiple of."""


@dataclass(frozen=True, slots=True)
class Row:
    """The memory of one GPU under some keys of the config."""

    checkpointing: bool
    """`run.activation_checkpointing`"""
    shards: int
    """Processes over which the weights are sharded; 1: replicated."""
    peak: int
    """Bytes, for the longest micro-batch of the config."""
    largest: dict[str, int | None]
    """By card the largest `run.microbatch_tokens` that fits, None where the longest sample does not."""


def gpu_memory(
    config: Config, dataset: Dataset, processor: ChatProcessor, num_processes: int, progress: Progress
) -> dict[str, Any]:
    """The rows of the table, and the longest micro-batch; or the reason why the memory cannot be predicted."""
    wanted = config.run.activation_checkpointing
    rows: list[Row] = []
    longest = int(dataset.checked.num_tokens.max())
    try:
        for value in (False, True) if wanted == "auto" else (wanted, True)[: 1 + (wanted is False)]:
            found = predict_peak(with_checkpointing(config, value), dataset, processor, "cuda", 1, progress)
            if config.run.weights == "replicate" or num_processes == 1:
                rows.append(_row(value, found, longest, 1))
            if num_processes > 1 and config.model.quantization is None:
                rows.append(_row(value, found, longest, num_processes))
    except UserError:
        raise
    except Exception as error:  # an unusual family can raise anything without values
        return {"fault": f"{type(error).__name__}: {one_line(error)}"}
    return {
        "microbatch_tokens": found.num_tokens,
        "microbatch_images": found.num_images,
        "weights": found.weights,
        "rows": [asdict(row) for row in rows],
    }


def _row(checkpointing: bool, found: PeakMemory, longest: int, num_processes: int) -> Row:
    peak = found.peak if num_processes == 1 else found.sharded(num_processes)
    activations = found.peak - found.weights - 3 * found.trainable
    largest = {}
    for name, size in CARDS.items():
        room = available(size * GIB) - (peak - activations)
        tokens = int(room * found.num_tokens / activations) // _ROUNDED * _ROUNDED
        largest[name] = tokens if tokens >= longest else None
    return Row(checkpointing, num_processes, peak, largest)


def cpu_memory(
    config: Config, dataset: Dataset, processor: ChatProcessor, weight_bytes: int, progress: Progress
) -> dict[str, Any]:
    """What one process of the run takes of this machine's memory, besides libraries; or why that is not predicted."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if weight_bytes > total:
        return {"fault": f"the weights alone need {weight_bytes / GIB:.1f} of this machine's {total / GIB:.1f} GiB"}
    try:
        plain = with_checkpointing(config, config.run.activation_checkpointing is True)
        found = predict_peak(plain, dataset, processor, "cpu", 1, progress)
    except UserError:
        raise
    except Exception as error:  # an unusual family can raise anything without values
        return {"fault": f"{type(error).__name__}: {one_line(error)}"}
    return {
        "peak": found.peak,
        "total": total,
        "microbatch_tokens": found.num_tokens,
        "microbatch_images": found.num_images,
    }
