"""The loss on held-out samples, by the same encoding, batches and cross-entropy as training."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from mmtrain.data.batch import Loader
from mmtrain.data.plan import cut_step
from mmtrain.data.samples import Checked, SampleSet
from mmtrain.model.inputs import InputMaker
from mmtrain.train.loss import supervised_nll
from mmtrain.train.runtime import Runtime


@dataclass(frozen=True, slots=True)
class EvalSet:
    """One source of `data.eval`, checked."""

    name: str
    samples: SampleSet
    checked: Checked


@dataclass(frozen=True, slots=True)
class EvalResult:
    """`nll` is in nats per supervised token; `token_accuracy` the share of them that were the likeliest."""

    name: str
    nll: float
    token_accuracy: float
    num_supervised: int
    num_samples: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll, 700.0))

    def row(self) -> dict[str, Any]:
        return {
            "eval": self.name,
            "nll": self.nll,
            "perplexity": self.perplexity,
            "token_accuracy": self.token_accuracy,
            "num_supervised": self.num_supervised,
            "num_samples": self.num_samples,
        }


@torch.no_grad()
def evaluate(
    model: Any, make_inputs: InputMaker, eval_set: EvalSet, runtime: Runtime, microbatch_tokens: int, packing: bool
) -> EvalResult:
    """Sum of the negative log-likelihoods over all supervised tokens divided by their count, over all processes."""
    numbers = eval_set.checked.used
    cuts = cut_step(eval_set.checked.num_tokens[numbers].tolist(), microbatch_tokens, packing, runtime.num_processes)
    own = [[int(numbers[i]) for i in cut] for cut in cuts[runtime.index :: runtime.num_processes] if cut]
    totals = torch.zeros(4, dtype=torch.float64)
    for batch in Loader(eval_set.samples, packing).batches(own):
        on_device = batch.to(runtime.device)
        with runtime.autocast():
            nll, right = supervised_nll(model, make_inputs(on_device), on_device)
        totals += torch.tensor([nll.double().sum().item(), right.sum().item(), nll.numel(), len(batch.segments)])
    nll_sum, num_right, num_supervised, num_samples = runtime.sum(totals.to(runtime.device)).tolist()
    return EvalResult(
        eval_set.name, nll_sum / num_supervised, num_right / num_supervised, int(num_supervised), int(num_samples)
    )
