"""A gated MLP with the normalization before it and its adapters, as one function.

It saves for the backward pass only what is expensive to compute again: the input, gate and up. The normalized input and
the product of gate and up are computed again. Adapters that share an input are multiplied together. Formulas: Shazeer
2020, "GLU variants improve transformer", section 2 (SwiGLU); Hu et al. 2021, "LoRA", section 4.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmtrain.model.kernels.masks import Mask
from mmtrain.model.kernels.products import product
from mmtrain.model.kernels.rowwise import (
    Activation,
    gate_up,
    gate_up_gradients,
    normalize,
    normalize_gradient,
    normalized,
)


@dataclass(frozen=True, slots=True)
class Projection:
    """W x + b + s B A drop(x): a frozen linear layer and the adapter next to it, if there is one."""

    weight: Tensor
    """(out, in)"""
    bias: Tensor | None
    a: Tensor | None = None
    """(rank, in), always float32, the type in which it is trained."""
    b: Tensor | None = None
    """(out, rank)"""
    scaling: float = 1.0
    mask: Mask | None = None
    """What is dropped of the adapter's input."""

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias, self.a, self.b

    @property
    def down(self) -> Tensor:
        """(rank, in) A, in the weight's type. Without an adapter the rank is 0."""
        return self.weight[:0] if self.a is None else self.a.to(self.weight.dtype)

    @property
    def up(self) -> Tensor:
        """(out, rank) s B, in the weight's type."""
        return self.weight[:, :0] if self.b is None else (self.b * self.scaling).to(self.weight.dtype)

    def of(self, x: Tensor, inner: Tensor) -> Tensor:
        """(rows, out) from x (rows, in) and A drop(x), `inner` (rows, rank)."""
        return product(x, self.weight, self.bias).addmm_(inner, self.up.t())

    def gradients(self, outer: Tensor, inner: Tensor, to_inner: Tensor, x: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of `tensors`, from those of the result (`outer`) and of `inner`."""
        if self.a is None:
            return None, None, None, None
        to_b = torch.mm(outer.t(), inner).float() * self.scaling
        (dropped,) = (x,) if self.mask is None else self.mask.drop(x)
        return None, None, torch.mm(to_inner.t(), dropped).float(), to_b


@dataclass(frozen=True, slots=True)
class Gate:
    """How gate and up come from the projections of the input: from one each, or as halves of one."""

    activation: Activation
    up_first: bool = False
    """Whether up comes before the gate."""

    def split(self, projected: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Gate and up, (..., inner width), from the results of one or two projections."""
        first, second = projected if len(projected) == 2 else projected[0].chunk(2, dim=-1)
        return (second, first) if self.up_first else (first, second)

    def join(self, gate: Tensor, up: Tensor, num_projections: int) -> list[Tensor]:
        """The inverse of `split`."""
        pair = [up, gate] if self.up_first else [gate, up]
        return pair if num_projections == 2 else [torch.cat(pair, dim=-1)]


class NormedMLP(torch.autograd.Function):
    """down(activation(gate(n)) * up(n)) of x (rows, width), with n = x / rms(x) times a weight, or x itself."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        eps: float,
        gate: Gate,
        adapters: Sequence[tuple[float, Mask | None]],
        *tensors: Tensor | None,
    ) -> Tensor:
        """`tensors`: those of the projections of n and of down, one after the other; `adapters`: scaling and mask, one
        pair per projection."""
        *inputs, down = _projections(tensors, adapters)
        normed, inverse = (x.contiguous(), None) if norm_weight is None else normalize(x, norm_weight, eps)
        inner = _inner(normed, inputs)
        inners = torch.split(inner, [len(projection.down) for projection in inputs], dim=1)
        projected = [projection.of(normed, own) for projection, own in zip(inputs, inners, strict=True)]
        gates, ups = gate.split(projected)
        gated = gate_up(gates, ups, gate.activation)
        inner_down = _inner(gated, [down])
        ctx.save_for_backward(x, norm_weight, inverse, gates, ups, inner, inner_down, *tensors)
        ctx.gate, ctx.adapters = gate, adapters
        return down.of(gated, inner_down)

    @staticmethod
    def backward(ctx: Any, *outers: Tensor) -> tuple[Any, ...]:
        x, norm_weight, inverse, gates, ups, inner, inner_down, *tensors = ctx.saved_tensors
        *inputs, down = _projections(tensors, ctx.adapters)
        outer = outers[0].contiguous()
        to_inner_down = product(outer, down.up.t())
        to_gated = _add_gradient(product(outer, down.weight.t()), to_inner_down, [down])
        gated = torch.empty_like(ups, memory_format=torch.contiguous_format)
        to_pair = gate_up_gradients(gates, ups, to_gated, ctx.gate.activation, gated)
        of_down = down.gradients(outer, inner_down, to_inner_down, gated)

        to_projected = ctx.gate.join(*to_pair, len(inputs))
        to_inner = torch.cat(
            [product(to, projection.up.t()) for to, projection in zip(to_projected, inputs, strict=True)], dim=1
        )
        normed = x if norm_weight is None else normalized(x, norm_weight, inverse)
        inners, to_inners = (
            torch.split(tensor, [len(projection.down) for projection in inputs], dim=1) for tensor in (inner, to_inner)
        )
        of_inputs = [
            gradient
            for projection, to, own, to_own in zip(inputs, to_projected, inners, to_inners, strict=True)
            for gradient in projection.gradients(to, own, to_own, normed)
        ]
        to_normed = product(to_projected[0], inputs[0].weight.t())
        for to, projection in zip(to_projected[1:], inputs[1:], strict=True):
            to_normed.add_(product(to, projection.weight.t()))
        _add_gradient(to_normed, to_inner, inputs)
        to_x = to_normed if norm_weight is None else normalize_gradient(to_normed, x, norm_weight, inverse)
        return to_x, None, None, None, None, *of_inputs, *of_down


def _projections(tensors: Sequence[Tensor | None], adapters: Sequence[tuple[float, Mask | None]]) -> list[Projection]:
    """The projections from their tensors. Autograd needs the tensors as separate arguments."""
    return [Projection(*tensors[4 * i : 4 * i + 4], *adapter) for i, adapter in enumerate(adapters)]  # type: ignore


def _inner(x: Tensor, projections: Sequence[Projection]) -> Tensor:
    """(rows, sum of ranks) A drop(x) of projections of one x; at once where nothing is dropped."""
    if all(projection.mask is None for projection in projections):
        return product(x, _downs(projections))
    each = [x if own.mask is None else own.mask.drop(x)[0] for own in projections]
    return torch.cat([product(dropped, own.down) for dropped, own in zip(each, projections, strict=True)], dim=1)


def _add_gradient(to_x: Tensor, to_inner: Tensor, projections: Sequence[Projection]) -> Tensor:
    """Add to the gradient of x that of `_inner`, in place."""
    if all(projection.mask is None for projection in projections):
        return to_x.addmm_(to_inner, _downs(projections))
    for own, to_own in zip(projections, torch.split(to_inner, [len(p.down) for p in projections], dim=1), strict=True):
        to_dropped = to_own @ own.down
        to_x.add_(to_dropped if own.mask is None else own.mask.drop(to_dropped)[0])
    return to_x


def _downs(projections: Sequence[Projection]) -> Tensor:
    """(sum of ranks, in) the A of projections that share an input."""
    return torch.cat([projection.down for projection in projections])
