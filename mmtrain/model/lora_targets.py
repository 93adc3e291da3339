"""Which layers can have a LoRA adapter: found out, not known by family."""

from collections.abc import Iterable
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from mmtrain.model.quantized_weights import is_quantized


def is_linear(module: nn.Module) -> bool:
    """Whether `module` computes a linear layer and nothing else: routers of experts, for example, inherit from
    `nn.Linear` and return more than its output."""
    return isinstance(module, nn.Linear) and (type(module).forward is nn.Linear.forward or is_quantized(module))


def refused_by_peft(config: Any, names: Iterable[str]) -> list[str]:
    """Those of the linear layers `names` that peft gives no adapter in a model with this configuration, such as a
    layer whose weight a recurrent family takes in a kernel of its own, where an adapter would have no effect."""
    refused: dict[str, bool] = {}
    found = []
    for name in names:
        last = name.rpartition(".")[2]
        if last not in refused:
            refused[last] = not _takes_adapter(config, last)
        if refused[last]:
            found.append(name)
    return found


def _takes_adapter(config: Any, name: str) -> bool:
    """Tried on a module with this configuration and a layer of this name. The random state does not change: the initial
    weights of the real adapters follow from it."""
    probe = nn.Module()
    object.__setattr__(probe, "config", config)
    with torch.random.fork_rng([]):
        probe.add_module(name, nn.Linear(1, 1))
        try:
            inject_adapter_in_model(LoraConfig(target_modules=[name], r=1), probe)
        except ValueError:
            return False
    return True
