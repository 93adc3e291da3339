"""Attention within the samples of a packed row: no token attends to another sample, and no such scores are computed.

It is registered with transformers as an attention function. A packed row uses `varlen_attn` on CUDA if that kernel
supports it, blocks on the CPU, and one call per sample otherwise. The cost is the sum of the squared lengths of the
samples, not the square of their sum. Padded rows use transformers' `sdpa`.

The borders of the samples are an argument of the model's forward, `packed_row`. transformers passes keywords that a
model does not know on to every layer and its attention, also under activation checkpointing. In a family that drops
them, tokens would attend across samples: `packing_trial` detects this, and its rows are padded.
"""

import inspect
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mmtrain.dataset.batch import Batch
from mmtrain.model.components import decoder_of
from mmtrain.model.kernels.block_attention import BlockAttention
from mmtrain.model.planned_device import kind_of, planned_kernels
from mmtrain.model.transfer import on_device

NAME = "mmtrain_segments"
KEYWORD = "packed_row"
"""The argument of the model's forward for a `PackedRow`."""
_KINDS = {"full_attention", "sliding_attention"}
_HAS_GQA_FLAG = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""torch 2.11 has no such argument: its kernel takes fewer key heads than query heads as they come."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedRow:
    """The borders of the samples in a packed row."""

    lengths: tuple[int, ...]
    """Tokens of each sample, in order, and of the padding at the end of the row."""
    ends: Tensor | None = None
    """(len(lengths) + 1,) int32, on the row's device: 0, then the end of each sample. None if the device has no
    variable-length kernel."""
    predicting: Tensor | None = None
    """(num_supervised,) the positions at which the output of the last layer is used; None: all."""

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> Self:
        """The row of a packed batch, for a model on `device`."""
        lengths = _lengths(batch)
        if not has_varlen(device):
            return cls(lengths)
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(lengths, on_device(ends, device))


def _lengths(batch: Batch) -> tuple[int, ...]:
    padding = batch.input_ids.shape[1] - batch.num_tokens
    return (*(segment.length for segment in batch.segments), *([padding] if padding else []))


def has_varlen(device: torch.device) -> bool:
    """Whether `device` has torch's variable-length kernel."""
    if planned_kernels() is not None:
        return True
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def install_attention(model: Any) -> bool:
    """Give the language model attention by samples. Returns False if its attention is of a kind that this cannot
    replace."""
    decoder = decoder_of(model)
    config = decoder.config
    if config._attn_implementation == NAME:
        return True
    kinds = set(getattr(config, "layer_types", None) or ())
    if config._attn_implementation != "sdpa" or not kinds <= _KINDS:
        return False
    decoder.set_attn_implementation(NAME)
    return True


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the borders of the samples differ in every row and would be compiled in
def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_row: PackedRow | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(1, length, heads, width) from query (1, heads, length, width) and key, value (1, key heads, length, width)."""
    if packed_row is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        return out, None
    lengths = packed_row.lengths
    if sum(lengths) != query.shape[2]:
        raise RuntimeError(f"{query.shape[2]} tokens in a row whose samples have {sum(lengths)}")
    if attention_mask is not None and attention_mask.numel() > 1:
        raise RuntimeError("the model makes a mask of its own for its attention")
    window = kwargs.get("sliding_window")
    if packed_row.ends is not None:
        query, key, value = autocast(query, key, value)
        if fits_varlen(query, key, value):
            seen = (-1 if window is None else window - 1, 0)
            return varlen(query, key, value, packed_row.ends, max(lengths), scaling, seen), None
    if _in_blocks(query, value) and (window is None or max(lengths) <= window):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return BlockAttention.apply(query, key, value, scale, lengths), None  # type: ignore[no-untyped-call]
    parts = zip(*(torch.split(tensor, list(lengths), dim=2) for tensor in (query, key, value)), strict=True)
    out = torch.cat([_causal(q, k, v, scaling, window) for q, k, v in parts], dim=2)
    return out.transpose(1, 2).contiguous(), None


def fits_varlen(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `varlen_attn` supports these tensors: one 16-bit type, and one head width, at most 256 and a multiple of
    8, but not from 200 to 224, whose backward pass some GPUs lack (8.6, 8.9 and 12.x)."""
    width, dtype = query.shape[-1], query.dtype
    is_narrow = dtype in (torch.float16, torch.bfloat16) and (width <= 192 or 224 < width <= 256) and width % 8 == 0
    return is_narrow and key.dtype == value.dtype == dtype and value.shape[-1] == width


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as autocast casts the inputs of torch's attention; it does not know `varlen_attn`."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


def _in_blocks(query: Tensor, value: Tensor) -> bool:
    is_wide_enough = query.dtype in (torch.float32, torch.bfloat16)
    return kind_of(query.device) == "cpu" and is_wide_enough and query.shape[-1] == value.shape[-1]


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """One sample. With a sliding window a token attends to itself and the `window` - 1 tokens before it.

    On CUDA the float32 kernel that stores no probabilities takes as many key heads as query heads.
    """
    length = query.shape[2]
    key, value = (repeat_kv(tensor, query.shape[1] // tensor.shape[1]) for tensor in (key, value))
    if window is None or length <= window:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    back = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)
    mask = (back >= 0) & (back < window)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    longest: int,
    scaling: float | None,
    window: tuple[int, int] = (-1, -1),
) -> Tensor:
    """(1, length, heads, width) `varlen_attn` of query (1, heads, length, width), key and value (1, key heads, length,
    width), within the stretches between `ends` (1 + stretches,) int32; `window`: how many tokens before and after are
    seen, -1 all."""
    grouped: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if _HAS_GQA_FLAG else {}
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=window, **grouped)
    assert isinstance(out, Tensor)
    return out[None]


def _mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """None for a packed row, which is given no mask; sdpa's mask for padded rows."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
