"""Tensors on their way to the device."""

import torch
from torch import Tensor


def on_device(value: Tensor, device: torch.device) -> Tensor:
    """`value`, of the CPU, there; without waiting for what the device does meanwhile."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)
