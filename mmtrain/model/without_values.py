"""Tensors that have a shape, a type and a size in memory, but no values: a model too large for this machine can be
loaded and trained in them, by the same code, to see how much memory that takes.

Weights have no values, and neither has anything that is computed from them: only the shapes of results are found, by
torch's meta kernels. Other tensors, such as token ids, positions and pixels, are computed as always. Where the program
asks for a value that does not exist it is given the one that lets it continue: every comparison is true, and every
number is zero. So trials at the start of a run (kernels, packing, the image cache) pass wherever the shapes agree.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from mmtrain.model.live_memory import LiveMemory
from mmtrain.model.meta_results import META, MetaResults, on_meta, writes_first

_aten: Any = torch.ops.aten
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_}
_has_kernel: Callable[[str, str], bool] = torch._C._dispatch_has_kernel_for_dispatch_key


class NeedsValuesError(RuntimeError):
    """The shape of a result depends on values that do not exist."""


class TensorWithoutValues(Tensor):
    """A tensor of the CPU without values. `shape_only`, on the meta device, stands for its memory."""

    shape_only: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, shape_only: Tensor) -> "TensorWithoutValues":
        made = Tensor._make_wrapper_subclass(
            cls,
            shape_only.shape,
            strides=shape_only.stride(),
            storage_offset=shape_only.storage_offset(),
            dtype=shape_only.dtype,
            device=torch.device("cpu"),
        )
        made.shape_only = shape_only
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NeedsValuesError(f"{func} was called outside of WithoutValues")

    def tolist(self) -> Any:
        """Zeros."""
        return np.zeros(self.shape).tolist()

    def numpy(self, *, force: bool = False) -> npt.NDArray[Any]:
        """Zeros."""
        return np.zeros(self.shape, torch.empty(0, dtype=self.dtype).numpy().dtype)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"TensorWithoutValues({tuple(self.shape)}, {self.dtype})"

    def _set_data(self, value: "TensorWithoutValues") -> None:
        _DATA.__set__(self, value)
        self.shape_only = value.shape_only

    data = property(lambda self: self.detach(), _set_data)


_DATA: Any = torch._C.TensorBase.data


class WithoutValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is active large tensors of floating-point numbers are made without values. `memory` counts all tensors
    that are made or used, those with values too."""

    def __init__(self, memory: LiveMemory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory = memory
        self._results = MetaResults()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        given = _tensors((args, kwargs))
        if any(isinstance(tensor, TensorWithoutValues) for tensor in given):
            return self._shape_only(func, args, kwargs, given[0])
        if not given and _makes_unknown(func, args, kwargs):
            return self._keep(func(*args, **_on_meta(kwargs)))
        out = func(*args, **kwargs)
        for tensor in (*given, *_tensors(out)):
            self.memory.keep(tensor)
        return out

    def as_one_kernel(self, formula: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result of `formula`, counted as a compiled kernel takes memory: only for what it returns."""
        memory, self.memory = self.memory, LiveMemory()
        try:
            out = formula(*args, **kwargs)
        finally:
            self.memory = memory
        for tensor in _tensors(out):
            memory.keep(tensor.shape_only if isinstance(tensor, TensorWithoutValues) else tensor)
        return out

    def _shape_only(self, func: Any, args: Any, kwargs: dict[str, Any], first: Tensor) -> Any:
        """The result of an operator that is given a tensor without values."""
        operator = func.overloadpacket
        if operator is _aten._local_scalar_dense:
            return first.dtype == torch.bool or (0.0 if first.is_floating_point() else 0)
        if operator is _aten.equal:
            return args[0].shape == args[1].shape and args[0].dtype == args[1].dtype
        if operator in _INDEXED:
            args = (args[0], [index for own in args[1] for index in _as_positions(own)], *args[2:])
        own_args, own_kwargs = tree_map_only(Tensor, self._shape_of, (args, kwargs))
        try:
            out = self._results.of(func, own_args, _on_meta(own_kwargs))
        except NotImplementedError as error:  # what torch raises where a shape depends on values
            raise NeedsValuesError(f"{func} of this model depends on the values of its input") from error
        if writes_first(func):
            return args[0]
        if func._schema.is_mutable:
            return return_and_correct_aliasing(func, args, kwargs, out)  # type: ignore[no-untyped-call]
        return self._keep(out)

    def _shape_of(self, value: Tensor) -> Tensor:
        if isinstance(value, TensorWithoutValues):
            return value.shape_only
        self.memory.keep(value)
        return on_meta(value)

    def _keep(self, out: Any) -> Any:
        """The result of a meta kernel, as the program gets it."""

        def made(value: Tensor) -> TensorWithoutValues:
            self.memory.keep(value)
            return TensorWithoutValues(value)

        return tree_map_only(Tensor, made, out)


@functools.cache
def _is_composite(func: Any) -> bool:
    """Whether the operator is made of others, and the CPU has no kernel of its own for it."""
    name = func.name()
    return _has_kernel(name, "CompositeImplicitAutograd") and not _has_kernel(name, "CPU")


def _makes_unknown(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the operator makes a tensor of several floating-point numbers. A single number has a value: optimizers
    count their steps in one."""
    if "device" not in kwargs and "dtype" not in kwargs:
        return False
    out = func(*args, **_on_meta(kwargs))
    return isinstance(out, Tensor) and (out.is_floating_point() or out.is_complex()) and out.numel() > 1


def _on_meta(kwargs: dict[str, Any]) -> dict[str, Any]:
    changes = {"device": META, "generator": None, "pin_memory": None}
    return kwargs | {name: value for name, value in changes.items() if name in kwargs}


def _as_positions(index: Tensor | None) -> list[Tensor | None]:
    """An index with the positions of a mask instead of the mask, whose values must exist."""
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return [index]
    if isinstance(index, TensorWithoutValues):
        raise NeedsValuesError("this model selects by a mask that depends on values")
    return list(index.nonzero().unbind(1))


def _tensors(value: Any) -> list[Tensor]:
    """Every tensor in nested lists and dicts."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
