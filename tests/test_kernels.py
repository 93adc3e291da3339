"""Kernels by trial: which families they fit, and that whatever fails its trial is left exactly as it was."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from mmtrain.config.schema import Config
from mmtrain.model.kernels.install import KernelReport, install
from mmtrain.model.kernels.last_layer import last_mlp
from mmtrain.train.run import train
from support.attention_models import TEXT_MODELS
from support.kernel_models import adapted, decoder_of, gradients_of, install_next_to, llama

FAMILIES = {
    "llama": (2, 5),
    "mistral": (2, 5),
    "qwen3": (2, 9),
    "granite": (2, 5),  # scales what the MLP gives
    "helium": (2, 5),
    "gemma": (2, 5),  # norms times 1 + weight, GELU
    "gemma2": (2, 9),  # a norm after the MLP too
    "phi3": (2, 5),  # gate and up from one projection
    "glm4": (2, 9),
    "lfm2": (2, 9),  # an activation that is no attribute
    "olmo": (2, 0),  # norms without a weight
    "olmo2": (2, 9),  # no norm before the MLP
    "cohere": (2, 0),  # attention and MLP get one norm's result
    "bitnet": (0, 9),  # a norm inside the MLP
    "gpt_neox": (0, 0),  # an MLP without a gate
}
"""Fused layers, of two, and norms."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_what_it_did(family: str) -> None:
    model, plain = (adapted({}, fused=False, make=partial(decoder_of, family)) for _ in range(2))
    report = install(model)
    assert (report.num_layers, report.num_fused, report.num_norms) == (2, *FAMILIES[family])
    assert report.num_others > 0
    expected, found = gradients_of(plain), gradients_of(model)
    for name, value in expected.items():
        assert value.abs().sum() > 0
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6), name


def test_families_of_other_kinds_compute_what_they_did() -> None:
    for name in ("qwen3_next", "mixture", "gpt_oss"):
        model = TEXT_MODELS[name]().eval().requires_grad_(False)
        ids = torch.arange(1, 20)[None]
        expected = model(input_ids=ids, use_cache=False).logits
        install(model)
        assert torch.allclose(model(input_ids=ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5), name


def test_the_report_is_one_line() -> None:
    assert KernelReport(28, 28, 57, 253).line == "kernels: 28 of 28 layers, 57 norms, 253 other modules"
    assert KernelReport(28, 0, 0, 0).line == "kernels: none fits this model"


@pytest.mark.slow("a run")
def test_a_run_prints_it_once(make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]) -> None:
    train(make_config("text", steps=1))
    assert capsys.readouterr().err.count("kernels: 2 of 2 layers, 9 norms") == 1


def test_installing_again_changes_nothing() -> None:
    model = adapted({}, fused=False)
    report = install(model)
    forwards = [vars(module).get("forward") for module in model.modules()]
    last = last_mlp(model)
    assert install(model) == report
    assert [vars(module).get("forward") for module in model.modules()] == forwards
    assert last_mlp(model) is last is model.get_decoder().layers[-1].mlp


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trials_leave_weights_gradients_modes_and_random_state_alone(dtype: torch.dtype) -> None:
    model = adapted({"lora_dropout": 0.5}, fused=False, dtype=dtype)
    model.get_decoder().layers[0].train()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3) if parameter.requires_grad else None
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    install(model)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all((p.grad == 3).all() if p.requires_grad else p.grad is None for p in model.parameters())


def test_a_forward_that_somebody_else_put_in_stays() -> None:
    layer = nn.Linear(6, 5).requires_grad_(False)
    own = layer.forward
    layer.forward = lambda x: own(x) + 1  # type: ignore[method-assign, assignment]
    x = torch.randn(3, 6)
    expected = layer(x)
    install_next_to(layer)
    assert torch.equal(layer(x), expected)


class GatedNorm(LlamaRMSNorm):  # type: ignore[misc]
    """Takes a gate, and is plain without one."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        normed: Tensor = super().forward(x)
        return normed if gate is None else normed * F.silu(gate)


class FailingNorm(LlamaRMSNorm):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("only three dimensions")


class TwoResults(LlamaRMSNorm):  # type: ignore[misc]
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


class EpsilonOutside(LlamaRMSNorm):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)
        return result


class Centred(LlamaRMSNorm):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [FailingNorm, TwoResults, EpsilonOutside, Centred])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_norm_is_left_alone(kind: type[nn.Module], dtype: torch.dtype) -> None:
    plain, other = (norm(8).requires_grad_(False).to(dtype) for norm in (LlamaRMSNorm, kind))
    attributes = dict(vars(other))
    assert install_next_to(plain, other).num_norms == 1
    assert vars(other) == attributes


def test_a_norm_with_a_gate_still_takes_it() -> None:
    norm = GatedNorm(8).requires_grad_(False)
    x, gate = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    expected = norm(x, gate), norm(x, gate=gate), norm(x=x)
    install_next_to(norm)
    found = norm(x, gate), norm(x, gate=gate), norm(x=x)
    assert all(torch.equal(own, other) for own, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_an_mlp_whose_adapters_do_more_is_not_fused(settings: dict[str, Any]) -> None:
    report = install(adapted(settings, fused=False))
    assert (report.num_fused, report.num_norms) == (0, 5)


def test_adapters_that_do_more_are_left_to_peft() -> None:
    plain = install(adapted({}, fused=False)).num_others
    for settings in ({"use_dora": True}, {"lora_bias": True}):
        # of each layer's seven adapters, not one; but the gate, which is fused no more
        assert install(adapted(settings, fused=False)).num_others == plain - 2 * 7 + 2


class Scaled(LlamaMLP):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return result


class Swapped(LlamaMLP):  # type: ignore[misc]
    """What is called the gate is what is gated."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))  # type: ignore[no-any-return]


