"""Normalization by the root mean square, with a frozen weight."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain.model.kernels.compiled import is_compiled
from mmtrain.model.kernels.rowwise import rms_norm
from mmtrain.model.kernels.trial import Kernel, noise

_SIZES = (3.0, 1.0, 1e-3, 1e-4)
"""Scales of the rows of a trial. The smallest show where the epsilon is added; the mean, which is not zero, shows
whether it is subtracted."""

_COMPILED_ROWS = 1024
"""How often they are repeated if the norm is compiled: the compiler chooses its code for the number of rows that it
sees first."""


@dataclass(frozen=True)
class RMSNorm(Kernel):
    """x / rms(x) times a weight."""

    eps: float
    adds_one: bool
    """Whether the weight is 1 + the module's weight."""

    def weight(self, module: Any) -> Tensor:
        """(width,)"""
        weight: Tensor = module.weight
        return weight.float() + 1 if self.adds_one else weight

    def compute(self, module: Any, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight(module), self.eps)

    def example(self, module: Any) -> Tensor:
        sizes = torch.tensor(_SIZES).repeat(_COMPILED_ROWS if is_compiled(module.weight.device) else 2)[:, None]
        return ((noise(len(sizes), len(module.weight)) + 1) * sizes).to(module.weight)


def norm_kernels(module: nn.Module) -> Iterator[RMSNorm]:
    """The kernels to try on `module`: two for each of its numbers that can be the epsilon; none unless it has exactly
    one weight, which is frozen."""
    weights = list(module.parameters())
    if len(weights) != 1 or not isinstance(weight := getattr(module, "weight", None), nn.Parameter):
        return
    if weight.ndim != 1 or weight.requires_grad or len(weight) < 2:
        return
    for eps in {value for value in vars(module).values() if type(value) is float and 0 <= value < 0.1}:
        yield from (RMSNorm(eps, adds_one) for adds_one in (False, True))
