"""Modules computed in fewer passes over memory than their libraries take; the numbers stay those of the formula.

Each is replaced where its source says, or a trial shows, that it computes exactly that, and left alone elsewhere.
"""

import ast
import functools
import inspect
import re
import textwrap
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from mmtrain.model.kernels.last_layer import compute_at_predicting
from mmtrain.model.kernels.mlp import NormedMLP, Projection
from mmtrain.model.kernels.products import FrozenLinear
from mmtrain.model.kernels.rowwise import GatedSiLU, normalize, rms_norm

_GATED = re.compile(
    r"(?:return|(\w+) =) self\.down_proj\(self\.act_fn\(self\.gate_proj\((\w+)\)\) \* self\.up_proj\(\2\)\)"
    r"(?:\nreturn \1)?"
)
_NORM_THEN_MLP = re.compile(r"(\w+) = self\.post_attention_layernorm\(\1\)\n\1 = self\.mlp\(\1\)")
"""Statements of a decoder layer: what is normalized goes into the MLP and nowhere else."""


def install_fused(model: Any) -> None:
    """Replace what `model` computes in more passes than it needs. To be called once adapters and dropout are in."""
    for module in model.modules():
        if (forward := _quicker(module)) is not None:
            module.forward = types.MethodType(forward, module)
    last = [None, *getattr(model.get_decoder(), "layers", ())][-1]
    layers = [module for module in model.modules() if _ends_in_mlp(module)]
    for layer in layers:
        layer.mlp.norm = (layer.post_attention_layernorm,)  # in a tuple it is no child of a second module
        layer.mlp.rows = None
        layer.mlp.forward = types.MethodType(_normed_mlp, layer.mlp)
        layer.post_attention_layernorm.forward = _passed_on
    if last in layers:
        compute_at_predicting(last)


def _quicker(module: nn.Module) -> Callable[..., Tensor] | None:
    """The forward that can stand for the module's own; None where its own is needed."""
    if isinstance(module, LoraLinear) and _is_plain(module):
        return _adapted
    if _is_frozen(module):
        return _frozen
    if isinstance(module, nn.Conv2d | nn.Conv3d) and _is_one_window(module):
        return _one_window
    if _is_gated(module):
        return _gated
    return _normed if _is_norm(module) else None


def _body(module: nn.Module) -> str:
    return _source(type(module).forward)


@functools.cache
def _source(forward: Any) -> str:
    """Of a forward, as python would print it: no comments, no docstring. Empty where there is none to read."""
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(forward))).body
    except (OSError, TypeError, SyntaxError):  # made at run time, or compiled
        return ""
    if not isinstance(function, ast.FunctionDef):
        return ""
    rows = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return "\n".join(map(ast.unparse, rows))


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


def _frozen(module: Any, x: Tensor) -> Tensor:
    if x.device.type != "cpu" or not x.dtype == module.weight.dtype == torch.float32 or torch.compiler.is_compiling():
        return F.linear(x, module.weight, module.bias)
    rows = x.reshape(-1, x.shape[-1])
    return FrozenLinear.apply(rows, module.weight, module.bias).view(*x.shape[:-1], -1)  # type: ignore[no-untyped-call, no-any-return]


def _is_one_window(module: nn.Conv2d | nn.Conv3d) -> bool:
    """A convolution whose windows lie side by side, as those that take a picture's patches do."""
    is_dense = module.groups == 1 and set(module.dilation) == {1}
    return is_dense and module.kernel_size == module.stride and set(module.padding) == {0}


def _one_window(module: Any, x: Tensor) -> Tensor:
    """Where each picture is one window, (n, channels, *kernel size), this is a linear layer and many times as quick."""
    if x.shape[2:] != module.kernel_size:
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    return F.linear(x.flatten(1), module.weight.flatten(1), module.bias)[(..., *(None for _ in module.kernel_size))]


def _is_gated(module: nn.Module) -> bool:
    return isinstance(getattr(module, "act_fn", None), nn.SiLU | SiLUActivation) and bool(
        _GATED.fullmatch(_body(module))
    )


def _gated(module: Any, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # it makes one pass of them by itself
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    return module.down_proj(GatedSiLU.apply(module.gate_proj(x), module.up_proj(x)))  # type: ignore[no-untyped-call, no-any-return]


def _is_norm(module: nn.Module) -> bool:
    """A normalization that does not learn and is `normalize`: that is tried, with large values and with some so small
    that it matters where the epsilon is added."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or not isinstance(eps, float) or weight.requires_grad:
        return False
    if len(inspect.signature(module.forward).parameters) != 1:  # such as a gate beside x
        return False
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[3], [1], [1e-3], [1e-4]]
    )
    try:
        with torch.no_grad():
            own = type(module).forward(module, x := x.to(weight))
    except Exception:  # it is no normalization, and may raise anything
        return False
    if not isinstance(own, Tensor) or own.dtype != x.dtype or own.shape != x.shape:
        return False
    return torch.allclose(own, normalize(x, weight, eps)[0], rtol=4 * torch.finfo(x.dtype).eps, atol=0)


def _normed(module: Any, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    return rms_norm(x, module.weight, module.variance_epsilon)


def _ends_in_mlp(layer: Any) -> bool:
    """A decoder layer whose end `NormedMLP` computes: nothing in it learns but adapters without dropout."""
    norm, mlp = getattr(layer, "post_attention_layernorm", None), getattr(layer, "mlp", None)
    if norm is None or mlp is None or not (_is_norm(norm) and _is_gated(mlp) and _NORM_THEN_MLP.search(_body(layer))):
        return False
    return all(_is_frozen(projection) for projection in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))


def _is_frozen(module: nn.Module) -> bool:
    if isinstance(module, LoraLinear):
        return _is_plain(module) and all(isinstance(d, nn.Identity) for d in module.lora_dropout.values())
    return type(module) is nn.Linear and not any(p.requires_grad for p in module.parameters())


def _passed_on(x: Tensor) -> Tensor:
    return x


def _normed_mlp(module: Any, x: Tensor) -> Tensor:
    """The MLP of what `norm` makes of x, (..., width)."""
    (norm,) = module.norm
    if torch.compiler.is_compiling():
        return type(module).forward(module, type(norm).forward(norm, x))  # type: ignore[no-any-return]
    projections = [_projection(part) for part in (module.gate_proj, module.up_proj, module.down_proj)]
    tensors = [tensor for projection in projections for tensor in projection.tensors]
    scalings = [projection.scaling for projection in projections]
    tokens = x.flatten(0, -2)
    own = tokens if module.rows is None else tokens[module.rows]
    out = NormedMLP.apply(own, norm.weight, norm.variance_epsilon, scalings, *tensors)  # type: ignore[no-untyped-call]
    if module.rows is not None:
        out = torch.zeros_like(tokens).index_copy(0, module.rows, out)
    return out.view_as(x)  # type: ignore[no-any-return]


def _projection(module: Any) -> Projection:
    if not isinstance(module, LoraLinear):
        return Projection(module.weight, module.bias)
    base, (name,) = module.get_base_layer(), module.active_adapters
    if module.disable_adapters or module.merged:
        return Projection(base.weight, base.bias)
    return Projection(
        base.weight, base.bias, module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]
    )
