"""A step of a model as deep as Qwen2.5-VL-7B and far thinner: its kernels, and what the host waits for.

The numbers depend on neither the width nor the size of images: there is no loop over heads, windows or patches.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import PIL.Image
from transformers import AutoConfig, AutoModelForImageTextToText

from fake_cuda.device import FakeDevice
from mmtrain.config.schema import Config
from mmtrain.train.lost_gradients import backward
from mmtrain.train.step import accumulate_gradients
from support.builders import make_qwen, randomized, train_and_run, write_jsonl
from support.learning import learner_for
from support.meter import Meter

COLOURS = ("red", "green", "blue", "grey", "white")


def _model(folder: Path) -> Path:
    path = make_qwen(folder / "model")
    config = AutoConfig.from_pretrained(path)
    config.text_config.num_hidden_layers, config.text_config.layer_types = 28, ["full_attention"] * 28
    config.vision_config.depth, config.vision_config.fullatt_block_indexes = 32, [7, 15, 23, 31]
    return randomized(AutoModelForImageTextToText.from_config(config), path)


def _data(folder: Path, kind: str) -> Path:
    """Five chats with an image each, or 75 short ones."""
    rows: list[dict[str, Any]] = []
    for number, colour in enumerate(COLOURS if kind == "images" else COLOURS * 15):
        chat: list[dict[str, str]] = [
            {"role": "user", "content": f"Say {number}."},
            {"role": "assistant", "content": f"{colour}, {number}"},
        ]
        rows.append({"messages": chat, "images": [f"{colour}.png"] if kind == "images" else []})
        if kind == "images":
            PIL.Image.new("RGB", (200 + 8 * number, 160), colour).save(folder / f"{colour}.png")
            chat[0]["content"] = "<image>What colour is it?"
    return write_jsonl(folder / "data.jsonl", rows)


def run(kind: str) -> dict[str, Any]:
    """What a step of `images` or `chats` takes, whose images are in no cache."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = {"output_dir": str(folder / "run"), "microbatch_tokens": 16_384, "image_cache": {"memory_gib": 0.0}}
        config = {
            "model": {"path": str(_model(folder)), "dtype": "bfloat16"},
            "tune": {"language": {"mode": "lora", "rank": 8, "alpha": 16.0}},
            "data": {"train": [{"path": str(_data(folder, kind))}]},
            **train_and_run(batch_size=5, learning_rate=1e-3, device="cuda", **run),
        }
        hidden = ("/torch/", "/fake_cuda/device.py")
        with FakeDevice(), Meter(hidden=hidden) as meter:  # type: ignore[no-untyped-call]
            learner, dataset = learner_for(Config.model_validate(config))
            samples = list(range(len(dataset.train)))
            count = float(dataset.checked.sum_weights.sum())
            meter.reset()
            with _backward_of(meter) as in_backward:
                accumulate_gradients(learner, learner.batches(dataset.train, [samples]), count, 1)
            total = meter.num_kernels
        return {
            "forward": total - sum(in_backward),
            "backward": sum(in_backward),
            "waits": meter.waits.total(),
            "pageable": meter.pageable.total(),
            "packing": learner.packing,
        }


@contextmanager
def _backward_of(meter: Meter) -> Iterator[list[int]]:
    """The kernels of each backward pass inside."""
    found: list[int] = []

    def counted(*args: Any) -> None:
        before = meter.num_kernels
        backward(*args)
        found.append(meter.num_kernels - before)

    with patch("mmtrain.train.step.backward", counted):
        yield found
