"""Matrix products with weights, by the fastest library.

On the CPU torch's `mm` uses oneDNN for bfloat16 but another library for float32, which is 10 % slower on some
processors. So oneDNN is called directly, through the operator that torch's compiler uses for it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.model.planned_device import kind_of

ROW_MULTIPLE = 32
"""A packed row is padded to a multiple of this many tokens: oneDNN compiles and caches a program for each number of
rows, and allocators cache memory of each size."""
_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + b: (rows, out) from x (rows, in), contiguous, and weight (out, in), which can be a transposed view."""
    if not _is_for_onednn(x, weight):
        return F.linear(x, weight, bias)
    out: Tensor = _ONEDNN(x, weight, bias, "none", [], "")
    return out


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes this product. Not for any number of rows, because it caches a program for each. Not for a
    weight with gaps between its rows, which takes it a thousand times as long."""
    is_plain = _ONEDNN is not None and kind_of(x.device) == "cpu" and x.dtype == torch.float32
    is_dense = weight.is_contiguous() or weight.t().is_contiguous()
    return is_plain and is_dense and len(x) > 0 and len(x) % ROW_MULTIPLE == 0


class WeightProduct(torch.autograd.Function):
    """`product` with its gradients. x is only kept where the weight is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x, weight), to_out, needs = ctx.saved_tensors, outer[0].contiguous(), ctx.needs_input_grad
        return (
            product(to_out, weight.t()) if needs[0] else None,
            to_out.t() @ x if needs[1] else None,
            to_out.sum(0) if needs[2] else None,
        )
