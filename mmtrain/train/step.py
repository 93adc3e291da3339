"""One optimizer step: law 1 in code."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmtrain.dataset.batch import Batch
from mmtrain.errors import NonFiniteError
from mmtrain.model.cost import CostModel
from mmtrain.model.dropout import DropoutContext
from mmtrain.model.tune import ComponentReport
from mmtrain.runtime.device import device_faults, microbatch_faults, wide
from mmtrain.runtime.processes import Runtime
from mmtrain.runtime.shard import reshard, whole
from mmtrain.scoring.loaded_model import LoadedModel
from mmtrain.train.checkpoint import trainable_parameters
from mmtrain.train.gradients import accumulate_tree, branch_of, sum_running
from mmtrain.train.lost_gradients import LostGradients, backward
from mmtrain.train.objective import Trained


@dataclass(frozen=True, slots=True, kw_only=True)
class Learner(LoadedModel):
    """A model that is trained, its optimizer, and how its steps are computed."""

    optimizer: torch.optim.Optimizer
    dropout: DropoutContext
    costs: CostModel
    """What samples cost to compute, by which a step is cut."""
    component_reports: list[ComponentReport]
    """What is trainable of each component."""
    lost_gradients: LostGradients
    exact: bool
    """Micro-batches are summed in a tree that does not depend on the number of processes."""
    sharded: bool
    """Gradients are summed by the backward pass itself."""

    def accumulate(self, batches: Iterable[Batch | None], count: float, step: int) -> tuple[Tensor, int | None]:
        return accumulate_gradients(self, batches, count, step)

    def updated(self) -> None:
        """Nothing follows an update of the weights."""


@dataclass(frozen=True, slots=True)
class StepResult:
    loss: float
    """Before the update."""
    grad_norm: float
    """Before clipping."""
    stop_signal: int | None
    """The signal that asked all processes to stop after this step."""


def accumulate_gradients(
    learner: Learner, batches: Iterable[Batch | None], sum_weights: float, step: int
) -> tuple[Tensor, int | None]:
    """Gradients of the step's loss, summed over this process's micro-batches (None: an empty one) and all processes.

    Gives the loss, () float64, the sum of the negative log-likelihoods of the step's supervised tokens, each times its
    weight, divided by `sum_weights`, the sum of the weights over all micro-batches and all processes, which is the
    number of tokens where each counts 1: one division, so no cut changes it; and the signal that asked all processes to
    stop.
    """
    runtime, parameters = learner.runtime, list(trainable_parameters(learner.model).values())
    nlls: list[Tensor] = []

    def compute(batch: Batch | None) -> None:
        nlls.append(_backward(learner, batch, sum_weights, step))

    if learner.exact:
        accumulate_tree(parameters, list(batches), compute, runtime)
    else:
        for batch in batches:
            compute(batch)
        runtime.activity.set("gradients")
        if not learner.sharded:
            sum_running(parameters, runtime)
    own = torch.stack(nlls or [_nothing(runtime)])
    if learner.exact and runtime.num_processes > 1:
        total, stop_signal = branch_of(runtime.gather(own).flatten()), runtime.agree(own[:0])[1]
    else:
        sums, stop_signal = runtime.agree(branch_of(own)[None])
        total = sums[0]
    return total / sum_weights, stop_signal


def _backward(learner: Learner, batch: Batch | None, sum_weights: float, step: int) -> Tensor:
    """() float64: a micro-batch's weighted sum of negative log-likelihoods; its gradients are added to those of the
    parameters."""
    if batch is None:
        return _nothing(learner.runtime)
    learner.runtime.activity.set("forward")
    with learner.dropout.at(step, batch), microbatch_faults(f"step {step}", batch):
        nll, _ = learner.nll(batch)
        nll = batch.weighted(nll)
        backward(nll.sum() / sum_weights, step)
        if len(nll):
            has_images = any(segment.num_images for segment in batch.segments)
            learner.lost_gradients.check(step, has_images, lambda: _nll_again(learner, batch))
    return wide(nll.detach()).sum()


def _nll_again(learner: Learner, batch: Batch) -> Tensor:
    """(num_supervised,) with the parameters as they are now, which may have changed since the backward pass."""
    reshard(learner.root)
    nll, _ = learner.nll(batch)
    reshard(learner.root)
    return batch.weighted(nll)


def _nothing(runtime: Runtime) -> Tensor:
    return wide(torch.zeros((), device=runtime.device))


def train_step(
    learner: Trained, batches: Iterable[Any], count: float, step: int, max_grad_norm: float | None
) -> StepResult:
    """Gradients, clipping and the update. `count` is what the loss is divided by.

    Raises, with the weights untouched, NonFiniteError where the loss or the gradient's norm is not finite, and
    LostGradientError where a parameter that the loss depends on has no gradient.
    """
    total, stop_signal = learner.accumulate(batches, count, step)
    learner.runtime.activity.set("update")
    parameters = trainable_parameters(learner.model).values()
    clipped = whole(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf))
    # the one place of a step that waits for the device: weights are only touched where both are finite
    loss, norm = torch.stack([total, wide(clipped).to(total.device)]).tolist()
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise NonFiniteError(f"step {step}: the loss is {loss} and the gradient's norm {norm}")
    with device_faults(lambda: f"step {step}, the update", "train fewer weights, or set run.weights to shard"):
        learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)
    learner.updated()
    return StepResult(loss, norm, stop_signal)
