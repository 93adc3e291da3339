"""Attention kernels of CUDA, which a build of torch without CUDA lacks: what they take, and what they compute.

The formulas are the plain ones: softmax(q k' s) v, its logarithm of the sum, and the gradients by hand.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen as _registers  # noqa: F401

_aten: Any = torch.ops.aten
_varlen: Any = torch.ops.torch_attn
_MATH, _FLASH, _EFFICIENT = 0, 1, 2
_HALF = (torch.float16, torch.bfloat16)


def _is_flash(query: Tensor, key: Tensor, value: Tensor) -> bool:
    width = query.shape[-1]
    is_half = query.dtype in _HALF and key.dtype == value.dtype == query.dtype
    return is_half and width <= 256 and width % 8 == 0 and value.shape[-1] == width


def _refuse(query: Tensor, key: Tensor, value: Tensor) -> None:
    """As FlashAttention does."""
    if torch.cuda.get_device_capability() < (8, 0):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer")
    if not _is_flash(query, key, value):
        raise RuntimeError(
            f"FlashAttention takes fp16 and bf16 of one type, and one width up to 256 that is a multiple of 8: "
            f"{query.dtype} {key.dtype} {value.dtype}, {query.shape[-1]} {value.shape[-1]}"
        )


def _choose(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> int:
    if mask is None and _is_flash(query, key, value) and torch.cuda.get_device_capability() >= (8, 0):
        return _FLASH
    return _MATH if query.shape[-3] != key.shape[-3] or query.dtype == torch.float64 else _EFFICIENT


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None) -> tuple[Any, ...]:
    """Result, logarithm of the sum and probabilities of (..., heads, length, width), in float32."""
    groups = query.shape[-3] // key.shape[-3]
    q, k, v = query.float(), *(t.float().repeat_interleave(groups, -3) for t in (key, value))
    scores = q @ k.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if bias is None else scores + bias
    probabilities = torch.nan_to_num(scores.softmax(-1))  # a row of padding sees nothing
    return (probabilities @ v).to(query.dtype), scores.logsumexp(-1), probabilities


def _gradients(
    outer: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    groups, factor = query.shape[-3] // key.shape[-3], query.shape[-1] ** -0.5 if scale is None else scale
    probabilities = _attend(query, key, value, bias, scale)[2]
    q, y, k, v = query.float(), outer.float(), *(t.float().repeat_interleave(groups, -3) for t in (key, value))
    to_probabilities = y @ v.transpose(-1, -2)
    along = (to_probabilities * probabilities).sum(-1, keepdim=True)
    to_scores = probabilities * (to_probabilities - along) * factor
    to_key, to_value = to_scores.transpose(-1, -2) @ q, probabilities.transpose(-1, -2) @ y
    to_key, to_value = (t.unflatten(-3, (-1, groups)).sum(-3) for t in (to_key, to_value))
    return (to_scores @ k).to(query.dtype), to_key.to(key.dtype), to_value.to(value.dtype)


def _causal(query: Tensor, key: Tensor, is_causal: bool) -> Tensor | None:
    if not is_causal:
        return None
    return torch.full((query.shape[-2], key.shape[-2]), -math.inf).triu(1)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float = 0.0,
    is_causal: bool = False,
    debug: bool = False,
    scale: float | None = None,
) -> tuple[Any, ...]:
    _refuse(query, key, value)
    out, logsumexp, _ = _attend(query, key, value, _causal(query, key, is_causal), scale)
    empty = torch.empty(0)
    return out, logsumexp, empty, empty, query.shape[-2], key.shape[-2], empty, empty, empty


def _flash_backward(outer: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any, scale: Any = None) -> Any:
    return _gradients(outer, query, key, value, _causal(query, key, others[7]), scale)


def _efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    compute_logsumexp: bool,
    dropout: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    out, logsumexp, _ = _attend(query, key, value, _added(bias, query, key, is_causal), scale)
    return out, logsumexp, torch.empty(0), torch.empty(0)


def _efficient_backward(
    outer: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *others: Any, scale: Any = None
) -> tuple[Tensor | None, ...]:
    is_causal = others[6] if len(others) > 6 else False
    return *_gradients(outer, query, key, value, _added(bias, query, key, is_causal), scale), None


def _added(bias: Tensor | None, query: Tensor, key: Tensor, is_causal: bool) -> Tensor | None:
    causal = _causal(query, key, is_causal)
    if bias is None or causal is None:
        return causal if bias is None else bias.float()
    return bias.float() + causal


def _samples(ends: Tensor, window: list[int], *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """Each sample's (heads, length, width) of (tokens, heads, width), what its tokens see, and where it lies."""
    left, right = window
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)
        sees = (back >= -right if right >= 0 else True) & (back <= left if left >= 0 else torch.tensor(True))
        bias = torch.zeros(end - start, end - start).masked_fill(~sees, -math.inf)
        yield *(tensor[start:end].transpose(0, 1) for tensor in tensors), bias, slice(start, end)


def _rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    key_ends: Tensor,
    longest: int,
    longest_key: int,
    is_causal: bool = False,
    scale: float | None = None,
    window: list[int] | None = None,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    _refuse(query, key, value)
    assert longest == longest_key == int(ends.diff().max())
    assert int(ends[-1]) == len(query)
    out, logsumexp = torch.empty_like(query), torch.empty(query.shape[1], len(query))
    for q, k, v, bias, where in _samples(ends, window or [-1, -1], query, key, value):
        own, logsumexp[:, where], _ = _attend(q, k, v, bias, scale)
        out[where] = own.transpose(0, 1)
    return out, logsumexp, torch.zeros(2, dtype=torch.uint64)


def _rows_backward(
    outer: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, ends: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    scale, window = (*others[5:], None, None)[:2]
    found = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
    for y, q, k, v, bias, where in _samples(ends, window or [-1, -1], outer, query, key, value):
        for to, own in zip(found, _gradients(y, q, k, v, bias, scale), strict=True):
            to[where] = own.transpose(0, 1)
    return found


@torch.library.custom_op("fake_cuda::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) times a weight of the same type, and 1 / rms(x): one kernel on CUDA."""
    assert x.dtype == weight.dtype
    inverse = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    return (x.float() * inverse * weight.float()).to(x.dtype), inverse


@torch.library.custom_op("fake_cuda::rms_norm_backward", mutates_args=())
def _rms_norm_backward(outer: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    normed, scaled = x.float() * inverse, outer.float() * weight.float()
    to_x = inverse * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return to_x.to(x.dtype), (outer.float() * normed).flatten(0, -2).sum(0).to(weight.dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _backward(ctx: Any, outer: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_rms_norm_backward(outer, *ctx.saved_tensors), None


_rms_norm.register_autograd(_backward, setup_context=_keep)
LIBRARY = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
"""What a build without CUDA takes apart and one with CUDA does not."""


def _as_one_kernel(x: Tensor, shape: list[int], weight: Tensor, eps: float) -> Tensor:
    out: Tensor = _rms_norm(x, weight, eps)[0]
    return out


LIBRARY.impl("rms_norm", _as_one_kernel, "AutogradCUDA")  # type: ignore[no-untyped-call]


KERNELS: dict[Any, Callable[..., Any]] = {
    _aten._fused_sdp_choice.default: _choose,
    _aten._scaled_dot_product_flash_attention.default: _flash,
    _aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    _aten._scaled_dot_product_efficient_attention.default: _efficient,
    _aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    _varlen._varlen_attn.default: _rows,
    _varlen._varlen_attn_backward.default: _rows_backward,
}
"""Given tensors of the CPU."""
