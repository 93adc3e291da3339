"""Which values dropout drops, as a function of a counter: the same in every cut, and made again in the backward pass
instead of stored.

The random numbers are those of Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3",
section 3.3), which NumPy and Triton both have. The key is a module's. The counter is, from its first word on:
1 + block + blocks of a row * position in the sample, the sample, the step, 0. Each counter gives `PER_COUNTER` numbers
of 16 bits. Number n of block b decides on value b + n * blocks of a row, so that a GPU reads and writes neighbours.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmtrain.model.planned_device import planned_kernels
from mmtrain.model.transfer import on_device

PER_COUNTER = 16
_LEVELS = 2**16
_AT_ONCE = 4096
"""Counters at a time on the CPU: their numbers stay in its cache."""
_TRIED_KEY = 2**63 + 5
_Drop = Callable[[Tensor, Tensor, int, int, int, float, int], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class RowOrigins:
    """Of which sample and position each row of a module's input is."""

    num_rows: int
    spans: tuple[tuple[int, int, int], ...]
    """(sample, first row, last row + 1), each from the sample's first position on. RowOrigins outside lose nothing."""
    _on_device: dict[torch.device, Tensor] = field(default_factory=dict)

    def on(self, device: torch.device) -> Tensor:
        """(num_rows, 2) int64: sample and position of each row, -1 for no sample; copied to `device` once."""
        if device not in self._on_device:
            origins = torch.full((self.num_rows, 2), -1)
            for sample, start, stop in self.spans:
                origins[start:stop, 0] = sample
                origins[start:stop, 1] = torch.arange(stop - start)
            self._on_device[device] = on_device(origins, device)
        return self._on_device[device]


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """What one module drops in one micro-batch. `p` is rounded to a multiple of 2**-16, and what is kept is scaled to
    the rounded value, so that the mean stays."""

    p: float
    key: int
    """64 bits"""
    step: int
    rows: RowOrigins
    selected: Tensor | None = None
    """(num_selected,) the rows that the module sees; None: all."""

    def at(self, selected: Tensor | None) -> "Mask":
        """The mask of these rows."""
        return self if selected is None else replace(self, selected=selected)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def drop(self, *tensors: Tensor) -> list[Tensor]:
        """Each of `tensors`, (rows, width), with some values zero and the others divided by the share that is kept."""
        device, width = tensors[0].device, tensors[0].shape[-1]
        if planned_kernels() is not None:
            return [torch.empty_like(x) for x in tensors]
        kernel = gpu_kernel(device) if device.type == "cuda" else None
        if kernel is not None:
            origins = self._of_selected(self.rows.on(device))
            settings = self.key, self.step, self._threshold, self._scale, PER_COUNTER
            return [kernel(x, origins, *settings) for x in tensors]
        every = torch.from_numpy(_dropped(self.rows, width, self.key, self.step, self._threshold))
        dropped = self._of_selected(on_device(every, device))
        return [(x * self._scale).masked_fill_(dropped, 0.0) for x in tensors]

    def _of_selected(self, rows: Tensor) -> Tensor:
        return rows if self.selected is None else rows[self.selected]

    @property
    def _threshold(self) -> int:
        """Numbers below it drop their value: at least one of all and not all, as `p` is above 0 and below 1."""
        return min(max(round(self.p * _LEVELS), 1), _LEVELS - 1)

    @property
    def _scale(self) -> float:
        return _LEVELS / (_LEVELS - self._threshold)


def _dropped(rows: RowOrigins, width: int, key: int, step: int, threshold: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(num_rows, width) which values are dropped."""
    num_blocks = -(-width // PER_COUNTER)
    found = np.zeros((rows.num_rows, num_blocks * PER_COUNTER), np.bool_)
    generator = np.random.Philox(key=np.array([key, 0], np.uint64))
    state: Any = generator.state
    at_once = max(1, _AT_ONCE // num_blocks)
    for sample, start, stop in rows.spans:
        state["state"]["counter"][:] = (0, sample % 2**64, step, 0)  # it counts before it draws; sample -1 fills up
        generator.state = state
        for first in range(start, stop, at_once):
            own = found[first : min(first + at_once, stop)]
            words = generator.random_raw(len(own) * num_blocks * (PER_COUNTER // 4)).astype("<u8", copy=False)
            numbers = words.view("<u2").reshape(len(own), num_blocks, PER_COUNTER).transpose(0, 2, 1)
            np.less(numbers, threshold, out=own.reshape(numbers.shape))
    return found[:, :width]


@functools.cache
def gpu_kernel(device: torch.device) -> _Drop | None:
    """Makes and applies a mask in one pass on `device`, a GPU; None where Triton is missing or gives another mask than
    the CPU."""
    try:
        from mmtrain.model.kernels.masks_triton import drop

        rows, x = RowOrigins(5, ((3, 1, 4), (7, 4, 5))), torch.ones(5, 72, device=device)
        found = drop(x, rows.on(device), _TRIED_KEY, 9, _LEVELS // 4, 2.0, PER_COUNTER)
        expected = torch.from_numpy(_dropped(rows, x.shape[1], _TRIED_KEY, 9, _LEVELS // 4))
        return drop if torch.equal(found == 0, expected.to(device)) else None
    except Exception:  # no Triton, no compiler for its launcher, or a GPU that it does not know
        return None


class MaskedInput(torch.autograd.Function):
    """x (rows, width) under a mask, which is made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Mask) -> Tensor:
        ctx.mask = mask
        dropped: Tensor = mask.drop(x)[0]
        return dropped

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        return ctx.mask.drop(outer[0])[0], None


class DroppedProduct(torch.autograd.Function):
    """drop(x) A' of x (rows, width) and A (rank, width), under autocast in its type. What is kept is x itself, which
    other layers keep too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: Mask) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.mask = mask
        (dropped,) = mask.drop(x)
        return torch.mm(dropped, weight.t())

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor, None]:
        (to_out,), (x, weight) = outer, ctx.saved_tensors
        to_dropped = torch.mm(to_out, weight.to(to_out.dtype)).to(x.dtype)
        to_x, dropped = ctx.mask.drop(to_dropped, x)
        return to_x, torch.mm(to_out.t(), dropped.to(to_out.dtype)).to(weight.dtype), None
