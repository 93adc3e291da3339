"""A learner of a config, with LoRA's B non-zero, and the loss and gradients of one step cut in a given way."""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtrain.config.schema import Config, Model
from mmtrain.dataset.batch import Loader
from mmtrain.encoding.load import load_processor, processor_of
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.evaluate.evaluation import ModelScoring
from mmtrain.model.kernels.products import ROW_MULTIPLE
from mmtrain.progress import QUIET
from mmtrain.runtime.processes import Runtime
from mmtrain.scoring.scores import Scores
from mmtrain.train.dataset import Dataset
from mmtrain.train.learner import make_learner
from mmtrain.train.step import Learner, accumulate_gradients

LORA = {"mode": "lora", "rank": 4, "alpha": 8.0}
MIXED = {"vision": LORA, "projector": {"mode": "full"}, "language": LORA}
ALL_FULL = {"vision": {"mode": "full"}, "projector": {"mode": "full"}, "language": {"mode": "full"}}


def processor_for(model: Model) -> ChatProcessor:
    """`processor_of(model)`, loaded once as long as no file of the model's directory changes."""
    if model.chat_template is not None or model.image_processor:
        return processor_of(model)
    files = ((file.resolve(), file.stat()) for file in sorted(Path(model.path).iterdir()))
    return _processor(model.path, tuple((path, stat.st_mtime_ns, stat.st_size) for path, stat in files))


@cache
def _processor(path: str, files: tuple[tuple[Path, int, int], ...]) -> ChatProcessor:
    return load_processor(path)


def learner_for(config: Config) -> tuple[Learner, Dataset]:
    processor = processor_for(config.model)
    dataset = Dataset(config, processor, QUIET)
    learner = make_learner(config, processor, Runtime(config.model.dtype, device=config.run.device), QUIET)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in learner.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return learner, dataset


def step_of(
    learner: Learner, dataset: Dataset, cuts: list[list[int]], packing: bool, row_multiple: int = ROW_MULTIPLE
) -> tuple[float, dict[str, Tensor]]:
    """The loss and every gradient of the step made of `cuts`; the step's number is 3."""
    learner.optimizer.zero_grad(set_to_none=True)
    samples = [number for cut in cuts for number in cut]
    count = float(dataset.checked.sum_weights[samples].sum())
    batches = Loader(
        dataset.train, learner.processor, packing, learner.make_inputs.store, row_multiple, learner.load_images
    ).batches(cuts)
    loss, _ = accumulate_gradients(learner, batches, count, step=3)
    named: dict[str, Any] = dict(learner.model.named_parameters())
    return float(loss), {
        n: (p.grad if p.grad is not None else torch.zeros_like(p)).clone() for n, p in named.items() if p.requires_grad
    }


def relative_l2(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference over norm of the expected, over all tensors together."""
    assert found.keys() == expected.keys()
    difference = sum(float((found[name] - value).double().pow(2).sum()) for name, value in expected.items())
    return math.sqrt(difference / sum(float(value.double().pow(2).sum()) for value in expected.values()))


def scores_of(config: Config, data: Sequence[str] = ()) -> Scores:
    """The base model's scores on `data`, or on the config's evaluation sources."""
    evaluation = ModelScoring(config, data)
    with evaluation.model(None) as model:
        return evaluation.scores(model)
