"""The kind of device whose kernels are chosen: that of the tensors, except while a run on a GPU is planned.

A plan computes with tensors without values, which are on the CPU everywhere. Inside `planned_on` the model takes the
ways that it takes on a GPU, so that what they allocate is counted.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch


class Counter(Protocol):
    """What counts the memory of a plan."""

    def as_one_kernel(self, formula: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result of `formula`, of which only the result takes memory."""


class _Plan:
    kind: str | None = None
    counter: Counter | None = None


def kind_of(device: torch.device) -> str:
    """`cpu`, `cuda` and so on."""
    return _Plan.kind or device.type


def planned_kernels() -> Counter | None:
    """What stands for compiled kernels while a run on a GPU is planned; None at all other times."""
    return _Plan.counter if _Plan.kind == "cuda" else None


@contextmanager
def planned_on(kind: str, counter: Counter) -> Iterator[None]:
    """Inside, kernels are chosen for a device of `kind`, with compute capability 8.0 or higher if it is a GPU."""
    _Plan.kind, _Plan.counter = kind, counter
    try:
        yield
    finally:
        _Plan.kind = _Plan.counter = None
