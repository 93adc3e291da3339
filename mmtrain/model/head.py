"""The head and the cross-entropy together, in blocks: logits exist for 512 tokens and 2,048 vocabulary entries at once.

With a frozen head only the gradient of its input is needed. It is (m - w) (1 - p), where p is the probability of the
target, w its row of the head's weight, and m the mean of all other rows, weighted by their softmax probabilities. m and
the softmax's sum are accumulated over the blocks as in Milakov and Gimelshein 2018, "Online normalizer calculation for
softmax", so nothing is computed twice and only one block is in memory. The target is left out of both sums: if it is
almost certain, the gradient would otherwise be the difference of two nearly equal rows, which bfloat16 rounds away.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import slice_logits_to_keep

from mmtrain.model.kernels.products import product
from mmtrain.model.planned_device import kind_of
from mmtrain.safe_text import error_line

TOKEN_BLOCK = 512
"""Tokens whose logits exist at once. With fewer, the weights are read more often, which is slow on the CPU."""
VOCABULARY_BLOCK = 2048
"""Vocabulary entries whose logits exist at once on the CPU, so that they stay in its cache; all of them elsewhere."""
_LOG2E = math.log2(math.e)

HeadKind = Literal["plain", "own"]
"""`plain`: the logits are the output of the head, a linear layer. `own`: the model changes them afterwards, such as
by a scale or a cap, or its head is of another kind."""


class FrozenHeadNLL(torch.autograd.Function):
    """Negative log-likelihoods under softmax(hidden @ weight.T + bias) with a frozen weight."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(n,) float32 nll and (n,) bool whether the target is the likeliest, computed only if no gradient is required,
        from hidden (n, width), weight (vocabulary, width) and targets (n,). The gradient of hidden is
        (softmax(logits) - onehot(target)) @ weight.
        """
        needs_gradient = ctx.needs_input_grad[0]
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        right = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        gradient = torch.empty_like(hidden) if needs_gradient else None
        for start in range(0, len(hidden), TOKEN_BLOCK):
            rows = slice(start, start + TOKEN_BLOCK)
            softmax = _Softmax(hidden[rows].to(weight.dtype), targets[rows, None], needs_gradient)
            for first in range(0, len(weight), size := _block_size(weight)):
                block = slice(first, first + size)
                softmax.add(weight[block], None if bias is None else bias[block], first)
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
    """The softmax over a vocabulary that is added block by block, for hidden states (n, width) and targets (n, 1). In
    float32, and to the base of 2, because the CPU computes exp2 in a third of the time of exp."""

    def __init__(self, hidden: Tensor, targets: Tensor, needs_gradient: bool) -> None:
        self._hidden, self._targets = hidden, targets
        # over all entries but the target: the highest logit, the first entry that has it, the sum of exp2(logit - top),
        # and the sum of the weight's rows times exp2(logit - top)
        self._top = hidden.new_full((len(hidden), 1), -math.inf, dtype=torch.float32)
        self._rival = torch.zeros_like(targets)
        self._total, self._at_target = torch.zeros_like(self._top), torch.zeros_like(self._top)
        self._sum = torch.zeros_like(hidden, dtype=torch.float32) if needs_gradient else None

    def add(self, weight: Tensor, bias: Tensor | None, first: int) -> None:
        """Add the vocabulary entries from `first` on, with their weight (size, width) and bias (size,)."""
        logits = product(self._hidden, weight, bias).float().mul_(_LOG2E)
        place = self._targets - first
        is_here, place = (place >= 0) & (place < len(weight)), place.clamp(0, len(weight) - 1)
        at_place = logits.gather(-1, place)
        self._at_target = torch.where(is_here, at_place, self._at_target)
        logits.scatter_(-1, place, at_place.masked_fill(is_here, -math.inf))
        if self._sum is None:
            highest, entry = logits.max(-1, keepdim=True)
            self._rival = torch.where(highest > self._top, entry + first, self._rival)
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
        """(n,) whether the target is the likeliest, if no gradient is required; of equal logits the first counts."""
        is_first = (self._at_target == self._top) & (self._targets < self._rival)
        return ((self._at_target > self._top) | is_first)[:, 0]

    def gradient(self, target_rows: Tensor) -> Tensor:
        """(n, width) the gradient of the nll, if it is required, from the weight's rows of the targets (n, width)."""
        assert self._sum is not None
        return torch.sigmoid(self._odds) * (self._sum / self._total - target_rows)

    @property
    def _odds(self) -> Tensor:
        """(n, 1) the log odds against the target: p = 1 / (1 + e^odds)."""
        return (self._total.log2() + self._top - self._at_target) / _LOG2E


def _block_size(weight: Tensor) -> int:
    return VOCABULARY_BLOCK if kind_of(weight.device) == "cpu" else len(weight)


def frozen_head(model: Any) -> nn.Linear | None:
    """The model's head if it is a linear layer that is not being trained, None otherwise."""
    head = model.get_output_embeddings()
    is_trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in head.parameters())
    return head if type(head) is nn.Linear and not is_trained else None


@torch.no_grad()
def find_head_kind(model: Any, say: Callable[[str], None]) -> HeadKind:
    """The kind of the model's head, tried on one token. Call it on the model as it was loaded.

    If the model does not run on one text token, the kind is `own`, which is slower but right for every model, and `say`
    prints one line.
    """
    head, device = model.get_output_embeddings(), model.device
    if type(head) is not nn.Linear:
        return "own"
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), _passing_on(head) as given:
        try:
            logits = model(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False).logits
        except Exception as error:  # a family that requires more than text can raise anything
            say(f"head: all logits at once, the model fails on one token: {error_line(error)}")
            return "own"
    return "plain" if _is_only(logits, given) else "own"


def before_head(model: Any, head: nn.Linear, inputs: dict[str, Any]) -> Tensor:
    """The input of the model's head, whose kind is `plain`."""
    with _passing_on(head) as given:
        hidden: Tensor = model(**inputs).logits
    if not _is_only(hidden, given):
        raise RuntimeError(
            "the logits of the model are no longer the output of its head, as they were when it was loaded"
        )
    return hidden


def hidden_states(model: Any, inputs: dict[str, Any]) -> Tensor:
    """(num_kept, width) the input of the model's head, of any kind, at the positions `logits_to_keep` in `inputs`; the
    head itself is not computed."""
    with _passing_on(model.get_output_embeddings()) as given:
        model(**inputs)
    return given[-1].flatten(0, -2)


def _is_only(logits: Any, given: list[Tensor]) -> bool:
    return len(given) == 1 and logits is given[0]


@contextmanager
def _passing_on(head: nn.Linear) -> Iterator[list[Tensor]]:
    """Inside, the head returns its input unchanged. Yields the list of these inputs."""
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


def accept_positions(model: Any) -> None:
    """Give a model whose forward has no `logits_to_keep` that argument: its head then gets the hidden states of these
    positions alone, as in other families of transformers."""
    own = model.forward
    if "logits_to_keep" in inspect.signature(own).parameters:
        return

    @functools.wraps(own)
    def forward(*args: Any, logits_to_keep: int | Tensor = 0, **inputs: Any) -> Any:
        def select(_: nn.Module, hidden: tuple[Tensor]) -> Tensor:
            kept: Tensor = slice_logits_to_keep(hidden[0], logits_to_keep)
            return kept

        hook = model.get_output_embeddings().register_forward_pre_hook(select)  # adapters may have replaced it
        try:
            return own(*args, **inputs)
        finally:
            hook.remove()

    model.forward = forward
