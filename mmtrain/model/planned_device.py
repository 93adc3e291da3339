"""The kind of device whose kernels are chosen: that of the tensors, except while a run on a GPU is planned.

A plan computes with tensors without values, which are on the CPU everywhere. Inside `planned_on` the model takes the
ways that it takes on a GPU, so that what they allocate is counted.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch

B = TypeVar("B")


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


def computed(blocks: Iterable[B], size: Callable[[B], int] = lambda block: 0) -> Iterable[B]:
    """The blocks that are computed one after the other: all of them, but while a run is planned only the first one and
    the largest. Nobody reads the results of the others, and none needs more memory."""
    if _Plan.counter is None:
        return blocks
    every = list(blocks)
    return [*every[:1], *([max(every, key=size)] if every[1:] else [])]


@contextmanager
def planned_on(kind: str, counter: Counter) -> Iterator[None]:
    """Inside, kernels are chosen for a device of `kind`, with compute capability 8.0 or higher if it is a GPU."""
    _Plan.kind, _Plan.counter = kind, counter
    try:
        yield
    finally:
        _Plan.kind = _Plan.counter = None
