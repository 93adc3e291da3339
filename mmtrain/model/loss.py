"""The shift by one token and the cross-entropy, for training and evaluation."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.dataset.batch import Batch
from mmtrain.model.attention import KEYWORD
from mmtrain.model.head import FrozenHeadNLL, HeadKind, before_head, frozen_head
from mmtrain.model.transfer import on_device


def supervised_nll(model: Any, head_kind: HeadKind, inputs: dict[str, Any], batch: Batch) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each supervised token, and whether it was the likeliest: both (num_supervised,).

    The second is for evaluation: it is not computed if the head is frozen and gradients are required.

    The token at position t is predicted from position t - 1. Logits, (num_supervised, vocabulary), are computed only at
    those positions, a few hundred at a time if the head is frozen. The cross-entropy is computed in float32:
    -log softmax(logits)[target], in nats. Tokens are in the order of the rows.
    """
    targets = on_device(batch.input_ids[batch.supervised], inputs["input_ids"].device)
    inputs = _at_supervised(inputs, batch)
    if head_kind == "plain" and (head := frozen_head(model)) is not None:
        hidden = before_head(model, head, inputs).flatten(0, -2)
        nll, right = FrozenHeadNLL.apply(hidden, head.weight, head.bias, targets)  # type: ignore[no-untyped-call]
        return nll, right
    logits = model(**inputs).logits.flatten(0, -2).float()
    return F.cross_entropy(logits, targets, reduction="none"), logits.detach().argmax(-1) == targets


def supervised_logits(
    model: Any, head_kind: HeadKind, inputs: dict[str, Any], batch: Batch
) -> Callable[[slice], Tensor]:
    """From a range of the batch's supervised tokens to the logits from which they are predicted, (num_tokens,
    vocabulary) in float32, made when they are asked for. If the head is not frozen or its output is changed, all of
    them exist at once, in the model's type."""
    inputs = _at_supervised(inputs, batch)
    if head_kind == "plain" and (head := frozen_head(model)) is not None:
        plain, hidden = head, before_head(model, head, inputs).flatten(0, -2)
        return lambda rows: plain(hidden[rows].to(plain.weight.dtype)).float()
    logits = model(**inputs).logits.flatten(0, -2)
    return lambda rows: logits[rows].float()


def _at_supervised(inputs: dict[str, Any], batch: Batch) -> dict[str, Any]:
    """`inputs` for a forward that computes logits only where a supervised token is predicted."""
    predicting = on_device(_predicting(batch), inputs["input_ids"].device)
    inputs = {**inputs, "logits_to_keep": predicting}
    if KEYWORD in inputs:
        inputs[KEYWORD] = replace(inputs[KEYWORD], predicting=predicting)
    return inputs


def _predicting(batch: Batch) -> Tensor:
    """The positions before the supervised ones: indices for the one row of a packed batch, a mask for padded rows.

    Indices are faster: with a mask, the program waits until the device has counted the selected positions.
    """
    if batch.packed:
        return batch.supervised[0].nonzero()[:, 0] - 1
    predicts = torch.zeros_like(batch.supervised)
    predicts[:, :-1] = batch.supervised[:, 1:]
    return predicts
