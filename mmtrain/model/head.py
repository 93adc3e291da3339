"""The head and the cross-entropy together, in blocks: logits exist for 512 tokens and 2,048 words at a time.

For a frozen head only the gradient of its input is kept: the mean of the other words under the softmax less the
target's word, times the probability of those others. The mean grows with the softmax's sum from block to block, as
attention's result does in Milakov and Gimelshein 2018, "Online normalizer calculation for softmax". So nothing is
computed twice and a block is gone before the next. The target stays out of both sums: where it is almost certain, the
gradient would be the small difference of two words that are nearly one, in bfloat16 no more than their rounding.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.model.kernels.products import product
from mmtrain.safe_text import one_line

TOKENS = 512
"""Tokens whose logits exist at once. With fewer the weights are fetched more often, which the CPU feels."""
WORDS = 2048
"""Words whose logits exist at once on the CPU, so that they stay in its cache; elsewhere all of them."""
_LOG2E = math.log2(math.e)

HeadKind = Literal["plain", "own"]
"""`plain`: the logits are what the head, a linear layer, returns. `own`: the model does more with them, such as a scale
or a cap, or its head is of another kind."""


class FrozenHeadNLL(torch.autograd.Function):
    """Negative log-likelihoods under softmax(hidden @ weight.T + bias) with a frozen weight."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(n,) float32 nll and (n,) bool whether the target is the likeliest, found only where no gradient is wanted,
        from hidden (n, width), weight (vocabulary, width) and targets (n,). The gradient of hidden is softmax(logits) -
        onehot(target), times weight.
        """
        wanted = ctx.needs_input_grad[0]
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        right = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        gradient = torch.empty_like(hidden) if wanted else None
        for start in range(0, len(hidden), TOKENS):
            rows = slice(start, start + TOKENS)
            softmax = _Softmax(hidden[rows].to(weight.dtype), targets[rows, None], wanted)
            for first in range(0, len(weight), words := _words(weight)):
                part = slice(first, first + words)
                softmax.add(weight[part], None if bias is None else bias[part], first)
            nll[rows] = softmax.nll
            if gradient is None:
                right[rows] = softmax.right
            else:
                gradient[rows] = softmax.gradient(weight[targets[rows]])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(right)
        return nll, right

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0][:, None].to(gradient.dtype), None, None, None


class _Softmax:
    """The softmax over words that come block by block, for hidden states (n, width) and their targets (n, 1); in
    float32, and to the base of 2, whose powers the CPU takes in a third of the time."""

    def __init__(self, hidden: Tensor, targets: Tensor, wanted: bool) -> None:
        self._hidden, self._targets = hidden, targets
        # of the words that are no target: the highest logit, the first word with it, the sum of the powers under it and
        # that of the words themselves by their powers
        self._top = hidden.new_full((len(hidden), 1), -math.inf, dtype=torch.float32)
        self._rival = torch.zeros_like(targets)
        self._total, self._at_target = torch.zeros_like(self._top), torch.zeros_like(self._top)
        self._sum = torch.zeros_like(hidden, dtype=torch.float32) if wanted else None

    def add(self, weight: Tensor, bias: Tensor | None, first: int) -> None:
        """The words from `first` on, by their weight (words, width) and bias (words,)."""
        logits = product(self._hidden, weight, bias).float().mul_(_LOG2E)
        place = self._targets - first
        is_here, place = (place >= 0) & (place < len(weight)), place.clamp(0, len(weight) - 1)
        at_place = logits.gather(-1, place)
        self._at_target = torch.where(is_here, at_place, self._at_target)
        logits.scatter_(-1, place, at_place.masked_fill(is_here, -math.inf))
        if self._sum is None:
            highest, word = logits.max(-1, keepdim=True)
            self._rival = torch.where(highest > self._top, word + first, self._rival)
        else:
            highest = logits.amax(-1, keepdim=True)
        top = torch.maximum(self._top, highest)
        likely, shrunk = logits.sub_(top).exp2_(), self._top.sub_(top).exp2_()
        self._total.mul_(shrunk).add_(likely.sum(-1, keepdim=True))
        if self._sum is not None:
            self._sum.mul_(shrunk).add_(product(likely.to(weight.dtype), weight.t()))
        self._top = top

    @property
    def nll(self) -> Tensor:
        """(n,)"""
        return F.softplus(self._odds)[:, 0]

    @property
    def right(self) -> Tensor:
        """(n,) where no gradient is wanted; of equals the first is the likeliest."""
        is_first = (self._at_target == self._top) & (self._targets < self._rival)
        return ((self._at_target > self._top) | is_first)[:, 0]

    def gradient(self, words: Tensor) -> Tensor:
        """(n, width) of the nll, where one is wanted, from the targets' words (n, width)."""
        assert self._sum is not None
        return torch.sigmoid(self._odds) * (self._sum / self._total - words)

    @property
    def _odds(self) -> Tensor:
        """(n, 1) the logarithm of the odds against the target, p = 1 / (1 + e^odds)."""
        return (self._total.log2() + self._top - self._at_target) / _LOG2E


def _words(weight: Tensor) -> int:
    return WORDS if weight.device.type == "cpu" else len(weight)


def frozen_head(model: Any) -> nn.Linear | None:
    """The model's head where it is a linear layer that is not trained now, None otherwise."""
    head = model.get_output_embeddings()
    is_trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in head.parameters())
    return head if type(head) is nn.Linear and not is_trained else None


@torch.no_grad()
def find_head_kind(model: Any, say: Callable[[str], None]) -> HeadKind:
    """The kind of the model's head, tried on one token: to be called on the model as it was loaded.

    Where the model does not run on one token of text it is `own`, which is slower and right for every model; `say` is
    given the one line that says so.
    """
    head, device = model.get_output_embeddings(), model.device
    if type(head) is not nn.Linear:
        return "own"
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), _passing_on(head) as given:
        try:
            logits = model(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False).logits
        except Exception as error:  # a family that needs more than text can raise anything
            say(f"head: all logits at once, the model fails on one token: {type(error).__name__}: {one_line(error)}")
            return "own"
    return "plain" if _is_only(logits, given) else "own"


def before_head(model: Any, head: nn.Linear, inputs: dict[str, Any]) -> Tensor:
    """What the model puts into its head, whose kind is `plain`."""
    with _passing_on(head) as given:
        hidden: Tensor = model(**inputs).logits
    if not _is_only(hidden, given):
        raise RuntimeError("the logits of the model are not those of its head, as they were when it was loaded")
    return hidden


def _is_only(logits: Any, given: list[Tensor]) -> bool:
    return len(given) == 1 and logits is given[0]


@contextmanager
def _passing_on(head: nn.Linear) -> Iterator[list[Tensor]]:
    """Inside, the head returns its input; gives the list of what it was given."""
    given: list[Tensor] = []

    def pass_on(hidden: Tensor) -> Tensor:
        given.append(hidden)
        return hidden

    forward = head.forward
    head.forward = pass_on  # type: ignore[assignment, method-assign]
    try:
        yield given
    finally:
        head.forward = forward  # type: ignore[method-assign]
