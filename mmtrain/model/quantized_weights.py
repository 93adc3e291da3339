"""Weights that are stored in 4 bits: which ones, how many and how large.

A quantized parameter of bitsandbytes stores two weights in a byte; its `quant_state` has the shape and the scales.
"""

import math

import torch
from torch import Tensor, nn


def is_quantized(module: nn.Module) -> bool:
    """Whether the weight of a linear layer is stored in 4 bits."""
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


def num_weights(parameter: Tensor) -> int:
    """How many weights a parameter stores: of a quantized one, `numel()` counts the bytes."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(math.prod(state.shape))


def dtype_of(parameter: Tensor) -> torch.dtype:
    """The type of a parameter's values: of a quantized one, the type that they are converted back to."""
    state = getattr(parameter, "quant_state", None)
    found: torch.dtype = parameter.dtype if state is None else state.dtype
    return found


def num_bytes(parameter: Tensor) -> int:
    """Bytes of a parameter in memory, with the scales of a quantized one."""
    state = getattr(parameter, "quant_state", None)
    scales: tuple[Tensor, ...] = () if state is None else (state.absmax, state.state2.absmax)
    return parameter.numel() * parameter.element_size() + sum(tensor.nbytes for tensor in scales)
