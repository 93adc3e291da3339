"""The one shift and the one cross-entropy, shared by training and evaluation."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.data.batch import Batch


def supervised_nll(model: Any, inputs: dict[str, Any], batch: Batch) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each supervised token, and whether it was the likeliest: both (num_supervised,).

    The token at position t is predicted from position t - 1. Logits, (num_supervised, vocabulary), are made at those
    positions alone and the cross-entropy is taken in float32: -log softmax(logits)[target], in nats. Tokens come
    row by row, in order.
    """
    predicts = torch.zeros_like(batch.supervised)
    predicts[:, :-1] = batch.supervised[:, 1:]
    logits = model(**inputs, logits_to_keep=predicts).logits.float()
    targets = batch.input_ids[batch.supervised]
    return F.cross_entropy(logits, targets, reduction="none"), logits.detach().argmax(-1) == targets
