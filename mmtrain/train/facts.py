"""facts.json: what a run found about its data and its model before the first step, for reports about it."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mmtrain.atomic_files import write_text
from mmtrain.config import Config
from mmtrain.dataset.samples import StoredSamples
from mmtrain.dataset.selection import find_duplicates
from mmtrain.dataset.validate import CheckedSamples
from mmtrain.errors import storage_faults
from mmtrain.train.dataset import Dataset
from mmtrain.train.folder import FACTS
from mmtrain.train.step import Learner

NUM_BARS = 40
MAX_COMPARED = 200_000
"""Samples among which duplicates are counted: about 20 microseconds each."""


def write_facts(config: Config, dataset: Dataset, learner: Learner) -> None:
    """Write the file into the directory of the run. Raises StorageError."""
    path = Path(config.run.output_dir) / FACTS
    with storage_faults(f"{path}: it cannot be written"):
        write_text(path, json.dumps(_facts(config, dataset, learner), indent=1) + "\n")


def _facts(config: Config, dataset: Dataset, learner: Learner) -> dict[str, Any]:
    runtime = learner.runtime
    return {
        "num_steps": dataset.num_steps,
        "steps_per_epoch": None if dataset.stream else dataset.plan.steps_per_epoch,
        "streaming": dataset.stream is not None,
        "num_processes": runtime.num_processes,
        "device": str(runtime.device.type),
        "components": [asdict(row) for row in learner.component_reports],
        "train": _set_facts([source.path for source in config.data.train], dataset.train, dataset.checked),
        "eval": {one.name: _set_facts([], one.samples, one.checked) for one in dataset.eval},
    }


def _set_facts(sources: Sequence[str], samples: StoredSamples, checked: CheckedSamples) -> dict[str, Any]:
    lengths = checked.num_tokens[checked.used]
    counts, edges = np.histogram(lengths, bins=_bins(int(lengths.min()), int(lengths.max())))
    return {
        "files": [Path(source).name for source in sources],
        "num_samples": len(checked.used),
        "num_images": checked.num_images,
        "num_tokens": int(lengths.sum()),
        "num_supervised": int(checked.num_supervised.sum()),
        "longest": int(lengths.max()),
        "num_too_long": len(checked.dropped),
        "num_faulty": len(checked.skipped),
        "num_removed": len(checked.duplicates),
        "num_duplicates": _num_duplicates(samples, checked),
        "lengths": {"edges": edges.astype(int).tolist(), "counts": counts.tolist()},
    }


def _num_duplicates(samples: StoredSamples, checked: CheckedSamples) -> int | None:
    """Samples that are used and the same as an earlier one; None where finding them would delay the first step."""
    used = checked.used
    return len(find_duplicates(samples, used.tolist())) if len(used) <= MAX_COMPARED else None


def _bins(low: int, high: int) -> list[int]:
    """Edges of bars of equal width, in whole tokens, from `low` to above `high`."""
    width = max(1, -(-(high - low + 1) // NUM_BARS))
    return list(range(low, high + width + 1, width))
