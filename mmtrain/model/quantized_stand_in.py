"""Linear layers that take the memory of those quantized by bitsandbytes, for `WithoutValues`: nothing is quantized.

Sizes: Dettmers et al. 2023, "QLoRA", section 3: 4 bits a weight, 8 bits for the scale of 64 weights, and 32 bits for
the scale of 256 of these scales.
"""

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WEIGHTS_A_SCALE, _SCALES_A_SCALE = 64, 256


class QuantizedStandIn(nn.Linear):
    """A layer of which `stand_in` has replaced the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return _Dequantized.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call, no-any-return]


def stand_in(layer: nn.Module) -> None:
    """Make `layer`, a linear one, store its weight in 4 bits."""
    assert isinstance(layer, nn.Linear)
    shape, dtype = layer.weight.shape, layer.weight.dtype
    num_scales = math.ceil(shape.numel() / _WEIGHTS_A_SCALE)
    # made from the weight, so that they have no values either
    stored: Any = nn.Parameter(_like(layer.weight, math.ceil(shape.numel() / 2), torch.uint8), requires_grad=False)
    scales = SimpleNamespace(absmax=_like(layer.weight, math.ceil(num_scales / _SCALES_A_SCALE), torch.float32))
    absmax = _like(layer.weight, num_scales, torch.uint8)
    stored.quant_state = SimpleNamespace(shape=shape, dtype=dtype, absmax=absmax, state2=scales)
    layer.weight = stored
    layer.__class__ = QuantizedStandIn


def _like(weight: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    return weight.detach().new_empty(size, dtype=dtype)


class _Dequantized(torch.autograd.Function):
    """x W' + b; W is made from its 4 bits in each pass, as bitsandbytes does, and is not stored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        own = x.to(weight.quant_state.dtype)
        return F.linear(own, _whole(weight), bias)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        return outer[0] @ _whole(ctx.weight), None, None


def _whole(weight: Any) -> Tensor:
    found: Tensor = weight.new_empty(weight.quant_state.shape, dtype=weight.quant_state.dtype)
    return found
