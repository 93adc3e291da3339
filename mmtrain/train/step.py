"""One optimizer step: law 1 in code."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmtrain.dataset.batch import Batch
from mmtrain.errors import NonFiniteError
from mmtrain.model.dropout import DropoutClock
from mmtrain.model.head import HeadKind
from mmtrain.model.inputs import InputMaker
from mmtrain.model.loss import supervised_nll
from mmtrain.model.root import Root
from mmtrain.runtime.processes import Runtime
from mmtrain.runtime.shard import whole
from mmtrain.train.checkpoint import trainable_parameters
from mmtrain.train.gradients import branch_of, flatten, put_back, sum_running, sum_tree
from mmtrain.train.lost_gradients import LostGradients, backward


@dataclass(frozen=True, slots=True)
class Learner:
    """A model that is ready to learn, and what a step needs beside it."""

    model: Any
    root: Root
    """The model, as everything is computed through it."""
    make_inputs: InputMaker
    head_kind: HeadKind
    optimizer: torch.optim.Optimizer
    clock: DropoutClock
    runtime: Runtime
    lost_gradients: LostGradients
    exact: bool = False
    """Micro-batches are summed in a tree that does not depend on the number of processes."""
    sharded: bool = False
    """Gradients are summed by the backward pass itself."""
    packing: bool = True
    """The samples of a micro-batch share one row."""


@dataclass(frozen=True, slots=True)
class StepResult:
    loss: float
    """Before the update."""
    grad_norm: float
    """Before clipping."""
    asked: int | None
    """The signal by which all processes stop behind this step."""


def accumulate_gradients(
    learner: Learner, batches: Iterable[Batch | None], num_supervised: int, step: int
) -> tuple[Tensor, int | None]:
    """Gradients of the step's loss, summed over this process's micro-batches (None: an empty one) and all processes.

    Gives the loss, () float64, the sum of the negative log-likelihoods of the step's supervised tokens divided by
    `num_supervised`, their count over all micro-batches and all processes: one division, so no cut changes it; and the
    signal by which all processes stop.
    """
    runtime, parameters = learner.runtime, list(trainable_parameters(learner.model).values())
    if learner.exact:
        nlls = _accumulate_tree(learner, list(parameters), batches, num_supervised, step)
    else:
        nlls = [_backward(learner, batch, num_supervised, step) for batch in batches]
        runtime.activity.set("gradients")
        if not learner.sharded:
            sum_running(parameters, runtime)
    runtime.activity.set("gradients")
    own = torch.stack(nlls) if nlls else torch.zeros(1, dtype=torch.float64, device=runtime.device)
    if learner.exact and runtime.num_processes > 1:
        total, asked = branch_of(runtime.gather(own).flatten()), runtime.agree(own[:0])[1]
    else:
        sums, asked = runtime.agree(branch_of(own)[None])
        total = sums[0]
    return total / num_supervised, asked


def _accumulate_tree(
    learner: Learner,
    parameters: list[torch.nn.Parameter],
    batches: Iterable[Batch | None],
    num_supervised: int,
    step: int,
) -> list[Tensor]:
    nlls: list[Tensor] = []
    every = list(batches)
    remaining: Iterator[Batch | None] = iter(every)

    def leaf() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        nlls.append(_backward(learner, next(remaining), num_supervised, step))
        if len(nlls) == len(every):  # what follows the last one is the exchange
            learner.runtime.activity.set("gradients")
        return flatten(parameters)

    put_back(sum_tree(len(every), leaf, learner.runtime), parameters)
    return nlls


def _backward(learner: Learner, batch: Batch | None, num_supervised: int, step: int) -> Tensor:
    """() float64: a micro-batch's sum of negative log-likelihoods; its gradients are added to the parameters'."""
    if batch is None:
        return torch.zeros((), dtype=torch.float64, device=learner.runtime.device)
    learner.runtime.activity.set("forward")
    with learner.clock.at(step, batch):
        nll = _nll(learner, batch)
        backward(nll.sum() / num_supervised, step)
        if len(nll):
            has_images = any(segment.num_images for segment in batch.segments)
            learner.lost_gradients.check(step, has_images, lambda: _nll(learner, batch))
    total: Tensor = nll.detach().double().sum()
    return total


def _nll(learner: Learner, batch: Batch) -> Tensor:
    """(num_supervised,)"""
    with learner.runtime.autocast():
        nll: Tensor = learner.root(supervised_nll, learner.head_kind, learner.make_inputs(batch), batch)[0]
    return nll


def train_step(
    learner: Learner, batches: Iterable[Batch | None], num_supervised: int, step: int, max_grad_norm: float | None
) -> StepResult:
    """Gradients, clipping and the update.

    Raises, with the weights untouched, NonFiniteError where the loss or the gradient's norm is not finite, and
    LostGradientError where a parameter that the loss depends on has no gradient.
    """
    total, asked = accumulate_gradients(learner, batches, num_supervised, step)
    learner.runtime.activity.set("update")
    parameters = trainable_parameters(learner.model).values()
    clipped = whole(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf))
    # the one place of a step that waits for the device: weights are only touched where both are finite
    loss, norm = torch.stack([total.to(clipped.device), clipped.double()]).tolist()
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise NonFiniteError(f"step {step}: the loss is {loss} and the gradient's norm {norm}")
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, norm, asked)
