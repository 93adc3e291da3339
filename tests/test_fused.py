"""Layers in fewer passes: the outputs and gradients of the plain modules, and only where a module is plain."""

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    HeliumConfig,
    HeliumForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from mmtrain.model.kernels import rowwise
from mmtrain.model.kernels.fused import install_fused
from mmtrain.model.kernels.rowwise import GatedSiLU, gate_up, gate_up_gradients, rms_norm
from support.attention_models import TEXT_MODELS
from support.builders import DECODER_SIZES as SIZES
from support.builders import Operators


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


@pytest.mark.parametrize("rows", [1, 5, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_the_norm_and_its_gradient_are_the_formula(
    rows: int, dtype: torch.dtype, on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rowwise, "_is_cached", lambda value: on_cpu)
    torch.manual_seed(0)
    x = torch.randn(2, rows, 48).to(dtype).requires_grad_()
    weight, outer = torch.rand(48).to(dtype), torch.randn(2, rows, 48).to(dtype)
    found = rms_norm(x, weight, 1e-5)
    (gradient,) = torch.autograd.grad(found, x, outer)

    exact = x.detach().double().requires_grad_()
    expected = exact / (exact.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8  # measured: 2e-7, and half a unit in bfloat16's last place
    assert found.dtype == gradient.dtype == dtype
    assert torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance)
    (other,) = torch.autograd.grad(expected, exact, outer.double())
    assert torch.allclose(gradient.double(), other, rtol=tolerance, atol=tolerance)


def test_off_the_cpu_nothing_is_copied_into_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate's formulas as they are there, a device that is none standing for it; each operation rounds by itself."""
    sizes = [torch.randn(70, 48).bfloat16() for _ in range(3)]
    with Operators() as called:
        gate_up_gradients(
            *(tensor.to("meta") for tensor in sizes), torch.empty(70, 48, dtype=torch.bfloat16, device="meta")
        )
    assert called.dtypes == {torch.bfloat16}

    gate, up = (value.clone().requires_grad_() for value in sizes[:2])
    plain = torch.nn.functional.silu(gate) * up
    monkeypatch.setattr(rowwise, "_is_cached", lambda value: False)
    again = torch.empty_like(plain)
    own = gate_up_gradients(gate.detach(), up.detach(), sizes[2], again)
    assert torch.equal(gate_up(gate.detach(), up.detach()), plain)
    assert torch.equal(again, plain)
    for found, other in zip(own, torch.autograd.grad(plain, (gate, up), sizes[2]), strict=True):
        assert torch.equal(found, other)


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True))


def adapted(
    variant: dict[str, Any], fused: bool, dtype: torch.dtype = torch.float32, make: Callable[[], Any] = llama
) -> Any:
    torch.manual_seed(0)
    base = make().to(dtype)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", **variant}
    model = get_peft_model(base, LoraConfig(**settings)).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    if fused:
        install_fused(model)
    return model


def install_beside(*modules: nn.Module) -> None:
    """`install_fused` on a model that has these modules too."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.others = nn.ModuleList(modules)
    install_fused(model)


def gradients_of(model: Any) -> dict[str, Tensor]:
    ids = torch.randint(1, 61, (2, 17), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


VARIANTS = [
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"lora_bias": True},
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["down_proj"]},
    {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 3}},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_adapters_learn_what_peft_s_own_learn(variant: dict[str, Any]) -> None:
    found, expected = gradients_of(adapted(variant, fused=True)), gradients_of(adapted(variant, fused=False))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().sum() > 0
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6), name  # measured: 2e-7 absolute


OTHERS: list[Callable[[], Any]] = [
    lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    lambda: GraniteForCausalLM(GraniteConfig(**SIZES, residual_multiplier=0.3)),
    lambda: HeliumForCausalLM(HeliumConfig(**SIZES)),
]


@pytest.mark.parametrize("make", OTHERS, ids=["qwen3", "granite", "helium"])
def test_other_families_learn_what_they_did(make: Callable[[], Any]) -> None:
    model = adapted({}, fused=True, make=make)
    assert all("norm" in vars(layer.mlp) for layer in model.get_base_model().model.layers)
    found, expected = gradients_of(model), gradients_of(adapted({}, fused=False, make=make))
    for name, value in expected.items():
        assert value.abs().sum() > 0
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6), name


def kept_by(model: Any) -> int:
    """Values that the backward pass finds, each counted once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    ids = torch.randint(1, 61, (1, 500), generator=torch.Generator().manual_seed(1))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state
    weights = {p.data_ptr() for p in model.parameters()}
    assert hidden.requires_grad
    return sum(size for place, size in kept.items() if place not in weights)


def test_less_is_kept_for_the_backward_pass() -> None:
    assert kept_by(adapted({}, fused=True)) < 0.75 * kept_by(adapted({}, fused=False))  # counted: 0.73


