"""The weights of a merged model: merged in float32, and cast once."""

import warnings
from collections import Counter
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.utils.logging import ERROR, get_verbosity, set_verbosity

from mmtrain.errors import UserError
from mmtrain.safe_text import one_line


def dequantized(model: Any) -> Any:
    """`model`, which was quantized while it was loaded, with plain linear layers of the values it computes with."""
    verbosity = get_verbosity()
    set_verbosity(ERROR)
    try:
        return model.dequantize(torch.float32).requires_grad_(False)
    finally:
        set_verbosity(verbosity)


def untie(model: PeftModel) -> list[str]:
    """Give every adapted layer a weight of its own, and return the names of those that shared it.

    A head that is tied to the embeddings shares its weight with them. Merging an adapter of one would change the other.
    """
    modules = dict(model.named_modules())
    uses = Counter(id(weight) for module in modules.values() for weight in module.parameters(recurse=False))
    names = []
    for name, module in modules.items():
        if not isinstance(module, BaseTunerLayer):
            continue
        layer, key = module.get_base_layer(), module.parameter_name if isinstance(module, ParamWrapper) else "weight"
        weight = getattr(layer, key)
        if uses[id(weight)] > 1:
            uses[id(weight)] -= 1
            setattr(layer, key, nn.Parameter(weight.detach().clone(), requires_grad=False))
            names.append(name.removeprefix("base_model.model."))
    return names


def merge_weights(model: PeftModel) -> Any:
    """The base model with the adapter, and the components trained in full, in its weights. `model` is used up.

    Raises UserError if peft cannot merge the adapter, or values would not be finite.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")  # set below
        try:
            merged = model.merge_and_unload(safe_merge=True)
        except (ValueError, NotImplementedError, RuntimeError) as error:
            raise UserError(f"the adapter cannot be merged: {one_line(error)}") from None
    head = merged.get_output_embeddings()
    if head is not None and head.weight is not merged.get_input_embeddings().weight:
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = False
    return merged


def cast(model: Any, dtype: torch.dtype) -> None:
    """Cast the parameters, except those that transformers always loads in float32."""
    kept = model._get_dtype_plan(dtype)
    for name, parameter in model.named_parameters():
        if not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)
    for config in (model.config, *(getattr(model.config, name) for name in model.config.sub_configs)):
        if config is not None:  # such as that of a part for sound which the model does not have
            config.dtype = dtype
