"""Installs kernels in a model, wherever one passes its trial."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmtrain.model.components import decoder_of
from mmtrain.model.kernels.compiled import description
from mmtrain.model.kernels.fused import ComputedByMLP, Fused, fuse_mlps
from mmtrain.model.kernels.gated import gated_kernels
from mmtrain.model.kernels.linear import linear_kernel
from mmtrain.model.kernels.norms import RMSNorm, norm_kernels
from mmtrain.model.kernels.patches import patch_kernel
from mmtrain.model.kernels.rotary import CompiledRotary, compile_rotary
from mmtrain.model.kernels.trial import Kernel, Trials, kernel_of, layer_of
from mmtrain.model.kernels.ungated import ungated_kernels


@dataclass(frozen=True, slots=True)
class KernelReport:
    """How many modules of a model use kernels."""

    num_layers: int
    """Layers of the language model, or of a dual encoder's text tower; 0 where it does not say."""
    num_fused: int
    """Layers whose MLP is one function, together with the norm before it if there is one."""
    num_norms: int
    num_others: int
    """Linear layers, adapters, MLPs, gates and convolutions."""
    num_rotary: int = 0
    """Attention modules whose rotary embedding is compiled."""
    compiling: str = ""
    """Whether norms and gates are compiled, or why not; empty on a device where they are not meant to be."""

    @property
    def line(self) -> str:
        """One line for the start of a run."""
        if not self.num_fused + self.num_norms + self.num_rotary + self.num_others:
            return "kernels: none fits this model"
        rotary = f"{self.num_rotary} rotary embeddings, " if self.num_rotary else ""
        layers = f"{self.num_fused} of {self.num_layers} layers, " if self.num_fused else ""
        return (
            f"kernels: {layers}{self.num_norms} norms, {rotary}"
            f"{self.num_others} other modules{self.compiling and f'; {self.compiling}'}"
        )


def install(model: Any, device: torch.device | None = None, tick: Callable[[], None] = lambda: None) -> KernelReport:
    """Replace forwards that read and write memory more often than necessary, wherever a trial shows that the kernel
    computes the same. Call it after adapters and dropout are installed, on `device`, which runs the model (None: where
    it is). Sharded weights move there later; then the kernels are tried where they are now. `tick` is called after each
    trial.

    Parameters, gradients and random state do not change. A trial that fails leaves its module unchanged and never
    raises. A second call changes nothing.
    """
    trials = Trials(tick)
    for module in model.modules():
        for kernel in _candidates(module):
            if trials.install(module, {"": kernel}, (kernel.example(module),)):
                break
    fuse_mlps(decoder_of(model), trials)
    compile_rotary(decoder_of(model), trials)
    return _report(model, next(model.parameters()).device if device is None else device)


def _candidates(module: nn.Module) -> Iterator[Kernel]:
    if kernel_of(module) is None:
        single = (linear_kernel(module), patch_kernel(module))
        yield from itertools.chain(
            filter(None, single), gated_kernels(module), ungated_kernels(module), norm_kernels(module)
        )


def _report(model: Any, device: torch.device) -> KernelReport:
    decoder = decoder_of(model)
    kernels = [kernel for module in model.modules() if (kernel := kernel_of(module)) is not None]
    fused = [name for name, module in decoder.named_modules() if isinstance(kernel_of(module), Fused)]
    num_norms = sum(isinstance(kernel, RMSNorm | ComputedByMLP) for kernel in kernels)
    num_rotary = sum(isinstance(kernel, CompiledRotary) for kernel in kernels)
    return KernelReport(
        num_layers=getattr(decoder.config, "num_hidden_layers", 0),
        num_fused=len({layer_of(name) for name in fused}),
        num_norms=num_norms,
        num_others=len(kernels) - num_norms - num_rotary - len(fused),
        num_rotary=num_rotary,
        compiling=description(device),
    )
