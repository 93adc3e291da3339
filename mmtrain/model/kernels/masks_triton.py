"""`Mask.drop` in one pass over a tensor on a GPU. To be imported only where Triton is installed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 256
"""Counters of a row that one program takes."""


@triton.jit(do_not_specialize=["key", "step", "threshold"])  # type: ignore[untyped-decorator]
def _drop(x, out, origins, key, step, threshold, scale, width, num_blocks, BLOCK: tl.constexpr, NUMBERS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sample, position = tl.load(origins + 2 * row), tl.load(origins + 2 * row + 1)
    counter = 1 + block + position * num_blocks
    zero = tl.zeros_like(counter)  # all words of a counter must be of 64 bits
    words = tl.philox(key, counter, zero + sample, zero + step, zero)
    for n in tl.static_range(NUMBERS):
        number = (words[n // 4] >> (16 * (n % 4))) & 0xFFFF
        value = block + n * num_blocks
        inside = (block < num_blocks) & (value < width)
        kept = (number.to(tl.int32) >= threshold) | (sample < 0)
        given = tl.load(x + row * width + value, mask=inside)
        result = tl.where(kept, given.to(tl.float32) * scale, 0.0)
        tl.store(out + row * width + value, result.to(out.dtype.element_ty), mask=inside)


def drop(x: Tensor, origins: Tensor, key: int, step: int, threshold: int, scale: float, per_counter: int) -> Tensor:
    """x (rows, width) with values dropped; `origins` (rows, 2) int64, the sample and position of each row."""
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    num_blocks = triton.cdiv(x.shape[1], per_counter)
    grid = (len(x), triton.cdiv(num_blocks, _BLOCK))
    _drop[grid](x, out, origins, key, step, threshold, scale, x.shape[1], num_blocks, _BLOCK, per_counter)
    return out
