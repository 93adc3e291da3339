"""The one shift and the one cross-entropy, shared by training and evaluation."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.data.batch import Batch
from mmtrain.model.head import FrozenHeadNLL, before_head, frozen_head


def supervised_nll(model: Any, inputs: dict[str, Any], batch: Batch) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each supervised token, and whether it was the likeliest: both (num_supervised,).

    The second is meant for evaluation: where gradients are wanted and the head is frozen it is not looked for.

    The token at position t is predicted from position t - 1. Logits, (num_supervised, vocabulary), are made at those
    positions alone, a few hundred at a time where the head is frozen, and the cross-entropy is taken in float32:
    -log softmax(logits)[target], in nats. Tokens come row by row, in order.
    """
    predicts = torch.zeros_like(batch.supervised)
    predicts[:, :-1] = batch.supervised[:, 1:]
    targets = batch.input_ids[batch.supervised]
    inputs = {**inputs, "logits_to_keep": predicts}
    head = frozen_head(model)
    hidden = None if head is None else before_head(model, head, inputs)
    if head is not None and hidden is not None:
        nll, right = FrozenHeadNLL.apply(hidden, head.weight, head.bias, targets)  # type: ignore[no-untyped-call]
        return nll, right
    logits = model(**inputs).logits.float()
    return F.cross_entropy(logits, targets, reduction="none"), logits.detach().argmax(-1) == targets
