"""Copies between the CPU and a device that do not wait for what the device still has to do."""

from typing import Any

import torch
from torch import Tensor


def on_device(value: Tensor, device: torch.device) -> Tensor:
    """`value`, on the CPU, copied to `device`; from page-locked memory, or the copy would wait."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


def all_on_device(values: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """`values` with every tensor among them on `device`."""
    return {name: on_device(v, device) if isinstance(v, Tensor) else v for name, v in values.items()}


class PinnedMemory:
    """Page-locked memory that is never given back, in large blocks: torch rounds single tensors up to powers of 2."""

    _BLOCK = 2**26
    _ALIGNED = 64

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def copy_of(self, value: Tensor) -> Tensor:
        """A copy of `value`, which is on a GPU. It is complete when the GPU has finished its pending work: later copies
        from here to that GPU come after that, but to read it on the CPU the program must wait for the GPU."""
        start = -(-self._used // self._ALIGNED) * self._ALIGNED
        if start + value.nbytes > len(self._block):
            self._block, start = torch.empty(max(self._BLOCK, value.nbytes), dtype=torch.uint8).pin_memory(), 0
        self._used = start + value.nbytes
        own = self._block[start : self._used].view(value.dtype).view(value.shape)
        return own.copy_(value, non_blocking=True)
