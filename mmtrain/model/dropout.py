"""Dropout that does not depend on how a step is divided into micro-batches.

torch's dropout draws masks from one stream, in the order in which micro-batches run. Here the mask of a sample in a
module is drawn from a generator seeded by (seed, step, sample, module), over the positions of the sample.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from mmtrain.config.schema import Lora, Tune
from mmtrain.dataset.batch import Batch
from mmtrain.model.components import base_name
from mmtrain.model.family import Family


class DropoutContext:
    """The seed, the step and the micro-batch that the masks depend on. Dropout is on only inside `at`."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._step = 0
        self._batch: Batch | None = None

    @contextmanager
    def at(self, step: int, batch: Batch) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch of this step. With activation checkpointing the
        backward pass draws the masks again."""
        self._step, self._batch = step, batch
        try:
            yield
        finally:
            self._batch = None

    @property
    def batch(self) -> Batch | None:
        return self._batch

    def seed(self, sample: int, module: str) -> int:
        key = f"{self._seed} {self._step} {sample} {module}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


class SampleDropout(nn.Module):
    """Inverted dropout of the input of one adapter, with a mask for each sample."""

    def __init__(self, p: float, name: str, component: str, grid_key: str | None, context: DropoutContext) -> None:
        super().__init__()
        self._p, self._name, self._component, self._grid_key, self._context = p, name, component, grid_key, context

    def forward(self, x: Tensor) -> Tensor:
        batch = self._context.batch
        return x if batch is None else x * self._mask(x, batch)

    def _mask(self, x: Tensor, batch: Batch) -> Tensor:
        """The mask for x, whose leading dimensions are text positions, or the images of the batch in order."""
        width = x.shape[-1]
        mask = torch.ones(x.numel() // width, width, dtype=x.dtype, device=x.device)
        generator = torch.Generator(device=x.device)
        for sample, start, stop in self._rows(len(mask), batch):
            generator.manual_seed(self._context.seed(sample, self._name))
            mask[start:stop].bernoulli_(1 - self._p, generator=generator)
        return mask.view_as(x) / (1 - self._p)

    def _rows(self, num_rows: int, batch: Batch) -> list[tuple[int, int, int]]:
        """(sample, first row, last row + 1) of each sample in the input of the module."""
        if self._component == "language":
            length = batch.input_ids.shape[1]
            return [(s.sample, s.row * length + s.start, s.row * length + s.start + s.length) for s in batch.segments]
        sizes = _image_sizes(batch, self._grid_key)
        scale = num_rows / sum(sizes)
        rows, at = [], 0
        for segment in batch.segments:
            own = sum(sizes[segment.first_image : segment.first_image + segment.num_images])
            rows.append((segment.sample, round(at * scale), round((at + own) * scale)))
            at += own
        return rows


def _image_sizes(batch: Batch, grid_key: str | None) -> list[int]:
    """For each image a number proportional to its rows in the vision tower."""
    if grid_key in batch.image_inputs:
        return [int(n) for n in batch.image_inputs[grid_key].prod(-1).tolist()]
    return [1] * sum(segment.num_images for segment in batch.segments)


def install_dropout(model: Any, family: Family, tune: Tune, context: DropoutContext) -> None:
    """Give every adapter of a component with dropout its own `SampleDropout`."""
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        own = base_name(name)
        component = family.components.component_of(own)
        lora = tune.components[component]
        if isinstance(lora, Lora) and lora.dropout > 0:
            for adapter in list(module.lora_dropout):
                module.lora_dropout[adapter] = SampleDropout(lora.dropout, own, component, family.grid_key, context)
            module.training = True  # DoRA skips its dropout in eval mode; only this layer's flag, not the model's
