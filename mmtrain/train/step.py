"""One optimizer step: law 1 in code."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from mmtrain.data.batch import Batch
from mmtrain.errors import NonFiniteError
from mmtrain.model.dropout import DropoutClock
from mmtrain.model.inputs import InputMaker
from mmtrain.train.checkpoint import trainable_parameters
from mmtrain.train.loss import supervised_nll
from mmtrain.train.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Learner:
    """A model that is ready to learn, and what a step needs beside it."""

    model: Any
    make_inputs: InputMaker
    optimizer: torch.optim.Optimizer
    clock: DropoutClock
    runtime: Runtime


def accumulate_gradients(learner: Learner, batches: Iterable[Batch], num_supervised: int, step: int) -> float:
    """Gradients of the step's loss, and the loss, summed over this process's micro-batches and all processes.

    The loss is the sum of the negative log-likelihoods of the step's supervised tokens divided by `num_supervised`,
    their count over all micro-batches and all processes: one division, so no cut changes it.
    """
    nll_sum = torch.zeros((), dtype=torch.float64, device=learner.runtime.device)
    for batch in batches:
        on_device = batch.to(learner.runtime.device)
        learner.clock.set(step, on_device)
        with learner.runtime.autocast():
            nll, _ = supervised_nll(learner.model, learner.make_inputs(on_device), on_device)
        torch.autograd.backward(nll.sum() / num_supervised)
        nll_sum += nll.detach().double().sum()
    learner.clock.clear()
    learner.runtime.sum_gradients(trainable_parameters(learner.model).values())
    return learner.runtime.sum(nll_sum).item() / num_supervised


def train_step(
    learner: Learner, batches: Iterable[Batch], num_supervised: int, step: int, max_grad_norm: float | None
) -> tuple[float, float]:
    """Gradients, clipping and the update. Gives the loss before the update and the gradient's norm before clipping.

    Raises NonFiniteError, with the weights untouched, where either is not finite.
    """
    loss = accumulate_gradients(learner, batches, num_supervised, step)
    parameters = [p for p in trainable_parameters(learner.model).values() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf).item()
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise NonFiniteError(f"step {step}: the loss is {loss} and the gradient's norm {norm}")
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)
    return loss, norm
