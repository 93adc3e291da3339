"""Layers in fewer passes: the outputs and gradients of the plain modules, and only where a module is plain."""

from typing import Any

import pytest
import torch
from builders import DECODER_SIZES as SIZES
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from mmtrain.model.fused import GatedSiLU, install_fused


@pytest.mark.parametrize("rows", [1, 5, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_and_its_gradients_are_the_formulas(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(1, rows, 48).to(dtype).requires_grad_() for _ in range(2))
    outer = torch.randn(1, rows, 48).to(dtype)
    found = GatedSiLU.apply(gate, up)
    gradients = torch.autograd.grad(found, (gate, up), outer)

    g, u = (value.detach().double().requires_grad_() for value in (gate, up))
    expected = g / (1 + (-g).exp()) * u
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8  # measured: 3e-7, and half a unit in bfloat16's last place
    assert found.dtype == dtype
    assert torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance)
    for own, other in zip(gradients, torch.autograd.grad(expected, (g, u), outer.double()), strict=True):
        assert torch.allclose(own.double(), other, rtol=tolerance, atol=tolerance)


def adapted(variant: dict[str, Any], fused: bool, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)).to(dtype)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", **variant)).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    if fused:
        install_fused(model)
    return model


def gradients_of(model: Any) -> dict[str, Tensor]:
    ids = torch.randint(1, 61, (2, 17), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_adapters_learn_what_peft_s_own_learn(variant: dict[str, Any]) -> None:
    found, expected = gradients_of(adapted(variant, fused=True)), gradients_of(adapted(variant, fused=False))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().sum() > 0
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6), name  # measured: 4e-8 absolute


def test_adapters_in_bfloat16_stay_near_those_in_float32() -> None:
    expected = gradients_of(adapted({}, fused=False))
    model = adapted({}, fused=True, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients_of(model)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - value).norm() < 0.05 * value.norm(), name  # measured: 1.5 %


def test_an_adapter_that_is_off_or_merged_is_not_added() -> None:
    model = adapted({}, fused=True)
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        on = model(input_ids=ids).logits
        with model.disable_adapter():
            off = model(input_ids=ids).logits
        model.merge_adapter()
        merged = model(input_ids=ids).logits
        model.unmerge_adapter()
        torch.manual_seed(0)
        base = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)).eval()
        assert torch.equal(off, base(input_ids=ids).logits)
    assert torch.allclose(merged, on, atol=1e-5)
    assert not torch.allclose(off, on, atol=1e-3)


def test_only_what_is_plain_is_replaced() -> None:
    def replaced(model: nn.Module, kind: str) -> int:
        install_fused(model)
        return sum("forward" in vars(m) for name, m in model.named_modules() if name.rpartition(".")[2] == kind)

    assert replaced(LlamaForCausalLM(LlamaConfig(**SIZES)), "mlp") == 2
    assert replaced(LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="gelu")), "mlp") == 0
    assert replaced(Gemma2ForCausalLM(Gemma2Config(**SIZES)), "mlp") == 0  # gated by tanh's GELU
    assert replaced(adapted({}, fused=False), "q_proj") == 2
    assert replaced(adapted({"use_dora": True}, fused=False), "q_proj") == 0
    assert replaced(adapted({"lora_bias": True}, fused=False), "q_proj") == 0


def test_an_mlp_that_does_more_is_left_alone() -> None:
    class Scaled(LlamaMLP):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    module = nn.Sequential(Scaled(LlamaConfig(**SIZES)))
    install_fused(module)
    assert "forward" not in vars(module[0])
