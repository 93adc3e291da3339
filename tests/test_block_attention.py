"""Attention in blocks against softmax written out in float64, over samples of less and more than a block."""

import pytest
import torch
from torch import Tensor

from mmtrain.model.kernels.block_attention import BLOCK, BlockAttention

LENGTHS = (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 22)


def written_out(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """(1, tokens, heads, width), sample by sample and head by head."""
    each = query.shape[1] // key.shape[1]
    samples, start = [], 0
    for length in LENGTHS:
        own, start = slice(start, start + length), start + length
        heads = []
        for head in range(query.shape[1]):
            logits = scale * query[0, head, own] @ key[0, head // each, own].T
            seen = torch.ones(length, length).tril().bool()
            heads.append(logits.masked_fill(~seen, float("-inf")).softmax(-1) @ value[0, head // each, own])
        samples.append(torch.stack(heads, dim=1))
    return torch.cat(samples)[None]


def tensors(key_heads: int, size: float = 1.0) -> list[Tensor]:
    torch.manual_seed(0)
    total = sum(LENGTHS)
    queries = size * torch.randn(1, total, 4, 16).transpose(1, 2)  # laid out as projections leave them
    return [queries, *(torch.randn(1, total, key_heads, 16).transpose(1, 2) for _ in range(2))]


def blocks(*tensors: Tensor) -> Tensor:
    out: Tensor = BlockAttention.apply(*tensors, 0.25, LENGTHS)  # type: ignore[no-untyped-call]
    return out


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("size", [1.0, 300.0])
def test_blocks_give_what_is_written_out(key_heads: int, size: float) -> None:
    """Also where a later key would win by hundreds: what is masked must not overflow."""
    found, expected = (
        [tensor.to(dtype).requires_grad_() for tensor in tensors(key_heads, size)]
        for dtype in (torch.float32, torch.float64)
    )
    own = blocks(*found)
    query, key, value = expected
    reference = written_out(query, key, value, 0.25)
    tolerance = 2e-6 * size  # measured: 9e-7, and 1e-4 where the logits are 300 times as large
    assert own.shape == reference.shape
    assert torch.allclose(own.double(), reference, atol=tolerance)
    outer = torch.randn(own.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(own, found, outer)
    for gradient, other in zip(gradients, torch.autograd.grad(reference, expected, outer.double()), strict=True):
        assert torch.isfinite(gradient).all()
        assert float((gradient - other).norm() / other.norm()) < tolerance


def test_no_token_sees_a_later_one_or_another_sample() -> None:
    query, key, value = tensors(2)
    before = blocks(query, key, value)
    place = LENGTHS[0] + LENGTHS[1] + 10  # in the third sample
    for tensor in (query, key, value):
        tensor[:, :, place] += 5.0
    changed = (blocks(query, key, value) != before).any(-1).any(-1)[0]
    assert changed.nonzero()[:, 0].tolist() == list(range(place, sum(LENGTHS[:3])))


@pytest.mark.parametrize("under_autocast", [False, True])
def test_in_bfloat16_only_what_goes_in_and_comes_out_is_rounded(under_autocast: bool) -> None:
    found, expected = (
        [tensor.bfloat16().to(dtype).requires_grad_() for tensor in tensors(2)]
        for dtype in (torch.bfloat16, torch.float64)
    )
    query, key, value = expected
    with torch.autocast("cpu", torch.bfloat16, enabled=under_autocast):
        own = blocks(*found)
    reference = written_out(query, key, value, 0.25)
    outer = torch.randn(own.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    gradients = torch.autograd.grad(own, found, outer)
    others = torch.autograd.grad(reference, expected, outer.double())
    for value, other in zip((own.detach(), *gradients), (reference.detach(), *others), strict=True):
        assert value.dtype == torch.bfloat16
        assert float((value - other).norm() / other.norm()) < 2**-8  # measured: 0.002, half a unit of the last place
