"""Next-token distributions of two models at the same supervised tokens: divergence, entropy and calibration.

All figures are computed in float32 from log-probabilities, whatever the models' type, for a few tokens at a time.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmtrain.dataset.batch import Batch
from mmtrain.runtime.device import wide
from mmtrain.scoring.loaded_model import LoadedModel
from mmtrain.scoring.scores import Floats, Ints

NUM_BINS = 10
"""Bins of confidence, of equal width."""
NUM_COLUMNS = 4 + 2 * 3 * NUM_BINS
_VALUES_AT_ONCE = 2**24
"""Logits that exist at once for each model: 64 MiB."""
_SMALL = 1.0


@dataclass(frozen=True, slots=True)
class Distributions:
    """Sums over the supervised tokens of each answer; the arrays are (num_answers, ...)."""

    sample: Ints
    """The index of the sample."""
    num_tokens: Floats
    divergence: Floats
    """KL(first ‖ second), in nats."""
    entropy: Floats
    """(num_answers, 2) of both models, in nats."""
    calibration: Floats
    """(num_answers, 2, NUM_BINS, 3) for both models and each bin of confidence: tokens, the sum of the confidence, and
    how many of the most likely tokens were right."""

    @staticmethod
    def of(sample: Ints, sums: Floats) -> "Distributions":
        """From sums (num_answers, NUM_COLUMNS) of what `token_columns` gives."""
        bins = sums[:, 4:].reshape(-1, 2, NUM_BINS, 3)
        return Distributions(sample, sums[:, 0], sums[:, 1], sums[:, 2:4], bins)


@dataclass(frozen=True, slots=True)
class ModelPair:
    """Two models that share their weights: only one of them is active at a time."""

    first: LoadedModel
    second: LoadedModel
    as_first: Callable[[], AbstractContextManager[Any]]
    as_second: Callable[[], AbstractContextManager[Any]]

    def columns(self, batch: Batch) -> Tensor:
        """(num_supervised, NUM_COLUMNS) in float64; see `token_columns`."""
        with self.as_first():
            first = self.first.logits(batch)
        with self.as_second():
            second = self.second.logits(batch)
        targets = batch.input_ids[batch.supervised].to(self.first.model.device)
        at_once = max(1, _VALUES_AT_ONCE // first(slice(0, 1)).shape[-1]) if len(targets) else 1
        blocks = [slice(start, start + at_once) for start in range(0, len(targets), at_once)]
        found = [token_columns(first(rows), second(rows), targets[rows]) for rows in blocks]
        return torch.cat(found) if found else torch.zeros(0, NUM_COLUMNS, dtype=torch.float64)


def token_columns(first: Tensor, second: Tensor, targets: Tensor) -> Tensor:
    """(n, NUM_COLUMNS) in float64, in the order of `Distributions.of`, from logits (n, vocabulary) and targets (n,)."""
    log_p, log_q = (logits.float().log_softmax(-1) for logits in (first, second))
    columns = [
        torch.ones_like(targets, dtype=torch.float32)[:, None],
        divergence(log_p, log_q)[:, None],
        entropy(log_p)[:, None],
        entropy(log_q)[:, None],
        calibration(log_p, targets).flatten(1),
        calibration(log_q, targets).flatten(1),
    ]
    return wide(torch.cat(columns, dim=1))


def entropy(log_p: Tensor) -> Tensor:
    """(n,) -sum p log p in nats, from log-probabilities (n, vocabulary) (Shannon 1948, "A mathematical theory of
    communication", section 6). An impossible token adds nothing."""
    return -(log_p.exp() * log_p).masked_fill(log_p == -torch.inf, 0).sum(-1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(n,) KL(p ‖ q) = sum p log(p / q) in nats, from log-probabilities (n, vocabulary) (Kullback and Leibler 1951, "On
    information and sufficiency"). Infinite where q excludes a token that p does not.

    With d = log(q / p), and as both sum to 1, it is also sum p (e^d - 1 - d), whose terms are never negative (as in
    Schulman 2020, "Approximating KL divergence"). So nothing cancels where the two are nearly equal.
    """
    p, d = log_p.exp(), log_q - log_p
    near = p * (d.expm1() - d)
    far = log_q.exp() - p - p * d
    terms = torch.where(d.abs() < _SMALL, near, far).masked_fill(log_q == -torch.inf, torch.inf)
    return terms.masked_fill(log_p == -torch.inf, 0).sum(-1) + log_q.exp().masked_fill(log_p != -torch.inf, 0).sum(-1)


def calibration(log_p: Tensor, targets: Tensor) -> Tensor:
    """(n, NUM_BINS, 3) for each token, in the bin of its confidence: 1, the confidence, and whether it is right.

    The confidence is the largest probability, and right is the token that has it (Guo and others 2017, "On calibration
    of modern neural networks", section 2). Bin b has the confidences from b / NUM_BINS on; the last one also has 1.
    """
    highest, token = log_p.max(-1)
    confidence = highest.exp()
    number = (confidence * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    values = torch.stack([torch.ones_like(confidence), confidence, (token == targets).float()], dim=-1)
    return torch.nn.functional.one_hot(number, NUM_BINS)[..., None] * values[:, None]


def calibration_figures(bins: Floats) -> dict[str, Any]:
    """From sums (NUM_BINS, 3) as `calibration` gives them for a token.

    - `expected_accuracy`: the mean confidence. `observed_accuracy`: the share of the tokens that were the most likely.
    - `expected_calibration_error`: the sum over bins of tokens in the bin / all tokens * |accuracy - confidence| of the
      bin (Naeini and others 2015, "Obtaining well calibrated probabilities using Bayesian binning").
    - `bins`: for each bin with tokens its range, tokens, mean confidence and accuracy.
    """
    num_tokens, confidence, right = bins.T
    used = num_tokens > 0
    edges = np.arange(NUM_BINS + 1) / NUM_BINS
    rows = zip(edges[:-1][used], edges[1:][used], bins[used], strict=True)
    return {
        "expected_accuracy": float(confidence.sum() / num_tokens.sum()),
        "observed_accuracy": float(right.sum() / num_tokens.sum()),
        "expected_calibration_error": float(np.abs(right - confidence).sum() / num_tokens.sum()),
        "bins": [
            {"range": [low, high], "num_tokens": int(n), "confidence": total / n, "accuracy": correct / n}
            for low, high, (n, total, correct) in rows
        ],
    }
