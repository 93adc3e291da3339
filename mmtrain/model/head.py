"""The head and the cross-entropy together, in chunks: logits never exist for more than 512 tokens.

For a frozen head only the gradient of its input is kept: it is known as soon as the logits are, so nothing is computed
twice and the logits are gone before the next chunk.
"""

from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 512
"""Tokens whose logits exist at once. With fewer the weights are fetched more often, which the CPU feels."""


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
        buffer = weight.new_empty(min(CHUNK, len(hidden)), len(weight))
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            logits = _logits(hidden[rows].to(weight.dtype), weight, bias, buffer)
            own = targets[rows, None]
            if gradient is None:
                right[rows] = logits.argmax(-1) == targets[rows]
            top = logits.amax(-1, keepdim=True)
            at_target = logits.gather(-1, own) - top
            likely = logits.sub_(top).exp_()
            total = likely.sum(-1, keepdim=True)
            nll[rows] = (total.log() - at_target)[:, 0]
            if gradient is not None:
                likely.div_(total).scatter_add_(-1, own, likely.new_full(own.shape, -1.0))
                gradient[rows] = likely.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(right)
        return nll, right

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0][:, None].to(gradient.dtype), None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """(n, vocabulary) float32; written into `buffer`, as the allocator would clear new memory for every chunk."""
    logits = torch.mm(hidden, weight.t(), out=buffer[: len(hidden)])
    return (logits if bias is None else logits.add_(bias)).float()


def frozen_head(model: Any) -> nn.Linear | None:
    """The model's head where it is a linear layer that does not learn now, None otherwise."""
    head = model.get_output_embeddings()
    learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in head.parameters())
    return head if type(head) is nn.Linear and not learns else None


def before_head(model: Any, head: nn.Linear, inputs: dict[str, Any]) -> Tensor | None:
    """What the model puts into its head; None where it does more with the logits than to give them (a scale, a cap)."""
    seen: list[Tensor] = []

    def pass_on(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden

    forward = head.forward
    head.forward = pass_on  # type: ignore[assignment, method-assign]
    try:
        given = model(**inputs).logits
    finally:
        head.forward = forward  # type: ignore[method-assign]
    return given if len(seen) == 1 and given is seen[0] else None
