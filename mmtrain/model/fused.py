"""Layers computed in fewer passes over memory than their libraries take; the numbers stay those of the formula.

Beside the matrix products a step's time goes into elementwise passes over (tokens, width) tensors. Two places make
most of them: an adapter that scales its output, adds it to the base layer's and does both again backward; and gated
MLPs. Both are replaced where a module computes exactly that and nothing else, and left alone elsewhere.
"""

import inspect
import re
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers.activations import SiLUActivation

_CACHED_VALUES = 2**16
"""Values that a few passes in a row go over on the CPU: with their inputs they stay in its second-level cache."""
_GATED = re.compile(
    r"def forward\(self, (\w+)[^)]*\)[^:]*:\s+(?:return|(\w+) =) "
    r"self\.down_proj\(self\.act_fn\(self\.gate_proj\(\1\)\) \* self\.up_proj\(\1\)\)\s+(?:return \2)?\s*"
)
"""The whole source of a gated MLP's forward."""


def install_fused(model: Any) -> None:
    """Replace what `model` computes in more passes than it needs. To be called once adapters and dropout are in."""
    for module in model.modules():
        if isinstance(module, LoraLinear) and _is_plain(module):
            module.forward = types.MethodType(_adapted, module)
        elif _is_gated(module):
            module.forward = types.MethodType(_gated, module)


def _is_plain(module: LoraLinear) -> bool:
    """One adapter that is the product of two matrices, beside a linear layer."""
    (name, *others) = module.active_adapters
    base = module.get_base_layer()
    return not others and name not in module.lora_variant and type(base) is nn.Linear and not module.lora_bias[name]


def _adapted(module: Any, x: Tensor) -> Tensor:
    """W x + b + scaling B A dropout(x), as in Hu et al. 2021, "LoRA", section 4.1: added in place, scaled as B is."""
    (name,) = module.active_adapters
    if module.disable_adapters or module.merged:
        return module.base_layer(x)  # type: ignore[no-any-return]
    rows = x.flatten(0, -2)  # what is added to in place must be no view, or its gradient is copied
    out = module.base_layer(rows)
    inner = module.lora_A[name](module.lora_dropout[name](x)).flatten(0, -2)
    outer = (module.lora_B[name].weight * module.scaling[name]).to(out.dtype)
    return out.addmm_(inner.to(out.dtype), outer.t()).view(*x.shape[:-1], -1)  # type: ignore[no-any-return]


def _is_gated(module: nn.Module) -> bool:
    if not isinstance(getattr(module, "act_fn", None), nn.SiLU | SiLUActivation):
        return False
    return _GATED.fullmatch(inspect.getsource(type(module).forward).strip()) is not None


def _gated(module: Any, x: Tensor) -> Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    if torch.compiler.is_compiling():  # it makes one pass of them by itself
        return module.down_proj(F.silu(gate) * up)  # type: ignore[no-any-return]
    return module.down_proj(GatedSiLU.apply(gate, up))  # type: ignore[no-untyped-call, no-any-return]


class GatedSiLU(torch.autograd.Function):
    """silu(gate) * up, with silu(g) = g sigmoid(g), of two tensors of one shape; taken in float32, rounded once."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(up, memory_format=torch.contiguous_format)
        for g, u, o in _blocks(gate, up, out):
            torch.mul(F.silu(g.float()), u, out=o)
        return out

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor]:
        """d silu(g) / dg = s (1 + g (1 - s)) with s = sigmoid(g)."""
        gate, up = ctx.saved_tensors
        gate_gradient, up_gradient = torch.empty_like(outer[0]), torch.empty_like(outer[0])
        for g, u, y, to_gate, to_up in _blocks(gate, up, outer[0], gate_gradient, up_gradient):
            value = g.float()
            sigmoid = value.sigmoid()
            silu = value * sigmoid
            torch.mul(silu, y, out=to_up)
            slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)
            torch.mul(slope.mul_(y), u, out=to_gate)
        return gate_gradient, up_gradient


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of tensors of one shape, few enough at a time for the CPU's cache; all at once elsewhere."""
    width = tensors[0].shape[-1]
    rows = [tensor.view(-1, width) for tensor in tensors]
    size = max(1, _CACHED_VALUES // width) if tensors[0].device.type == "cpu" else max(1, len(rows[0]))
    return zip(*(torch.split(tensor, size) for tensor in rows), strict=True)
