"""Refuses a step whose gradients are incomplete although its loss looks normal.

autograd leaves `grad` at None for a parameter that a micro-batch does not use, such as one of vision in a step of text
or of an expert without tokens. It does the same where a module computes its result without autograd, and then the
parameter is never trained. A trial distinguishes the two: the parameters are changed, and the loss is computed again.

Where an operator has no gradient but others around it do, such as those of a residual connection, the gradients are
there and wrong. torch only warns then; here it is an error.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn

from mmtrain.errors import LostGradientError
from mmtrain.model.components import Components, base_name
from mmtrain.runtime.device import wide
from mmtrain.runtime.shard import whole
from mmtrain.safe_text import shown
from mmtrain.train.checkpoint import trainable_parameters

_ROUNDING = 1e-2
"""Largest relative change (L2) of the negative log-likelihoods that counts as rounding: two forward passes on a GPU
need not give the same bits. The trial changes parameters by far more than that."""

_NO_GRADIENT = "an autograd kernel was not registered"
"""In what torch warns of when the backward pass meets an operator that has no gradient."""


@contextmanager
def missing_gradients_are_errors() -> Iterator[None]:
    """Around all steps of a run: `backward` then refuses an operator that has no gradient. Not around each of them,
    because a change of the filters shows every other warning once more."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", f".*{re.escape(_NO_GRADIENT)}", UserWarning)
        yield


def backward(loss: Tensor, step: int) -> None:
    """Add the gradients of `loss` () to the parameters'; nothing where it depends on none of them.

    Raises LostGradientError, naming the operator, where one has no gradient (`missing_gradients_are_errors`).
    """
    if not loss.requires_grad:
        return
    try:
        torch.autograd.backward(loss)
    except UserWarning as warning:
        if _NO_GRADIENT not in str(warning):
            raise
        operator = shown(str(warning).partition(": ")[0])
        raise LostGradientError(
            f"step {step}: the operator {operator} of the model has no gradient; nothing of the step is saved; "
            "try run.kernels: off and run.compile: false"
        ) from None


class LostGradients:
    """Checks the gradients of a model's trainable parameters after each micro-batch.

    Looking for gradients that are None needs no device. Only where there is one that was not tried yet, the micro-batch
    is computed twice more, once for batches with images and once for batches without. An expert that was not used
    then is not tried again.
    """

    def __init__(self, model: nn.Module, components: Components) -> None:
        self._model, self._components = model, components
        self._unused: set[tuple[str, bool]] = set()

    @cached_property
    def _parameters(self) -> dict[str, nn.Parameter]:
        """Found at the first step: sharding replaces the parameters of a model."""
        return trainable_parameters(self._model)

    def check(self, step: int, has_images: bool, compute: Callable[[], Tensor]) -> None:
        """`compute` gives the (num_supervised,) negative log-likelihoods of the micro-batch once more.

        Raises LostGradientError, with the parameters as they were, naming one that lost its gradient.
        """
        names = [
            name
            for name, parameter in self._parameters.items()
            if parameter.grad is None and (name, has_images) not in self._unused
        ]
        if not names:
            return
        if self._matter(names, compute):
            lost = self._one_that_matters(names, compute)
            component = self._components.component_of(base_name(lost))
            raise LostGradientError(
                f"step {step}: tune.{component}: {shown(lost, 120)} has no gradient, "
                "but the loss depends on it: a module computes its result without autograd; "
                "nothing of the step is saved; try run.kernels: off and run.compile: false"
            )
        self._unused.update((name, has_images) for name in names)

    def _one_that_matters(self, names: list[str], compute: Callable[[], Tensor]) -> str:
        while len(names) > 1:
            first, second = names[: len(names) // 2], names[len(names) // 2 :]
            names = first if self._matter(first, compute) else second
        return names[0]

    @torch.no_grad()
    def _matter(self, names: list[str], compute: Callable[[], Tensor]) -> bool:
        """Whether the negative log-likelihoods change when these parameters do."""
        expected = compute()
        before = {name: self._parameters[name].detach().clone() for name in names}
        try:
            for name in names:
                self._parameters[name].mul_(2).add_(1)
            found = compute()
        finally:
            for name in names:
                self._parameters[name].copy_(before[name])
        difference, size = (float(whole(wide(value).norm())) for value in (found - expected, expected))
        return not difference <= _ROUNDING * size
