"""Dropout that does not depend on how a step is divided into micro-batches.

torch's dropout draws from one stream, in the order in which micro-batches run. Here what is dropped follows from the
seed, the step, the sample, the module, and the position in the sample (`kernels/masks.py`).
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn

from mmtrain.config.tune_section import Lora, Tune
from mmtrain.dataset.batch import Batch
from mmtrain.errors import UserError
from mmtrain.model.components import base_name
from mmtrain.model.family import Family
from mmtrain.model.kernels.masks import Mask, MaskedInput, RowOrigins, gpu_kernel

MASKS = "philox4x64-10"
"""What the masks of a run are made by. Another name: a run with dropout cannot resume to the same result."""


class DropoutContext:
    """The seed, the step and the micro-batch that the masks depend on. Dropout is on only inside `at`."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._step = 0
        self._batch: Batch | None = None
        self._rows: dict[tuple[str, int], RowOrigins] = {}

    @contextmanager
    def at(self, step: int, batch: Batch) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch of this step. With activation checkpointing the
        backward pass calls the modules again."""
        self._step, self._batch, self._rows = step, batch, {}
        try:
            yield
        finally:
            self._batch = None

    def mask(self, p: float, module: str, component: str, grid_key: str | None, num_rows: int) -> Mask | None:
        """What a module of `component` drops of its `num_rows` rows; None where dropout is off.

        Raises UserError where the language model's module does not see one row for each token.
        """
        if self._batch is None:
            return None
        num_tokens = self._batch.input_ids.numel()
        if component == "language" and num_rows != num_tokens:
            raise UserError(
                f"tune.language.dropout: {module} gets {num_rows} of {num_tokens} tokens, so what it drops would "
                "depend on the micro-batch; set it to 0"
            )
        if (component, num_rows) not in self._rows:
            self._rows[component, num_rows] = RowOrigins(
                num_rows, tuple(_spans(self._batch, component, grid_key, num_rows))
            )
        key = hashlib.blake2b(f"{self._seed} {module}".encode(), digest_size=8).digest()
        return Mask(p, int.from_bytes(key, "little"), self._step, self._rows[component, num_rows])


class SampleDropout(nn.Module):
    """Inverted dropout of the input of one adapter."""

    def __init__(self, p: float, name: str, component: str, grid_key: str | None, context: DropoutContext) -> None:
        super().__init__()
        self._whose = p, name, component, grid_key
        self._context = context

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        mask = mask_of(self, len(rows))
        if mask is None:
            return x
        return MaskedInput.apply(rows, mask).view(x.shape)  # type: ignore[no-untyped-call, no-any-return]

    def mask(self, num_rows: int) -> Mask | None:
        """What is dropped of an input of `num_rows` rows: the positions of the text, or those of the images' patches or
        features in order. None where dropout is off."""
        return self._context.mask(*self._whose, num_rows)


def mask_of(dropout: nn.Module, num_rows: int) -> Mask | None:
    """The mask of an adapter's `dropout`; None where it drops nothing."""
    return dropout.mask(num_rows) if isinstance(dropout, SampleDropout) else None


def _spans(batch: Batch, component: str, grid_key: str | None, num_rows: int) -> Iterator[tuple[int, int, int]]:
    """(sample, first row, last row + 1) of each sample among the rows that a module sees."""
    if component == "language":
        length = batch.input_ids.shape[1]
        for segment in batch.segments:
            start = segment.row * length + segment.start
            yield segment.sample, start, start + segment.length
        return
    sizes = _image_sizes(batch, grid_key)
    scale, at = num_rows / sum(sizes), 0
    for segment in batch.segments:
        own = sum(sizes[segment.first_image : segment.first_image + segment.num_images])
        yield segment.sample, round(at * scale), round((at + own) * scale)
        at += own


def _image_sizes(batch: Batch, grid_key: str | None) -> list[int]:
    """For each image a number proportional to its rows in the vision tower."""
    if grid_key in batch.image_inputs:
        return [int(n) for n in batch.image_inputs[grid_key].prod(-1).tolist()]
    return [1] * sum(segment.num_images for segment in batch.segments)


def install_dropout(
    model: Any,
    family: Family,
    tune: Tune,
    context: DropoutContext,
    device: torch.device,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Give every adapter of a linear layer of a component with dropout its own `SampleDropout`. The model will be on
    `device`; `say` is given one line where masks cannot be made there."""
    found = False
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or isinstance(module, ParamWrapper):
            continue
        own = base_name(name)
        component = family.components.component_of(own)
        lora = tune.modes[component]
        if isinstance(lora, Lora) and lora.dropout > 0:
            found = True
            for adapter in list(module.lora_dropout):
                module.lora_dropout[adapter] = SampleDropout(lora.dropout, own, component, family.grid_key, context)
            module.training = True  # DoRA skips its dropout in eval mode; only this layer's flag, not the model's
    if found and device.type == "cuda" and gpu_kernel(device) is None:
        say("dropout: its masks are made on the CPU, because the Triton kernel failed its trial on this GPU")
