"""Elementwise and row-wise operations, computed in fewer passes over memory than one operation at a time.

Besides matrix products, a step spends its time in such passes over (tokens, width) tensors. On the CPU a few rows at a
time go through all operations while they are in its cache, in float32, and are rounded once. On CUDA each formula is
compiled into one pass, also in float32. Elsewhere, and if nothing can be compiled, all rows are computed at once, and
the gate in its own type: float32 copies of three (tokens, inner width) tensors take gigabytes.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.model.kernels.compiled import is_compiled, one_pass
from mmtrain.model.planned_device import computed, kind_of

_CACHED_VALUES = 2**17
"""Values in a block on the CPU: a block and its inputs stay in the caches, and there are few enough blocks that calling
an operation for each takes no noticeable time."""


@dataclass(frozen=True, slots=True)
class Activation:
    """A function of one value, and its gradient from the gradient of the result and the value."""

    of: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


_GELU_BACKWARD: Any = torch.ops.aten.gelu_backward
SILU = Activation(F.silu, torch.ops.aten.silu_backward)
"""g sigmoid(g). With s = sigmoid(g) its derivative is s (1 + g (1 - s))."""
GELU = Activation(F.gelu, _GELU_BACKWARD)
"""g times the normal cumulative distribution at g (Hendrycks and Gimpel 2016, "Gaussian error linear units")."""
GELU_TANH = Activation(
    functools.partial(F.gelu, approximate="tanh"), functools.partial(_GELU_BACKWARD, approximate="tanh")
)
"""The same paper's approximation by tanh."""
QUICK_GELU = Activation(
    lambda x: F.silu(1.702 * x).div_(1.702), lambda outer, x: torch.ops.aten.silu_backward(outer, 1.702 * x)
)
"""x sigmoid(1.702 x), the same paper's other approximation."""


@one_pass
def normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) times weight (Zhang and Sennrich 2019, "Root mean square layer normalization", equation 4), and
    1 / rms(x), float32: (..., width) and (rows, 1)."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    inverse = x.new_empty(x.numel() // x.shape[-1], 1, dtype=torch.float32)
    for value, o, r in _blocks(x, out, inverse):
        value = value.float()
        torch.rsqrt(value.square().mean(-1, keepdim=True).add_(eps), out=r)
        o.copy_((value * r).mul_(weight))
    return out, inverse


@one_pass
def normalized(x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """The first result of `normalize`, computed again from its second."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for value, o, r in _blocks(x, out, inverse):
        o.copy_((value.float() * r).mul_(weight))
    return out


@one_pass
def normalize_gradient(outer: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of x: r w y - x r³ mean(w y x), with r = 1 / rms(x) and y the gradient of the result."""
    gradient = torch.empty_like(outer, memory_format=torch.contiguous_format)
    for y, value, r, to in _blocks(outer, x, inverse, gradient):
        scaled, value = y.float() * weight, value.float()
        along = (scaled * value).mean(-1, keepdim=True).mul_(r * r * r)
        to.copy_(scaled.mul_(r).addcmul_(value, along, value=-1))
    return gradient


@one_pass
def gate_up(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """activation(gate) * up, for two tensors of the same shape."""
    out = torch.empty_like(up, memory_format=torch.contiguous_format)
    for g, u, o in _blocks(gate, up, out):
        torch.mul(activation.of(_widened(g)), u, out=o)
    return out


@one_pass
def gate_up_gradients(
    gate: Tensor, up: Tensor, outer: Tensor, activation: Activation, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up. With `out`, the result of `gate_up` is written there again."""
    to = [torch.empty_like(outer, memory_format=torch.contiguous_format) for _ in range(2)]
    results = to if out is None else [*to, out]
    for g, u, y, to_gate, to_up, *again in _blocks(gate, up, outer, *results):
        value, own, upper = _widened(g), _widened(u), _widened(y)
        activated = activation.of(value)
        torch.mul(activated, upper, out=to_up)
        for o in again:
            torch.mul(activated, own, out=o)
        to_gate.copy_(activation.gradient(own * upper, value))
    return to[0], to[1]


@one_pass
def activate(x: Tensor, activation: Activation) -> Tensor:
    """activation(x)"""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for value, o in _blocks(x, out):
        o.copy_(activation.of(_widened(value)))
    return out


@one_pass
def activate_gradient(outer: Tensor, x: Tensor, activation: Activation) -> Tensor:
    """The gradient of x from that of `activate`."""
    to = torch.empty_like(outer, memory_format=torch.contiguous_format)
    for y, value, o in _blocks(outer, x, to):
        o.copy_(activation.gradient(_widened(y), _widened(value)))
    return to


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`normalize` with a frozen weight. Where it is neither cached nor compiled torch has a kernel for it."""
    if _is_cached(x) or is_compiled(x.device):
        return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call, no-any-return]
    wide = torch.promote_types(x.dtype, weight.dtype)  # the kernel takes one type
    with torch.autocast(x.device.type, enabled=False):  # it would keep a float32 copy of x
        return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, inverse = normalize(_rows(x), weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        return normalize_gradient(_rows(outer[0]), _rows(x), weight, inverse).view(x.shape), None, None


class GatedActivation(torch.autograd.Function):
    """`gate_up`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return gate_up(_rows(gate), _rows(up), activation).view(up.shape)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        to_gate, to_up = gate_up_gradients(_rows(gate), _rows(up), _rows(outer[0]), ctx.activation)
        return to_gate.view(gate.shape), to_up.view(up.shape), None


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of the tensors, in blocks that fit into the CPU's cache; all at once elsewhere."""
    width = tensors[0].shape[-1]
    rows = tuple(map(_rows, tensors))
    if not _is_cached(tensors[0]):
        return iter([rows])
    size = max(1, _CACHED_VALUES // width)
    return iter(computed(zip(*(torch.split(tensor, size) for tensor in rows), strict=True)))


def _rows(tensor: Tensor) -> Tensor:
    """(rows, width)"""
    return tensor.reshape(-1, tensor.shape[-1])


def _widened(value: Tensor) -> Tensor:
    wide = torch.promote_types(value.dtype, torch.float32)
    return value.to(wide) if _is_cached(value) or torch.compiler.is_compiling() else value


def _is_cached(value: Tensor) -> bool:
    """Whether it is computed in blocks that fit into a cache."""
    return kind_of(value.device) == "cpu" and not torch.compiler.is_compiling()
