"""Tiny decoders with adapters, with kernels and without, and what they compute."""

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mmtrain.model.kernels.install import KernelReport, install
from support.builders import DECODER_SIZES as SIZES


def llama(**others: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, **others))


def decoder_of(family: str) -> Any:
    """A model of a family with random weights, those of the norms too."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def adapted(
    variant: dict[str, Any], fused: bool, dtype: torch.dtype = torch.float32, make: Callable[[], Any] = llama
) -> Any:
    """A model of seed 0 with adapters that are not zero; with kernels where `fused`."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", **variant}
    model = get_peft_model(make().to(dtype), LoraConfig(**settings)).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    if fused:
        install(model)
    return model


def install_next_to(*modules: nn.Module) -> KernelReport:
    """`install` on a model that has these modules too, and whose own weights are all trainable."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.others = nn.ModuleList(modules)
    return install(model)


def gradients_of(model: Any) -> dict[str, Tensor]:
    """Of the trainable parameters, for two samples."""
    ids = torch.randint(3, 61, (2, 17), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
