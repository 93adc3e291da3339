"""What one step of the 7B shape takes on a GPU, found without one: its own code runs on tensors without values.

The floating-point operations of its products and attention, next to those that it cannot avoid; the most memory at
once; and the share of the ceiling that is left where every operator takes as long as its operations or its bytes do.
Formulas that a GPU compiles into one kernel count as the operators that they consist of, so the share is a lower bound.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench.chats import WORDS
from bench.shapes import make_model
from mmtrain.config.schema import Config
from mmtrain.encoding.load import load_processor
from mmtrain.model.live_memory import LiveMemory
from mmtrain.model.load import load_without_weights
from mmtrain.model.planned_device import planned_on
from mmtrain.model.without_values import WithoutValues
from mmtrain.progress import QUIET
from mmtrain.runtime.planned import PlannedRuntime
from mmtrain.train.dataset import Dataset
from mmtrain.train.learner import make_learner
from mmtrain.train.step import train_step

_RATE, _BANDWIDTH = 775e12, 4.8e12
"""Of an H200: operations a second of a large bfloat16 product as measured (docs/speed.md), bytes a second as stated."""
_GIB = 2**30


class _Roofline(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations, and the seconds that each operator takes at least."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations, self.seconds = 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        formula: Callable[..., int] | None = flop_registry.get(func.overloadpacket)
        operations = 0 if formula is None else formula(*args, **(kwargs or {}), out_val=out)
        num_bytes = sum(leaf.nbytes for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor))
        self.operations += operations
        self.seconds += max(operations / _RATE, num_bytes / _BANDWIDTH)
        return out


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench step", description=__doc__)
    parser.add_argument("--shape", default="qwen2.5-vl-7b")
    parser.add_argument("--side", type=int, default=1000, help="of the five images, in pixels")
    options = parser.parse_args(words)
    for kind in ("images", "chats"):
        with tempfile.TemporaryDirectory() as name:
            print(_measured(options.shape, _data(Path(name), kind, options.side)))


def _data(folder: Path, kind: str, side: int) -> Path:
    """Five chats with an image and an answer of 150 words, or 75 with answers of 40 words."""
    count, length = (5, 150) if kind == "images" else (75, 40)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        answer = " ".join(WORDS[(number + n) % len(WORDS)] for n in range(length))
        messages = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "images": []})
        if kind == "images":
            PIL.Image.new("RGB", (side, side), (40 * number, 90, 30)).save(folder / f"{number}.png")
            messages[0]["content"] = "<image>What is it?"
            rows[-1]["images"] = [f"{number}.png"]
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _measured(shape: str, data: Path) -> str:
    """A step of all samples in one micro-batch, no image cached."""
    path = make_model(shape, data.parent)
    config = Config.model_validate(
        {
            "model": {"path": str(path), "dtype": "bfloat16"},
            "tune": {"language": {"mode": "lora", "rank": 16, "alpha": 32.0}},
            "data": {"train": [{"path": str(data)}], "max_length": 8192},
            "train": {"steps": 1, "batch_size": 5, "learning_rate": 1e-4},
            "run": {"output_dir": str(data.parent / "run"), "image_cache": {"memory_gib": 0.0}},
        }
    )
    processor = load_processor(str(path))
    dataset = Dataset(config, processor, QUIET)
    memory = LiveMemory(512)
    counting = WithoutValues(memory)
    with planned_on("cuda", counting), counting:
        runtime = PlannedRuntime("bfloat16", 1, lambda: None)
        learner = make_learner(config, processor, runtime, QUIET, lambda: load_without_weights(config.model))
        memory.reset()
        samples = dataset.checked
        with _Roofline() as roofline:
            batches = learner.batches(dataset.train, [list(range(len(dataset.train)))])
            train_step(learner, batches, float(samples.num_supervised.sum()), 1, 1.0)
    needed = 2 * learner.costs.of(
        samples.num_tokens, samples.num_image_tokens, samples.image_token_pairs, samples.num_supervised
    ).sum(dtype=float)
    return (
        f"{data.stem}: {samples.num_tokens.sum():,} tokens, {roofline.operations / 1e12:.1f} TFLOP for "
        f"{needed / 1e12:.1f} necessary ones, peak {memory.peak / _GIB:.1f} GiB, at least "
        f"{needed / _RATE / roofline.seconds:.0%} of the ceiling"
    )
