"""Dropout that does not depend on how a step is cut.

torch's own dropout draws from one stream in the order in which micro-batches happen to run. Here the mask of a
sample in a module is drawn from a generator seeded by (seed, step, sample, module), over the sample's own positions.
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


class DropoutClock:
    """What the masks are seeded by. Dropout is on inside `at` alone."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._step = 0
        self._batch: Batch | None = None

    @contextmanager
    def at(self, step: int, batch: Batch) -> Iterator[None]:
        """While a micro-batch of this step is computed, forward and backward: with activation checkpointing the
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
    """Inverted dropout of the input of one adapter, masked sample by sample."""

    def __init__(self, p: float, name: str, part: str, grid_key: str | None, clock: DropoutClock) -> None:
        super().__init__()
        self._p, self._name, self._part, self._grid_key, self._clock = p, name, part, grid_key, clock

    def forward(self, x: Tensor) -> Tensor:
        batch = self._clock.batch
        return x if batch is None else x * self._mask(x, batch)

    def _mask(self, x: Tensor, batch: Batch) -> Tensor:
        """The mask over x, whose leading dimensions run over text positions, or over the batch's pictures in order."""
        width = x.shape[-1]
        mask = torch.ones(x.numel() // width, width, dtype=x.dtype, device=x.device)
        generator = torch.Generator(device=x.device)
        for sample, start, stop in self._rows(len(mask), batch):
            generator.manual_seed(self._clock.seed(sample, self._name))
            mask[start:stop].bernoulli_(1 - self._p, generator=generator)
        return mask.view_as(x) / (1 - self._p)

    def _rows(self, num_rows: int, batch: Batch) -> list[tuple[int, int, int]]:
        """(sample, first row, last row + 1) of each sample among the rows that the module sees."""
        if self._part == "language":
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
    """A number for each image in proportion to the rows it takes in the vision tower."""
    if grid_key in batch.image_inputs:
        return [int(n) for n in batch.image_inputs[grid_key].prod(-1).tolist()]
    return [1] * sum(segment.num_images for segment in batch.segments)


def install_dropout(model: Any, family: Family, tune: Tune, clock: DropoutClock) -> None:
    """Give every adapter of a part with dropout its own `SampleDropout`."""
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        own = base_name(name)
        part = family.components.part_of(own)
        lora = tune.parts[part]
        if isinstance(lora, Lora) and lora.dropout > 0:
            for adapter in list(module.lora_dropout):
                module.lora_dropout[adapter] = SampleDropout(lora.dropout, own, part, family.grid_key, clock)
            module.training = True  # DoRA skips its dropout in eval mode; this layer's flag alone, not the model's
