"""What a computation asks of a device: kernels, floating-point operations, memory, and what makes the host wait.

Counted where torch calls its operators, below autograd, so the backward pass is counted too. The device may be fake.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mmtrain.model.live_memory import LiveMemory
from support.nested import leaves

_aten: Any = torch.ops.aten
_ANSWERS = {
    _aten._local_scalar_dense,
    _aten.equal,
    _aten.nonzero,
    _aten.masked_select,
    _aten._unique2,
    _aten.unique_dim,
    _aten.unique_consecutive,
    _aten.unique_dim_consecutive,
}
"""Operators whose result, or its size, the host has to know before it continues."""
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_}
"""Operators that take tensors of indices: from the CPU they are copied, masks are counted."""
_COPIES = {_aten._to_copy, _aten.copy_}
_WITHOUT_A_KERNEL = {
    _aten.detach,
    _aten.alias,
    _aten.empty,
    _aten.empty_like,
    _aten.empty_strided,
    _aten.new_empty,
    _aten.new_empty_strided,
    _aten.lift_fresh,
    _aten.set_,
    _aten._unsafe_view,
    _aten._reshape_alias,
    _aten._local_scalar_dense,
    _aten._fused_sdp_choice,
}
_BLOCK = 512
"""Bytes that CUDA's allocator rounds up to."""


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is computed on devices of `kind` while it is active, in all threads of a backward pass.

    `hidden`: parts of the names of files whose lines are not given, but the lines that called them.
    """

    def __init__(self, kind: str = "cuda", hidden: tuple[str, ...] = ("/torch/",)) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kind, self._hidden = kind, (*hidden, __file__)
        self._memory = LiveMemory(_BLOCK)
        self.reset()

    def reset(self) -> None:
        """Count from zero; what is alive stays counted."""
        self.kernels: Counter[str] = Counter()
        """By operator, how often one was started on the device."""
        self.waits: Counter[str] = Counter()
        """By line of code, how often the host waited for the device."""
        self.pageable: Counter[str] = Counter()
        """By line of code, copies to the device from memory that is not pinned, which the host waits for too."""
        self.operations = 0
        """Floating-point operations of matrix products, convolutions and attention."""
        self._memory.reset()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, no memory is counted; what is used afterwards is."""
        memory, self._memory = self._memory, LiveMemory(_BLOCK)
        try:
            yield
        finally:
            self._memory = memory

    @property
    def live(self) -> int:
        """Bytes in tensors of the device that were made while this was active and are alive."""
        return self._memory.num_bytes

    @property
    def peak(self) -> int:
        """The most bytes that were alive at once."""
        return self._memory.peak

    @property
    def num_kernels(self) -> int:
        return self.kernels.total()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in leaves(out) if isinstance(leaf, Tensor)]
        for tensor in filter(self._is_here, made):
            self._memory.keep(tensor)
        if any(map(self._is_here, given)) or any(map(self._is_here, made)):
            self._count(func, args, kwargs, given, out)
        return out

    def _is_here(self, tensor: Tensor) -> bool:
        return tensor.device.type == self._kind

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor], out: Any) -> None:
        operator = func.overloadpacket
        if operator in _COPIES:
            non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
            self._count_copy(operator.__name__, given[-1], out, non_blocking)
        elif operator in _INDEXED and any(index is not None and not self._is_here(index) for index in args[1]):
            self.pageable[self._line(operator.__name__)] += 1
        elif self._has_answer(operator, args, given, kwargs):
            self.waits[self._line(operator.__name__)] += 1
        if func.is_view or operator in _WITHOUT_A_KERNEL:
            return
        self.kernels[operator.__name__] += 1
        formula: Callable[..., int] | None = flop_registry.get(operator)
        if formula is not None:
            self.operations += formula(*args, **kwargs, out_val=out)

    def _has_answer(self, operator: Any, args: Any, given: list[Tensor], kwargs: dict[str, Any]) -> bool:
        if operator is _aten.repeat_interleave:
            return kwargs.get("output_size") is None
        if operator in _INDEXED:
            indices = [index for index in args[1] if index is not None and self._is_here(index)]
            return any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        return operator in _ANSWERS and any(map(self._is_here, given))

    def _count_copy(self, name: str, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        if source.device.type == target.device.type or not source.numel():
            return
        if self._is_here(source):
            if non_blocking and target.is_pinned():
                return
            self.waits[self._line(name)] += 1
        elif not source.is_pinned():
            self.pageable[self._line(name)] += 1

    def _line(self, operator: str) -> str:
        """The innermost line of code that is not hidden, and the operator."""
        frame = sys._getframe(1)
        while frame.f_back is not None and any(part in frame.f_code.co_filename for part in self._hidden):
            frame = frame.f_back
        name = frame.f_code.co_filename.rpartition("site-packages/")[2]
        return f"{name}:{frame.f_lineno} {operator}"
