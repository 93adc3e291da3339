"""The one way to load a model for use: the base model on its device, and the adapter on it."""

from collections.abc import Callable
from typing import Any

import torch

from mmtrain.config import Config
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.model.adapter import load_adapter, read_adapter
from mmtrain.model.load import load_model, load_weights
from mmtrain.model.named_model import NamedModel
from mmtrain.runtime.device import loading_faults
from mmtrain.runtime.processes import Runtime

_CPU = torch.device("cpu")


def load_named(
    named: NamedModel,
    processor: ChatProcessor | None,
    device: torch.device = _CPU,
    tick: Callable[[], None] = lambda: None,
) -> Any:
    """The model of `named`, with its adapter if it has one, on `device`. `processor`: None for a dual encoder, which
    has no chats. `tick` is called as weights are read.

    Raises what `load_model`, `read_adapter` and `load_adapter` raise, and DeviceMemoryError.
    """
    adapter = None if named.adapter is None else read_adapter(named.adapter)
    with loading_faults():
        if processor is None:
            model = load_weights(named.path, named.dtype, device, tick)
        else:
            model = load_model(named.path, named.dtype, processor, device, tick, named.quantization, named.components)
        return model if adapter is None else load_adapter(model, adapter)


def load_base(
    config: Config, processor: ChatProcessor | None, runtime: Runtime, device: torch.device | None = None
) -> Any:
    """The base model of a config on `device`, by default that of `runtime`. Raises what `load_named` raises."""
    return load_named(NamedModel.of(config), processor, device or runtime.device, runtime.activity.tick)