def with_first_mlp(kind: Callable[[LlamaConfig], nn.Module], **settings: Any) -> Any:
    torch.manual_seed(0)
    model = llama(**settings)
    model.model.layers[0].mlp = kind(model.config)
    return model.requires_grad_(False).eval()


def logits_of(model: Any) -> Tensor:
    return model(input_ids=torch.arange(3, 40)[None], use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(("kind", "num_fused"), [(Scaled, 1), (Swapped, 2)])
def test_an_mlp_is_known_by_what_it_computes(kind: type[LlamaMLP], num_fused: int) -> None:
    model = with_first_mlp(kind)
    expected = logits_of(model)
    assert install(model).num_fused == num_fused
    assert torch.allclose(logits_of(model), expected, rtol=1e-4, atol=1e-6)


class ScaledByBuffer(LlamaMLP):  # type: ignore[misc]
    """Of several that look alike, one does more."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)  # type: ignore[no-any-return]


class ScaledByWeight(LlamaMLP):  # type: ignore[misc]
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [ScaledByBuffer, ScaledByWeight])
def test_modules_that_look_alike_and_compute_something_else_are_tried_each(kind: type[LlamaMLP]) -> None:
    model = with_first_mlp(kind)
    model.model.layers[1].mlp = kind(model.config).requires_grad_(False)
    nn.init.constant_(model.model.layers[1].mlp.scale, 2.0)
    expected = logits_of(model)
    assert install(model).num_fused == (1 if kind is ScaledByBuffer else 0)
    assert torch.allclose(logits_of(model), expected, rtol=1e-4, atol=1e-6)


def test_an_mlp_that_is_called_twice_is_not_fused() -> None:
    model = with_first_mlp(LlamaMLP)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    expected = logits_of(model)
    assert install(model).num_fused == 0
    assert torch.allclose(logits_of(model), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_activations_are_distinguished(name: str) -> None:
    """The two kinds of GELU differ by less than the rounding of bfloat16."""
    torch.manual_seed(0)
    model = llama(hidden_act=name).requires_grad_(False).bfloat16().eval()
    expected = logits_of(model.float())
    report = install(model.bfloat16())
    assert report.num_fused == (0 if name == "relu" else 2)
    assert torch.allclose(logits_of(model.float()), expected, rtol=1e-4, atol=1e-6)


class ReadsTheNormTwice(nn.Module):
    """A layer whose norm's result goes into the MLP and into the sum after it."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.norm, self.mlp = LlamaRMSNorm(config.hidden_size), LlamaMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return normed + self.mlp(normed)  # type: ignore[no-any-return]


def test_a_norm_whose_result_goes_elsewhere_too_stays_outside() -> None:
    model = with_first_mlp(ReadsTheNormTwice)
    expected = logits_of(model)
    assert install(model).num_fused == 2  # the first one without its norm
    assert torch.allclose(logits_of(model), expected, rtol=1e-4, atol=1e-6)


class AttentionLast(LlamaDecoderLayer):  # type: ignore[misc]
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x + self.self_attn(self.input_layernorm(x), **kwargs)[0]  # type: ignore[no-any-return]


def test_the_last_mlp_is_left_whole_where_attention_comes_after_it() -> None:
    """Then a token's result needs the MLP of the tokens before it."""
    torch.manual_seed(0)
    model = llama().requires_grad_(False).eval()
    model.model.layers[1].__class__ = AttentionLast
    expected = logits_of(model)
    assert install(model).num_fused == 2
    assert last_mlp(model) is None
    assert torch.allclose(logits_of(model), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "other",
    [{"stride": 2}, {"padding": 1}, {"padding": "same", "stride": 1, "kernel_size": 1, "dilation": 2}, {"groups": 3}],
    ids=str,
)
def test_other_convolutions_are_left_alone(other: dict[str, Any]) -> None:
    plain = nn.Conv2d(3, 12, 4, 4)
    convolution = nn.Conv2d(**{"in_channels": 3, "out_channels": 12, "kernel_size": 4, "stride": 4, **other})
    assert install_next_to(plain, convolution).num_others - install_next_to(convolution).num_others == 1
    assert install_next_to(convolution) == install_next_to()


def test_linear_layers_of_another_class_are_left_alone() -> None:
    class Other(nn.Linear):
        pass

    assert install_next_to(Other(4, 4)) == install_next_to() != install_next_to(nn.Linear(4, 4))


def test_a_layer_that_is_trained_in_full_gets_the_same_gradients() -> None:
    model = decoder_of("gpt_neox").eval()
    plain = copy.deepcopy(model)
    assert install(model).num_others == 2 * 5 + 1  # two layers of four products and an MLP, and the head
    expected, found = gradients_of(plain), gradients_of(model)
    assert len(expected) > 20
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6), name
