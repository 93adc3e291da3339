"""Rotary position embeddings in one pass: the functions that attention modules call for them, compiled.

Modules of transformers call a function of their file on queries and keys. Here such a module keeps its own forward, but
finds the compiled function under that name. Formula: Su et al. 2021, "RoFormer", section 3.2.2.
"""

import functools
import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain.model.kernels.compiled import compiled, is_compiled
from mmtrain.model.kernels.trial import Kernel, Trials, first_calls

_NAME = re.compile(r"apply_.*rot.*")


@dataclass(frozen=True)
class CompiledRotary(Kernel):
    """The module's own forward, with the functions of these names compiled."""

    names: tuple[str, ...]

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.plain(module, *args, **kwargs)
        return _forward(type(module).forward, self.names)(module, *args, **kwargs)


def compile_rotary(decoder: Any, trials: Trials) -> None:
    """Compile the rotary embedding of each attention module of `decoder` that passes a trial, on devices where formulas
    are compiled."""
    if not is_compiled(next(decoder.parameters()).device):
        return
    kernels = {name: kernel for name, module in decoder.named_modules() if (kernel := rotary_kernel(module))}
    try:
        calls = first_calls(decoder, kernels)
    except Exception:  # the decoder requires more than ids
        return
    for name, call in calls.items():
        trials.install(decoder.get_submodule(name), {"": kernels[name]}, *call)


def rotary_kernel(module: nn.Module) -> CompiledRotary | None:
    """The kernel to try on `module`; None if its forward calls no function that rotates queries and keys."""
    forward = type(module).forward
    if not isinstance(forward, types.FunctionType):
        return None
    known = forward.__globals__
    called = (name for name in forward.__code__.co_names if _NAME.fullmatch(name))
    names = tuple(name for name in called if isinstance(known.get(name), types.FunctionType))
    return CompiledRotary(names) if names else None


@functools.cache
def _forward(forward: types.FunctionType, names: tuple[str, ...]) -> Callable[..., Any]:
    """A copy of `forward` that finds compiled functions under these names. Other modules of the file do not change."""
    known = forward.__globals__ | {name: _compiled(forward.__globals__[name]) for name in names}
    copy = types.FunctionType(forward.__code__, known, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of queries, keys, cos and sin (..., tokens, width), compiled for any batch and length."""
    fast = compiled(function)

    def call(query: Tensor, key: Tensor, cos: Tensor, *others: Any, **options: Any) -> Any:
        for tensor in (query, key):
            heads = -3 if tensor.shape[-2] == cos.shape[-2] else -2
            for dim in (tensor.ndim + heads, tensor.ndim - 1):  # divisions by a known number of heads are faster
                torch._dynamo.mark_static(tensor, dim)
        return fast(query, key, cos, *others, **options)

    return call
