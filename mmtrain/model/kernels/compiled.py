"""Formulas compiled into one pass over memory on CUDA, where they would otherwise run one operation at a time.

A formula is compiled when it is first called, by torch.compile, and the number of rows stays open, because every
micro-batch has another. It is computed in float32 and rounded once. Whether anything can be compiled on this machine
(it takes Triton and a C compiler) is tried once.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from mmtrain.model.planned_device import planned_kernels
from mmtrain.safe_text import error_line

_VARIANTS = 64
"""Most variants of a formula: one for each combination of widths, dtypes and layouts that a model has."""
P = ParamSpec("P")
R = TypeVar("R")


def one_pass(formula: Callable[P, R]) -> Callable[P, R]:
    """`formula`, which takes a tensor first and computes no gradients, compiled where `is_compiled` says so."""

    @functools.wraps(formula)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        if torch.compiler.is_compiling() or not is_compiled(device):
            return formula(*args, **kwargs)
        fast: Callable[..., R] = compiled(formula)
        return fast(*map(_as_input, args), **kwargs)

    return call


def is_compiled(device: torch.device) -> bool:
    """Whether formulas are compiled for this device."""
    return planned_kernels() is not None or (gains_by_compiling(device) and compile_fault(device) is None)


def gains_by_compiling(device: torch.device) -> bool:
    """Not the CPU: there the formulas run in blocks that fit into its cache."""
    return device.type == "cuda"


def description(device: torch.device) -> str:
    """Whether formulas are compiled for this device, in a few words; empty if they are not meant to be."""
    if not gains_by_compiling(device):
        return ""
    fault = compile_fault(device)
    return "compiled" if fault is None else f"not compiled, which is slower: {fault}"


@functools.cache
def compile_fault(device: torch.device) -> str | None:
    """Why nothing can be compiled for this device, in one line. None if a small formula gives the right values."""
    x = torch.linspace(-2, 3, 96, device=device).view(6, 16)
    try:
        found, expected = compiled(_small_formula)(x), _small_formula(x)
        return None if torch.allclose(found, expected, rtol=1e-5, atol=1e-6) else "compiled code gives wrong values"
    except Exception as error:  # no Triton, no C compiler, or anything that they raise
        return error_line(error)


def _small_formula(x: Tensor) -> Tensor:
    return x.sigmoid() * x.square().mean(-1, keepdim=True).rsqrt()


def compiled(formula: Callable[..., R]) -> Callable[..., R]:
    """`formula`, compiled for any number of rows. torch.compile does the work when it is first called."""

    def call(*args: Any, **kwargs: Any) -> R:
        plan = planned_kernels()
        if plan is not None:
            return cast(R, plan.as_one_kernel(formula, *args, **kwargs))
        return cast(R, _compiled(formula)(*args, **kwargs))

    return call


@functools.cache
def _compiled(formula: Callable[..., R]) -> Callable[..., R]:
    """Its kernels are chosen without measuring, or a sum could be computed in another order in the next run."""
    from torch._dynamo import config as dynamo  # takes a second to import
    from torch._inductor import config as inductor

    dynamo.recompile_limit = max(dynamo.recompile_limit, _VARIANTS)
    dynamo.specialize_float = True  # an epsilon is a number of the code, not an argument in host memory
    wanted: dict[str, Any] = {"deterministic": True, "split_reductions": False}
    options = {key: value for key, value in wanted.items() if hasattr(inductor, key)}
    return torch.compile(formula, dynamic=True, fullgraph=True, options=options)


def _as_input(value: object) -> object:
    """A tensor without its class, its history and what it is a view of: compiled code would distinguish them. The
    length of a vector, the width of the rows, is compiled in, because sums of a known length are faster."""
    if not isinstance(value, Tensor):
        return value
    plain = value.detach()
    if plain.ndim == 1:
        torch._dynamo.mark_static(plain, 0)
    return plain
