"""The language model's frozen linear layers in 4 bits (NF4 with double quantization), by bitsandbytes.

Dettmers et al. 2023, "QLoRA: Efficient finetuning of quantized LLMs", section 3: weights are stored as 4-bit numbers,
64 of which share a scale, and the scales are stored in 8 bits. A product first turns them back into `model.dtype`.
"""

import importlib.metadata
import importlib.util
import inspect
import logging
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from mmtrain.config.tune_section import ComponentModules
from mmtrain.errors import UserError
from mmtrain.model.components import Components
from mmtrain.model.quantized_stand_in import stand_in
from mmtrain.model.quantized_weights import is_quantized
from mmtrain.safe_text import shown

_log = logging.getLogger(__name__)
_PACKAGE = "bitsandbytes"
BLOCK_SIZE = 64
"""Weights that share a scale, as bitsandbytes groups them by default."""


def check_installed(quantization: str | None) -> None:
    """Raises UserError where `model.quantization` needs a package that is not installed."""
    if quantization is not None and importlib.util.find_spec(_PACKAGE) is None:
        raise UserError(
            f"model.quantization: {_PACKAGE} is not installed, and {quantization} needs it: "
            'pip install "mmtrain[qlora]"'
        )


def quantizer(quantization: str) -> str:
    """What decides the bits of the quantized weights besides the weights themselves."""
    version = importlib.metadata.version(_PACKAGE)
    return f"{quantization}, blocks of {BLOCK_SIZE}, double quantization, {_PACKAGE} {version}"


def dequantize_stored(config: Any, quantization: str | None, path: str) -> None:
    """Where the weights are stored quantized, have `config` say that they are dequantized as they are read: kernels for
    them compute no gradients.

    Raises UserError where transformers cannot dequantize them, or they are to be quantized again.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return
    method = str(stored.get("quant_method") or _PACKAGE) if isinstance(stored, dict) else _PACKAGE
    settings = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
    if quantization is not None or settings is None or "dequantize" not in inspect.signature(settings).parameters:
        raise UserError(
            f"{path}: the weights are stored quantized ({shown(method)}): expected the original model; "
            "give that one, with `model.quantization: nf4` to quantize it while it is loaded"
        )
    stored["dequantize"] = True
    _log.info("%s: the weights are stored quantized (%s): dequantized while they are read", path, shown(method))


def quantization_config(skeleton: Any, dtype: torch.dtype, named: ComponentModules) -> Any:
    """What transformers needs to quantize a model while it loads it. `skeleton` is the model without weights.

    Vision, projector and head keep `dtype`. Raises UserError where the language model has no linear layer.
    """
    from transformers import BitsAndBytesConfig

    components = Components(skeleton, named)
    if not any(_is_quantizable(name, module, components) for name, module in skeleton.named_modules()):
        raise UserError("model.quantization: the language model has no linear layer that can be quantized; remove it")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[*components.roots("vision"), *components.roots("projector"), components.head_name],
    )


def stand_in_for_quantized(model: Any) -> None:
    """Have the layers of `model` that would be quantized take the memory of quantized ones."""
    components = Components(model)
    for name, module in model.named_modules():
        if _is_quantizable(name, module, components):
            stand_in(module)


def _is_quantizable(name: str, module: nn.Module, components: Components) -> bool:
    is_language = components.component_of(name) == "language" and name != components.head_name
    return isinstance(module, nn.Linear) and is_language


def check_quantized(model: Any, path: str, named: ComponentModules) -> None:
    """Make a model that was loaded with `quantization_config` safe to train.

    Raises UserError where a layer outside the language model is quantized.
    """
    components = Components(model, named)
    for name, module in model.named_modules():
        if not is_quantized(module):
            continue
        if not _is_quantizable(name, module, components):
            raise UserError(f"{path}: model.quantization: {shown(name)} is quantized, which is no language layer")
        # with it, bitsandbytes converts the weight to a format without gradients in an evaluation
        module.support_avx512bf16_for_cpu = False


def config_as_code(model: Any) -> str | None:
    """The arguments of transformers' BitsAndBytesConfig that quantize a base model as `model` is; None if it is not."""
    found = getattr(model.config, "quantization_config", None)
    if found is None or not any(map(is_quantized, model.modules())):
        return None
    arguments = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": found.bnb_4bit_quant_type,
        "bnb_4bit_use_double_quant": found.bnb_4bit_use_double_quant,
        "bnb_4bit_compute_dtype": found.bnb_4bit_compute_dtype,
        "llm_int8_skip_modules": found.llm_int8_skip_modules,
    }
    return "".join(f"\n    {name}={value!r}," for name, value in arguments.items()) + "\n"
