"""A gated MLP with the normalization before it and the adapters in it, as one function.

Behind it stays what the backward pass cannot make again cheaply: its input, the gate and what is gated. Neither the
normalized input nor the product is kept, and adapters with one input are multiplied at once. Formulas: Shazeer 2020,
"GLU variants improve transformer", section 2 (SwiGLU); Hu et al. 2021, "LoRA", section 4.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmtrain.model.kernels.products import product
from mmtrain.model.kernels.rowwise import gate_up, gate_up_gradients, normalize, normalize_gradient, normalized


@dataclass(frozen=True, slots=True)
class Projection:
    """W x + b + s B A x: a linear layer that does not learn and the adapter beside it, if there is one."""

    weight: Tensor
    """(out, in)"""
    bias: Tensor | None
    a: Tensor | None = None
    """(rank, in), as it learns: float32, whatever the weight is."""
    b: Tensor | None = None
    """(out, rank)"""
    scaling: float = 1.0

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias, self.a, self.b

    @property
    def down(self) -> Tensor:
        """(rank, in) A, in the weight's type; without an adapter the rank is 0."""
        return self.weight[:0] if self.a is None else self.a.to(self.weight.dtype)

    @property
    def up(self) -> Tensor:
        """(out, rank) s B, in the weight's type."""
        return self.weight[:, :0] if self.b is None else (self.b * self.scaling).to(self.weight.dtype)

    def of(self, x: Tensor, inner: Tensor) -> Tensor:
        """(rows, out) from x (rows, in) and A x, `inner` (rows, rank)."""
        return product(x, self.weight, self.bias).addmm_(inner, self.up.t())

    def gradients(self, outer: Tensor, inner: Tensor, to_inner: Tensor, x: Tensor) -> tuple[Tensor | None, ...]:
        """Of `tensors`, from the gradients of the result and of `inner`."""
        if self.a is None:
            return None, None, None, None
        to_b = torch.mm(outer.t(), inner).float() * self.scaling
        return None, None, torch.mm(to_inner.t(), x).float(), to_b


class NormedMLP(torch.autograd.Function):
    """down(silu(gate(n)) * up(n)) with n = x / rms(x) times a weight, of x (rows, width)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor, eps: float, scalings: Sequence[float], *tensors: Tensor | None
    ) -> Tensor:
        """`tensors`: those of the projections gate, up and down, one after the other; `scalings`: theirs."""
        gate, up, down = _projections(tensors, scalings)
        normed, inverse = normalize(x, norm_weight, eps)
        inner = product(normed, _downs(gate, up))
        inner_gate, inner_up = torch.split(inner, [len(gate.down), len(up.down)], dim=1)
        gates, ups = gate.of(normed, inner_gate), up.of(normed, inner_up)
        gated = gate_up(gates, ups)
        inner_down = product(gated, down.down)
        ctx.save_for_backward(x, norm_weight, inverse, gates, ups, inner, inner_down, *tensors)
        ctx.scalings = scalings
        return down.of(gated, inner_down)

    @staticmethod
    def backward(ctx: Any, *outers: Tensor) -> tuple[Any, ...]:
        x, norm_weight, inverse, gates, ups, inner, inner_down, *tensors = ctx.saved_tensors
        gate, up, down = _projections(tensors, ctx.scalings)
        outer = outers[0].contiguous()
        to_inner_down = product(outer, down.up.t())
        to_gated = product(outer, down.weight.t()).addmm_(to_inner_down, down.down)
        gated = torch.empty_like(ups)
        to_gates, to_ups = gate_up_gradients(gates, ups, to_gated, gated)
        of_down = down.gradients(outer, inner_down, to_inner_down, gated)

        ranks = [len(gate.down), len(up.down)]
        to_inner = torch.cat([product(to_gates, gate.up.t()), product(to_ups, up.up.t())], dim=1)
        normed = normalized(x, norm_weight, inverse)
        parts = zip(torch.split(inner, ranks, dim=1), torch.split(to_inner, ranks, dim=1), strict=True)
        of_gate, of_up = (
            projection.gradients(to, *part, normed)
            for projection, to, part in zip((gate, up), (to_gates, to_ups), parts, strict=True)
        )
        to_normed = product(to_gates, gate.weight.t()).add_(product(to_ups, up.weight.t()))
        to_normed.addmm_(to_inner, _downs(gate, up))
        return normalize_gradient(to_normed, x, norm_weight, inverse), None, None, None, *of_gate, *of_up, *of_down


def _projections(tensors: Sequence[Tensor | None], scalings: Sequence[float]) -> list[Projection]:
    """Back from their tensors, which autograd must see one by one."""
    return [Projection(*tensors[4 * i : 4 * i + 4], scaling) for i, scaling in enumerate(scalings)]  # type: ignore


def _downs(*projections: Projection) -> Tensor:
    """(sum of ranks, in) the A of projections with one input."""
    return torch.cat([projection.down for projection in projections])