def test_adapters_in_bfloat16_stay_near_those_in_float32() -> None:
    expected = gradients_of(adapted({}, fused=False))
    model = adapted({}, fused=True, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients_of(model)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - value).norm() < 0.05 * value.norm(), name  # measured: 4.1 %, peft's own 7.4


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
    assert replaced(LlamaForCausalLM(LlamaConfig(**SIZES)), "input_layernorm") == 0  # it learns
    assert replaced(adapted({}, fused=False), "input_layernorm") == 2
    gemma = Gemma2ForCausalLM(Gemma2Config(**SIZES)).requires_grad_(False)
    assert replaced(gemma, "input_layernorm") == 0  # it multiplies by 1 + weight


class GatedNorm(LlamaRMSNorm):  # type: ignore[misc]
    """Takes a gate, and is plain without one."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        normed: Tensor = super().forward(x)
        return normed if gate is None else normed * F.silu(gate)


class FailingNorm(LlamaRMSNorm):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("only three dimensions")


class OtherNorm(LlamaRMSNorm):  # type: ignore[misc]
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


@pytest.mark.parametrize("kind", [GatedNorm, FailingNorm, OtherNorm])
def test_a_norm_that_takes_fails_or_gives_something_else_is_left_alone(kind: type[nn.Module]) -> None:
    plain, other = LlamaRMSNorm(8).requires_grad_(False), kind(8).requires_grad_(False)
    install_beside(plain, other)
    assert ["forward" in vars(norm) for norm in (plain, other)] == [True, False]


def test_a_family_with_gated_norms_computes_what_it_did() -> None:
    model = TEXT_MODELS["qwen3_next"]().eval().requires_grad_(False)
    ids = torch.arange(1, 20)[None]
    expected = model(input_ids=ids, use_cache=False).logits
    install_fused(model)
    assert torch.allclose(model(input_ids=ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_forward_without_source_is_left_alone() -> None:
    """Such as one that is made at run time."""
    made: dict[str, Any] = {}
    code = compile(
        "def forward(self, x):\n    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))",
        "none",
        "exec",
    )
    types.FunctionType(code, made)()
    mlp = type("Made", (LlamaMLP,), {"forward": made["forward"]})(LlamaConfig(**SIZES)).requires_grad_(False)
    install_beside(mlp)
    assert "forward" not in vars(mlp)


@pytest.mark.parametrize("variant", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_an_mlp_whose_adapters_are_not_plain_keeps_its_norm_outside(variant: dict[str, Any]) -> None:
    for layer in adapted(variant, fused=True).get_base_model().model.layers:
        assert "norm" not in vars(layer.mlp)
    for layer in adapted({}, fused=True).get_base_model().model.layers:
        assert "norm" in vars(layer.mlp)


def test_an_mlp_that_does_more_is_left_alone() -> None:
    class Scaled(LlamaMLP):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.model.layers[0].mlp = Scaled(LlamaConfig(**SIZES))
    install_fused(model.requires_grad_(False))
    changed = [["forward" in vars(part) for part in (x.mlp, x.post_attention_layernorm)] for x in model.model.layers]
    assert changed == [[False, True], [True, True]]
    assert "norm" not in vars(model.model.layers[0].mlp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patches_that_come_one_by_one_are_multiplied_at_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    convolutions = [nn.Conv3d(3, 12, (2, 4, 5), (2, 4, 5)), nn.Conv2d(3, 12, (4, 5), (4, 5), bias=False)]
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    for convolution in convolutions:
        convolution.to(dtype)
        window = torch.randn(7, 3, *convolution.kernel_size).to(dtype)
        many = torch.randn(2, 3, *(2 * side for side in convolution.kernel_size)).to(dtype)
        expected = convolution(window), convolution(many)
        install_beside(convolution)
        with Operators() as called:
            found = convolution(window)
            assert "aten.convolution.default" not in called.names
            assert torch.equal(convolution(many), expected[1])
            assert "aten.convolution.default" in called.names
        assert found.shape == expected[0].shape
        assert torch.allclose(found, expected[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "other",
    [{"stride": 2}, {"padding": 1}, {"padding": "same", "stride": 1, "kernel_size": 1, "dilation": 2}, {"groups": 3}],
    ids=str,
)
def test_other_convolutions_are_left_alone(other: dict[str, Any]) -> None:
    convolution = nn.Conv2d(**{"in_channels": 3, "out_channels": 12, "kernel_size": 4, "stride": 4, **other})
    install_beside(convolution)
    assert "forward" not in vars(convolution)


def test_linear_layers_that_learn_are_left_alone() -> None:
    layers = [nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)]
    install_beside(*layers)
    assert ["forward" in vars(layer) for layer in layers] == [False, True]
    x = torch.randn(2, 3, 4, requires_grad=True)
    assert torch.allclose(layers[1](x), x @ layers[1].weight.t() + layers[1].bias, atol=1e-6)
