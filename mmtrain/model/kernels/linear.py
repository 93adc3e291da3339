"""Linear layers, and adapters next to them."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from mmtrain.model.dropout import SampleDropout, mask_of
from mmtrain.model.kernels.masks import DroppedProduct, Mask
from mmtrain.model.kernels.products import ROW_MULTIPLE, WeightProduct
from mmtrain.model.kernels.trial import Kernel, example_for
from mmtrain.model.planned_device import kind_of
from mmtrain.model.quantized_weights import is_quantized


@dataclass(frozen=True)
class AdaptedLinear(Kernel):
    """W x + b + scaling B A dropout(x), as in Hu et al. 2021, "LoRA", section 4.1: added in place, scaled as B is."""

    while_compiling: ClassVar[bool] = True

    def compute(self, module: Any, x: Tensor) -> Tensor:
        (name,) = module.active_adapters
        if module.disable_adapters or module.merged:
            return module.base_layer(x)  # type: ignore[no-any-return]
        rows = x.flatten(0, -2)  # the tensor changed in place must not be a view, or its gradient is copied
        out = module.base_layer(rows)
        inner = _inner(module.lora_A[name], x, rows, mask_of(module.lora_dropout[name], len(rows)))
        outer = (module.lora_B[name].weight * module.scaling[name]).to(out.dtype)
        return out.addmm_(inner.to(out.dtype), outer.t()).view(*x.shape[:-1], -1)  # type: ignore[no-any-return]

    def example(self, module: Any) -> Tensor:
        return example_for(module, 1, ROW_MULTIPLE, module.in_features)


def _inner(down: Any, x: Tensor, rows: Tensor, mask: Mask | None) -> Tensor:
    """(rows, rank) A drop(x); without a mask x itself goes through the layer, which keeps its shape for others."""
    if mask is None:
        return down(x).flatten(0, -2)  # type: ignore[no-any-return]
    return DroppedProduct.apply(rows, down.weight, mask)  # type: ignore[no-untyped-call, no-any-return]


@dataclass(frozen=True)
class FastLinear(Kernel):
    """W x + b by the fastest library."""

    def compute(self, module: Any, x: Tensor) -> Tensor:
        is_float32 = x.dtype == module.weight.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
        if kind_of(x.device) != "cpu" or not is_float32:
            return F.linear(x, module.weight, module.bias)
        rows = x.reshape(-1, x.shape[-1])
        return WeightProduct.apply(rows, module.weight, module.bias).view(*x.shape[:-1], -1)  # type: ignore[no-untyped-call, no-any-return]

    def example(self, module: Any) -> Tensor:
        return example_for(module, 1, ROW_MULTIPLE, module.in_features)


def linear_kernel(module: nn.Module) -> Kernel | None:
    """The kernel to try on `module`; None if it is not a linear layer."""
    if is_adapted_linear(module):
        return AdaptedLinear() if _has_one_adapter(module) else None
    return FastLinear() if type(module) is nn.Linear else None


def is_adapted_linear(module: nn.Module) -> bool:
    """A linear layer with adapters; peft has a class of its own for each kind of quantized weight."""
    return isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear)


def is_frozen(module: nn.Module) -> bool:
    """Whether it is a linear layer with frozen weights, alone or with an adapter."""
    if isinstance(module, LoraLinear):
        return _has_one_adapter(module) and is_frozen(module.get_base_layer())
    return type(module) is nn.Linear and not any(p.requires_grad for p in module.parameters())


def _has_one_adapter(module: Any) -> bool:
    """Whether it is a linear layer with one adapter, which is the product of two matrices and has mmtrain's dropout or
    none."""
    names = module.active_adapters
    base = module.get_base_layer()
    is_product = len(names) == 1 and names[0] not in module.lora_variant and not module.lora_bias[names[0]]
    is_known = all(isinstance(dropout, nn.Identity | SampleDropout) for dropout in module.lora_dropout.values())
    return is_product and is_known and (type(base) is nn.Linear or is_quantized(base))
