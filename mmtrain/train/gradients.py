"""The sum of the micro-batches' gradients, over all of them and all processes.

Floating-point sums depend on their order. `running` adds one after the other: fast, and equal within
rounding on every layout. `tree` adds in a binary tree over the micro-batches that is the same for any number of
processes: the same bits.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from mmtrain.runtime.processes import Runtime

Microbatch = TypeVar("Microbatch")
CHUNK = 2**24
"""Values of a gradient that are exchanged at once: it limits the memory for those of all other processes."""


def is_exact(microbatches: int, num_processes: int) -> bool:
    """Whether each process computes one branch of the tree: their number is a power of two that divides the cut."""
    return num_processes & (num_processes - 1) == 0 and microbatches % num_processes == 0


def flatten(parameters: Sequence[torch.nn.Parameter]) -> Tensor:
    """(num_values,) every gradient, a missing one as zeros."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


def put_back(values: Tensor, parameters: Sequence[torch.nn.Parameter]) -> None:
    """Make `values` (num_values,) the gradients."""
    own = torch.split(values, [p.numel() for p in parameters])
    for parameter, gradient in zip(parameters, own, strict=True):
        parameter.grad = gradient.view_as(parameter)


def sum_running(parameters: Sequence[torch.nn.Parameter], runtime: Runtime) -> None:
    """Sum the gradients of all processes, in one flat reduction.

    A missing gradient is zero, with one process as with many: to AdamW, which skips what has none, they differ.
    """
    if runtime.num_processes > 1:
        put_back(runtime.sum(flatten(parameters)), parameters)
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def accumulate_tree(
    parameters: Sequence[torch.nn.Parameter],
    microbatches: Sequence[Microbatch],
    backward: Callable[[Microbatch], None],
    runtime: Runtime,
) -> None:
    """Let `backward` add the gradients of each micro-batch, and put their sum over all processes into the parameters,
    added by `sum_tree`."""
    left = list(microbatches)

    def leaf() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        backward(left.pop(0))
        if not left:  # what follows the last one is the exchange
            runtime.activity.set("gradients")
        return flatten(parameters)

    put_back(sum_tree(len(left), leaf, runtime), parameters)


def sum_tree(leaves: int, leaf: Callable[[], Tensor], runtime: Runtime) -> Tensor:
    """(n,) the sum of `leaf()` (n,), called `leaves` times in order by each process, in a binary tree over all.

    A branch over n leaves is the sum of the branches over its first n // 2 and its other leaves; a process's leaves
    are one branch of the tree where `is_exact` says so.
    """

    def branch(count: int) -> Tensor:
        return leaf() if count == 1 else branch(count // 2).add_(branch(count - count // 2))

    own = branch(leaves)
    if runtime.num_processes == 1:
        return own
    return torch.cat([branch_of(runtime.gather(chunk)) for chunk in torch.split(own, CHUNK)])


def branch_of(leaves: Tensor) -> Tensor:
    """The sum over the first dimension, as the tree adds it."""
    half = len(leaves) // 2
    return leaves[0] if len(leaves) == 1 else branch_of(leaves[:half]) + branch_of(leaves[half:])
