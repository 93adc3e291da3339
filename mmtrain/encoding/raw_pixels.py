"""Pixels of 8 bits instead of the processor's floats: a quarter of the bytes, normalized where the model is.

Most families rescale and normalize an image as the last thing they do with its values. A trial finds out whether this
one does, and how its tensors are laid out.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from mmtrain.encoding.processor import ChatProcessor
from mmtrain.records.chat import SampleError
from mmtrain.safe_text import one_line

_SIZES = ((196, 140), (84, 168), (56, 56))
"""(width, height) of the images of the trial."""
_TOLERANCE = 2e-6
"""Largest difference between values of the two ways. Values are below 4, where a float32 has steps of 2e-7."""


@dataclass(frozen=True, slots=True)
class Normalization:
    """What a family's processor does with pixels of 8 bits: value × scale, less the mean, over the standard deviation.

    The last two are of the shape that the processor's pixels have from the right: one value for each colour."""

    scale: float
    mean: Tensor
    std: Tensor

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels of 8 bits as float32, as the processor gives them; on the device of mean and standard deviation."""
        return pixels.float().mul_(self.scale).sub_(self.mean).div_(self.std)

    def to(self, device: torch.device) -> "Normalization":
        return Normalization(self.scale, self.mean.to(device), self.std.to(device))


def find_normalization(processor: ChatProcessor) -> Normalization | str:
    """The normalization of a model's image processor, or why only the image processor can normalize its pixels."""
    if processor.images is None:
        return "this model takes no images"
    noise = np.random.default_rng(0)
    each = [[PIL.Image.fromarray(noise.integers(0, 256, (h, w, 3), np.uint8))] for w, h in _SIZES]
    trials = [[sample] for sample in each] + ([each] if processor.lays_out_together else [])
    try:
        pairs = [pair for samples in trials for pair in _both(processor, samples)]
        for found in _candidates(processor.images.processor.image_processor, pairs[0][1]):
            if all(_fits(found, raw, expected) for raw, expected in pairs):
                return found
    except Exception as error:  # a family that is not supported can raise anything
        return one_line(error)
    return "it does more with an image than to normalize its colours last"


def _both(processor: ChatProcessor, samples: list[list[PIL.Image.Image]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The pixels of 8 bits and those of the processor, by tensor."""
    raw, ids = processor.image_inputs(samples, raw=True)
    expected, other_ids = processor.image_inputs(samples)
    if ids != other_ids or raw.keys() != expected.keys():
        raise SampleError("it lays out other tokens or tensors without normalization")
    pairs = [(raw[name], expected[name]) for name in expected if raw[name].dtype == torch.uint8]
    if not pairs:
        raise SampleError("its pixels are not of 8 bits")
    if any(not _equal(raw[name], expected[name]) for name in expected if raw[name].dtype != torch.uint8):
        raise SampleError("tensors besides its pixels depend on the normalization")
    yield from pairs


def _equal(own: Any, other: Any) -> bool:
    return torch.equal(own, other) if isinstance(own, Tensor) else bool(own == other)


def _candidates(own: Any, pixels: Tensor) -> Iterator[Normalization]:
    """The layouts that colours may have in a tensor: on an axis of their own, or one after another in the last one."""
    scale = float(own.rescale_factor) if own.do_rescale else 1.0
    mean, std = (own.image_mean, own.image_std) if own.do_normalize else (0.0, 1.0)
    colours = [torch.tensor(value, dtype=torch.float32).expand(3) for value in (mean, std)]
    lays: list[tuple[Tensor, ...]] = []
    if pixels.ndim > 3 and pixels.shape[-3] == 3:
        lays.append(tuple(value[:, None, None] for value in colours))
    if pixels.shape[-1] % 3 == 0:
        count = pixels.shape[-1] // 3
        lays += [tuple(value.repeat_interleave(count) for value in colours)]
        lays += [tuple(value.repeat(count) for value in colours)]
    yield from itertools.starmap(Normalization, ((scale, *lay) for lay in lays))


def _fits(found: Normalization, raw: Tensor, expected: Tensor) -> bool:
    return raw.shape == expected.shape and bool((found(raw) - expected).abs().max() <= _TOLERANCE)
