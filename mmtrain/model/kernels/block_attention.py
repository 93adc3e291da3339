"""Causal attention within the samples of a packed row on the CPU, a block of queries at a time.

torch's CPU kernel takes 512 keys at once, so for short samples it computes the half that a causal mask discards, and
its backward pass takes a sample in one piece. Here every block uses only the keys up to its own end. As in Dao et al.
2022, "FlashAttention", no probabilities are stored, only the logarithm of their sum for each query.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mmtrain.model.planned_device import computed

BLOCK = 64
"""Queries at a time: with fewer the products are too small, with more a larger share is masked."""
_LOG2E = math.log2(math.e)


class BlockAttention(torch.autograd.Function):
    """softmax(scale q k') v for each token over the tokens of its sample up to itself."""

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]  # it would round logits and sums to bfloat16
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, lengths: Sequence[int]) -> Tensor:
        """(1, tokens, heads, width) from query (1, heads, tokens, width), and key and value with a number of heads that
        divides the query's; `lengths` are those of the samples. Exponentials are to the base of 2, in float32."""
        (_, heads, tokens, width), groups = query.shape, key.shape[1]
        each = heads // groups
        queries = query[0].view(groups, each, tokens, width).transpose(1, 2).float().reshape(groups, -1, width)
        keys, values = (key[0].float() * (scale * _LOG2E)).contiguous(), value[0].float().contiguous()
        out = query.new_empty(1, tokens, heads, width)
        places = out.view(tokens, groups, each, width).transpose(0, 1)
        log_sums = queries.new_empty(groups, tokens * each, 1)
        future = _future(each)
        for start, first, end in computed(_blocks(lengths), _num_seen):
            rows, seen, own = slice(first * each, end * each), slice(start, end), end - first
            logits = torch.bmm(queries[:, rows], keys[:, seen].transpose(1, 2))
            logits[:, :, first - start :].add_(future[: own * each, :own])
            top = logits.amax(-1, keepdim=True)
            likely = logits.sub_(top).exp2_()
            total = likely.sum(-1, keepdim=True)
            log_sums[:, rows] = top.add_(total.log2())
            mixed = torch.bmm(likely, values[:, seen]).div_(total)
            places[:, first:end] = mixed.view(groups, own, each, width)
        ctx.save_for_backward(queries, keys, values, out, log_sums)
        ctx.scale, ctx.lengths = scale, lengths
        return out

    @staticmethod
    def backward(ctx: Any, *outers: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """With y the gradient of the result, p the probabilities and o = v' y their gradients, those of the logits are
        p (o - mean), where mean = sum(p o) is the product of the result and y."""
        queries, keys, values, out, log_sums = ctx.saved_tensors
        (_, tokens, heads, width), groups = out.shape, len(keys)
        each = heads // groups
        given = outers[0].float()
        outer, means = (
            value.view(tokens, groups, each, -1).transpose(0, 1).reshape(groups, tokens * each, -1)
            for value in (given, (given * out).sum(-1))
        )
        to_query = out.new_empty(1, tokens, heads, width)
        places = to_query.view(tokens, groups, each, width).transpose(0, 1)
        to_keys, to_values = torch.zeros_like(keys), torch.zeros_like(values)
        future = _future(each)
        for start, first, end in computed(_blocks(ctx.lengths), _num_seen):
            rows, seen, own = slice(first * each, end * each), slice(start, end), end - first
            logits = torch.bmm(queries[:, rows], keys[:, seen].transpose(1, 2))
            logits[:, :, first - start :].add_(future[: own * each, :own])
            likely = logits.sub_(log_sums[:, rows]).exp2_()
            to_logits = torch.bmm(outer[:, rows], values[:, seen].transpose(1, 2)).sub_(means[:, rows]).mul_(likely)
            to_values[:, seen].baddbmm_(likely.transpose(1, 2), outer[:, rows])
            to_keys[:, seen].baddbmm_(to_logits.transpose(1, 2), queries[:, rows], alpha=ctx.scale)
            to_queries = torch.bmm(to_logits, keys[:, seen]).view(groups, own, each, width)
            torch.mul(to_queries, 1 / _LOG2E, out=places[:, first:end])
        return to_query.transpose(1, 2), to_keys[None].to(out.dtype), to_values[None].to(out.dtype), None, None


def _future(each: int) -> Tensor:
    """(BLOCK * each, BLOCK) the causal mask of a block's queries at its own keys, added to the logits: -inf at later
    keys. The `each` heads of a query are next to each other."""
    return torch.full((BLOCK, BLOCK), -math.inf).triu(1).repeat_interleave(each, 0)


def _num_seen(block: tuple[int, int, int]) -> int:
    start, first, end = block
    return (end - start) * (end - first)


def _blocks(lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """For each block the start of its sample, its first query and its end."""
    start = 0
    for length in lengths:
        for first in range(start, start + length, BLOCK):
            yield start, first, min(first + BLOCK, start + length)
        start += length
