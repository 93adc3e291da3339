"""Weights sharded over the processes by torch's FSDP2, for what does not fit on one device.

Every process must run the same modules the same number of times: one that has fewer micro-batches, or none with an
image, computes samples without weight (`WithFiller`).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mmtrain.dataset.samples import StoredSamples
from mmtrain.dataset.validate import CheckedSamples
from mmtrain.encoding.encode import Encoded
from mmtrain.model.quantized_weights import num_bytes
from mmtrain.records.sources.place import Place

FILLER = -1
"""The number of the sample without weight."""


def shard(root: nn.Module, device: torch.device) -> None:
    """Shard `root`'s weights over all processes: each repeated block by itself, the rest together.

    Gradients are summed, not averaged, as the loss is a sum. Only what runs inside `root`'s forward sees whole weights.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in repeated_blocks(root):
        fully_shard(block, mesh=mesh)
    fully_shard(root, mesh=mesh)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other


def reshard(root: nn.Module) -> None:
    """Free the whole weights that a forward pass of sharded ones left, so that the next one gathers them again.

    Without a backward pass after it FSDP2 keeps some, which do not change when the weights do.
    """
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The outermost repeated blocks. What is nested in them, such as experts, may not run on every process."""
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            found += [block for block in child if any(True for _ in block.parameters())]
        else:
            found += repeated_blocks(child)
    return found


def whole(value: Tensor) -> Tensor:
    """`value` with the shards of the other processes; they must call this too."""
    # what full_tensor gives may still be on its way, and safetensors would read memory that is not there yet
    return value.full_tensor().clone() if isinstance(value, DTensor) else value


def share(value: Tensor, like: Tensor) -> Tensor:
    """This process's shard of `value`, a tensor that every process has whole, where `like` is sharded."""
    if not isinstance(like, DTensor):
        return value.to(like.device)
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def own_and_total_bytes(model: Any) -> tuple[int, int]:
    """Bytes of this process's shard of the weights, and of all weights."""
    parameters = list(model.parameters())
    own = sum(num_bytes(p.to_local() if isinstance(p, DTensor) else p) for p in parameters)
    return own, sum(map(num_bytes, parameters))


class WithFiller:
    """A set of samples with one more, `FILLER`, that has images if any sample has, and no supervised token."""

    def __init__(self, samples: StoredSamples, checked: CheckedSamples) -> None:
        self._samples = samples
        self._has_images = checked.num_image_tokens > 0
        self._images_needed = bool(self._has_images.any())
        candidates = np.flatnonzero(self._has_images) if self._images_needed else checked.used
        self._filler = int(candidates[checked.num_tokens[candidates].argmin()])

    def fill(self, cut: Sequence[int]) -> tuple[int, ...]:
        """The micro-batch, with the filler where it has no sample, or no image and others may have one."""
        enough = any(self._has_images[i] for i in cut) if self._images_needed else bool(cut)
        return tuple(cut) if enough else (*cut, FILLER)

    def encoded(self, index: int) -> Encoded:
        if index != FILLER:
            return self._samples.encoded(index)
        sample = self._samples.encoded(self._filler)
        return replace(sample, supervised=np.zeros_like(sample.supervised), weights=())

    def place(self, index: int) -> Place:
        return self._samples.place(self._filler if index == FILLER else index)
