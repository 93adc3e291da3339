"""What kernels compute: the outputs and gradients of the formulas, and of the plain modules."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmtrain.model.kernels import rowwise
from mmtrain.model.kernels.rowwise import (
    GELU,
    GELU_TANH,
    SILU,
    Activation,
    GatedActivation,
    gate_up,
    gate_up_gradients,
    rms_norm,
)
from support.builders import Operators
from support.kernel_models import adapted, gradients_of, install_next_to, llama


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def gelu(x: Tensor) -> Tensor:
    result: Tensor = x * (1 + torch.special.erf(x / 2**0.5)) / 2
    return result


def gelu_by_tanh(x: Tensor) -> Tensor:
    return x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2


@pytest.mark.parametrize("rows", [1, 5, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("activation", "formula"), [(SILU, silu), (GELU, gelu), (GELU_TANH, gelu_by_tanh)], ids=["silu", "gelu", "tanh"]
)
def test_the_gate_and_its_gradients_are_the_formulas(
    rows: int, dtype: torch.dtype, activation: Activation, formula: Callable[[Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(1, rows, 48).to(dtype).requires_grad_() for _ in range(2))
    outer = torch.randn(1, rows, 48).to(dtype)
    found = GatedActivation.apply(gate, up, activation)  # type: ignore[no-untyped-call]
    gradients = torch.autograd.grad(found, (gate, up), outer)

    g, u = (value.detach().double().requires_grad_() for value in (gate, up))
    expected = formula(g) * u
    tolerance = 5e-6 if dtype == torch.float32 else 2**-8  # measured: 3e-6, and half a unit in bfloat16's last place
    assert found.dtype == dtype
    assert torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance)
    for own, other in zip(gradients, torch.autograd.grad(expected, (g, u), outer.double()), strict=True):
        assert torch.allclose(own.double(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [1, 5, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("wide", [True, False])
def test_the_norm_and_its_gradient_are_the_formula(
    rows: int, dtype: torch.dtype, on_cpu: bool, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where 1 is added to the weight, it comes in float32."""
    monkeypatch.setattr(rowwise, "_is_cached", lambda value: on_cpu)
    torch.manual_seed(0)
    x = torch.randn(2, rows, 48).to(dtype).requires_grad_()
    weight, outer = torch.rand(48).to(torch.float32 if wide else dtype), torch.randn(2, rows, 48).to(dtype)
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
    """The gate's formulas as they are there, on the device that computes nothing; each operation rounds by itself."""
    sizes = [torch.randn(70, 48).bfloat16() for _ in range(3)]
    on_meta, out = [tensor.to("meta") for tensor in sizes], torch.empty(70, 48, dtype=torch.bfloat16, device="meta")
    with Operators() as called:
        gate_up_gradients(on_meta[0], on_meta[1], on_meta[2], SILU, out)
    assert called.dtypes == {torch.bfloat16}

    gate, up = (value.clone().requires_grad_() for value in sizes[:2])
    plain = torch.nn.functional.silu(gate) * up
    monkeypatch.setattr(rowwise, "_is_cached", lambda value: False)
    again = torch.empty_like(plain)
    own = gate_up_gradients(gate.detach(), up.detach(), sizes[2], SILU, again)
    assert torch.equal(gate_up(gate.detach(), up.detach(), SILU), plain)
    assert torch.equal(again, plain)
    for found, other in zip(own, torch.autograd.grad(plain, (gate, up), sizes[2]), strict=True):
        assert torch.equal(found, other)


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
def test_adapters_get_the_gradients_of_peft_s_own(variant: dict[str, Any]) -> None:
    found, expected = gradients_of(adapted(variant, fused=True)), gradients_of(adapted(variant, fused=False))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().sum() > 0
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6), name  # measured: 2e-7 absolute


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
    assert found.keys() == expected.keys() != set()
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
        base = llama().eval()
        assert torch.equal(off, base(input_ids=ids).logits)
    assert torch.allclose(merged, on, atol=1e-5)
    assert not torch.allclose(off, on, atol=1e-3)


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
        install_next_to(convolution)
        with Operators() as called:
            found = convolution(window)
            assert "aten.convolution.default" not in called.names
            assert torch.equal(convolution(many), expected[1])
            assert "aten.convolution.default" in called.names
        assert found.shape == expected[0].shape
        assert torch.allclose(found, expected[0], rtol=tolerance, atol=tolerance)


def test_a_frozen_linear_layer_gives_the_product() -> None:
    layer = nn.Linear(4, 4).requires_grad_(False)
    install_next_to(layer)
    x = torch.randn(2, 3, 4, requires_grad=True)
    assert torch.allclose(layer(x), x @ layer.weight.t() + layer.bias, atol=1e-6)
