"""Adapters on experts, whose weights are stacks of matrices, and on layers that peft takes for experts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Llama4ForCausalLM, Llama4TextConfig, MixtralConfig, MixtralForCausalLM

from mmtrain.config.schema import Config, Model
from mmtrain.config.tune_section import Lora, Tune
from mmtrain.encoding.load import load_processor
from mmtrain.errors import UserError
from mmtrain.merge.command import merge
from mmtrain.model.adapter import load_adapter, read_adapter
from mmtrain.model.components import Components, base_name
from mmtrain.model.cost import cost_model
from mmtrain.model.earlier_run import start_from_run
from mmtrain.model.experts import expert_shares
from mmtrain.model.family import Family
from mmtrain.model.load import load_model
from mmtrain.model.lora_targets import targets_of, without_adapter
from mmtrain.model.tune import apply_tune
from mmtrain.train.run import train
from support.attention_models import TEXT_MODELS, make_text_family
from support.builders import DECODER_SIZES
from support.family_proof import fill_adapters
from support.family_reference import directory
from support.learning import LORA, learner_for, relative_l2, step_of

TUNE = Tune.model_validate({"language": LORA})
SCALE = 2.0  # alpha 8 over rank 4


def _mixtral() -> Any:
    return MixtralForCausalLM(MixtralConfig(**DECODER_SIZES, num_local_experts=4, num_experts_per_tok=2))


def _llama4() -> Any:
    sizes = DECODER_SIZES | {"num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 32}
    return Llama4ForCausalLM(Llama4TextConfig(**sizes))


MODELS: dict[str, Callable[[], Any]] = {
    "qwen3_moe": TEXT_MODELS["mixture"],
    "qwen3_next": TEXT_MODELS["qwen3_next"],
    "gpt_oss": TEXT_MODELS["gpt_oss"],
    "mixtral": _mixtral,
    "llama4": _llama4,
}
IDS = torch.arange(3, 43)[None]


def built(name: str) -> Any:
    torch.manual_seed(3)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return model


def adapted(name: str, tune: Tune = TUNE) -> Any:
    model = built(name)
    model, _ = apply_tune(model, Components(model), tune)
    fill_adapters(model)
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS, use_cache=False).logits
    return out


def added(layer: ParamWrapper, shape: torch.Size) -> Tensor:
    """What an adapter adds to its weight: for each expert B A times the scale, whichever way the expert is stored."""
    count = shape[0] if len(shape) == 3 else 1
    first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    first, second = first.reshape(count, -1, first.shape[1]), second.reshape(len(second), -1, count)
    deltas = [SCALE * second[:, :, expert] @ first[expert] for expert in range(count)]
    wanted = shape[-2:]
    return torch.stack([delta if delta.shape == wanted else delta.T for delta in deltas]).reshape(shape)


@pytest.mark.parametrize("name", MODELS)
def test_the_adapters_are_in_the_products_and_peft_loads_them(name: str, tmp_path: Path) -> None:
    """Every weight of experts has one; the logits are those of a plain model with the products added by hand."""
    model, plain = adapted(name), built(name)
    before, wrapped = logits(plain), []
    with torch.no_grad():
        for key, layer in model.named_modules():
            if isinstance(layer, ParamWrapper):
                wrapped.append(f"{base_name(key)}.{layer.parameter_name}")
                weight = plain.get_parameter(wrapped[-1])
                weight += added(layer, weight.shape)
            elif hasattr(layer, "lora_A"):
                pair = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                plain.get_submodule(base_name(key)).weight += SCALE * pair[1] @ pair[0]
    stacks = {key for key, p in plain.named_parameters() if "experts" in key and p.ndim == 3}
    assert stacks
    assert stacks <= set(wrapped)
    expected, found = logits(plain), logits(model)
    assert (found - before).norm() > 0.01 * before.norm()
    assert (found - expected).norm() < 1e-5 * expected.norm()
    model.save_pretrained(tmp_path)
    for loaded in (PeftModel.from_pretrained(built(name), tmp_path), load_adapter(built(name), read_adapter(tmp_path))):
        assert torch.equal(logits(loaded.eval()), found)


def test_layers_that_peft_takes_for_experts_get_their_adapters_and_no_others() -> None:
    """peft reads patterns of Qwen's and DeepSeek's families as lists of last names, and names such as `gate_proj` as
    those of experts. The shared expert of Qwen3-Next has such layers."""
    targets = targets_of(built("qwen3_next"), Components(built("qwen3_next")), "language", Lora(mode="lora"))
    shared = [name for name in targets.parameters if "shared_expert." in name]
    assert {name.rsplit(".", 2)[-2] for name in shared} == {"gate_proj", "up_proj", "down_proj"}
    first = Tune.model_validate({"language": LORA | {"targets": ["layers.0.self_attn.q_proj"]}})
    layers = {base_name(n) for n, p in adapted("qwen3_moe", first).named_parameters() if p.requires_grad}
    assert layers == {"model.layers.0.self_attn.q_proj.weight"}


@pytest.mark.parametrize("name", MODELS)
def test_routers_get_an_adapter_only_if_they_are_named(name: str) -> None:
    def is_router(key: str) -> bool:
        return key.removesuffix(".weight").endswith((".gate", ".router"))

    model = built(name)
    components = Components(model)
    assert not any(is_router(key) for key in targets_of(model, components, "language", Lora(mode="lora")))
    word = "router" if name in ("gpt_oss", "llama4") else "gate"
    targets = targets_of(model, components, "language", Lora(mode="lora", targets=(word,)))
    assert len(targets) == model.config.num_hidden_layers
    assert all(is_router(key) for key in targets)
    changed = adapted(name, Tune.model_validate({"language": LORA | {"targets": [word]}}))
    assert not torch.allclose(logits(changed), logits(model), rtol=1e-3)


def test_what_peft_cannot_do_with_experts_is_one_line() -> None:
    """4 stacks: 2 layers of 8 experts with 3 x 32 x 24 parameters."""
    model = built("qwen3_moe")
    components = Components(model)

    def lines(**changes: Any) -> list[str]:
        return list(without_adapter(model, components, Tune.model_validate({"language": LORA | changes})))

    assert lines() == []
    (dora,) = lines(variant="dora")
    assert dora.startswith("tune.language: no adapter on 4 weights of experts (36,864 parameters): peft has no DoRA")
    (dropout,) = lines(dropout=0.1)
    assert dropout.startswith("tune.language.dropout: not on 4 weights of experts")
    assert not targets_of(model, components, "language", Lora(mode="lora", variant="dora")).parameters
    named = Lora(mode="lora", variant="dora", targets=("q_proj", "down_proj"))
    with pytest.raises(UserError, match=r"targets: 2 weights cannot .* such as .*experts\.down_proj: peft has no DoRA"):
        targets_of(model, components, "language", named)


class _Outside(nn.Module):
    """Experts whose weights another module takes: an adapter on them would have no effect."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.experts = inner.experts
        self.gate = inner.gate

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.einsum("bsh,eoh->bso", hidden, self.experts.gate_up_proj)[..., : hidden.shape[-1]]


def test_experts_that_do_not_run_by_themselves_get_none() -> None:
    model = built("qwen3_moe")
    for layer in model.model.layers:
        layer.mlp = _Outside(layer.mlp)
    components = Components(model)
    assert not targets_of(model, components, "language", Lora(mode="lora")).parameters
    (line,) = without_adapter(model, components, TUNE)
    assert line.endswith("no adapter on 4 weights of experts (36,864 parameters): their module does not run by itself")
    with pytest.raises(UserError, match=r"2 weights cannot have an adapter, .* their module does not run by itself"):
        targets_of(model, components, "language", Lora(mode="lora", targets=("down_proj",)))


def moe_config(folder: Path, make_config: Callable[..., Config], tune: dict[str, Any], **settings: Any) -> Config:
    config = make_config("text", tune, **settings).model_dump()
    config["model"]["path"] = str(make_text_family("mixture", folder / "model"))
    return Config.model_validate(config)


@pytest.mark.parametrize("mode", [LORA, {"mode": "full"}])
def test_experts_without_tokens_have_the_gradient_zero(
    mode: dict[str, Any], make_config: Callable[..., Config], tmp_path: Path
) -> None:
    learner, dataset = learner_for(moe_config(tmp_path, make_config, {"language": mode}, kernels="off"))
    used: dict[str, set[int]] = {}
    for key, module in learner.model.named_modules():
        if key.endswith("mlp.gate"):

            def note(_: Any, __: Any, out: Any, own: str = base_name(key).replace("gate", "experts")) -> None:
                used.setdefault(own, set()).update(out[-1].flatten().tolist())

            module.register_forward_hook(note)
    _, gradients = step_of(learner, dataset, [[4]], packing=False)
    idle = {key: sorted(set(range(8)) - experts) for key, experts in used.items()}
    assert any(idle.values())
    for key, gradient in gradients.items():
        own = base_name(key)
        for layer, unused in idle.items():
            if not own.startswith(layer):
                continue
            by_expert = gradient
            if "lora_A" in key:
                by_expert = gradient.reshape(8, -1)
            elif "lora_B" in key:
                by_expert = gradient.reshape(len(gradient), -1, 8).permute(2, 0, 1)
            assert torch.count_nonzero(by_expert[unused]) == 0, key
            assert torch.count_nonzero(gradient) > 0, key


def test_layers_computed_twice_give_the_same_gradients(make_config: Callable[..., Config], tmp_path: Path) -> None:
    found = []
    for again in (False, True):
        config = moe_config(tmp_path, make_config, {"language": LORA}, activation_checkpointing=again)
        learner, dataset = learner_for(config)
        found.append(step_of(learner, dataset, [[0, 1], [2, 3]], packing=True)[1])
    assert relative_l2(found[1], found[0]) < 1e-6


@pytest.mark.slow("several runs")
def test_a_run_is_merged(make_config: Callable[..., Config], tmp_path: Path) -> None:
    config = moe_config(tmp_path, make_config, {"language": LORA}, steps=2)
    train(config)
    merge(Path(config.run.output_dir), tmp_path / "merged")

    def load(path: str | Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    own = PeftModel.from_pretrained(load(config.model.path), Path(config.run.output_dir) / "adapter").eval()
    expected, base = logits(own), logits(load(config.model.path))
    assert (expected - base).norm() > 1e-3 * base.norm()
    assert (logits(load(tmp_path / "merged")) - expected).norm() < 1e-5 * expected.norm()


def test_a_run_starts_from_adapters_on_experts(tmp_path: Path) -> None:
    """Two components of other ranks: peft has those of one by pattern."""
    path = str(directory("qwen3_vl_moe"))
    processor = load_processor(path)
    tune = Tune.model_validate({"vision": LORA | {"rank": 2}, "language": LORA})

    def tuned() -> Any:
        model = load_model(path, "float32", processor)
        return apply_tune(model, Components(model), tune)[0]

    before, after = tuned(), tuned()
    experts = [layer for _, layer in before.named_modules() if isinstance(layer, ParamWrapper)]
    assert [layer.scaling["default"] for layer in experts] == [SCALE] * 4
    fill_adapters(before)
    before.save_pretrained(tmp_path)
    settings = Model(path=path, adapter=str(tmp_path))
    start_from_run(after, Components(after.get_base_model()), settings, lambda: None)
    found = dict(after.named_parameters())
    assert all(torch.equal(found[name], value) for name, value in before.named_parameters())


@pytest.mark.parametrize(("name", "chosen"), [("qwen3_moe", 2), ("gpt_oss", 2), ("llama4", 2), ("mixtral", 2)])
def test_a_token_costs_the_experts_that_it_goes_to(name: str, chosen: int) -> None:
    """Llama 4 computes every expert for every token."""
    model = built(name).requires_grad_(False)
    count = next(len(p) for key, p in model.named_parameters() if "experts" in key and p.ndim == 3)
    shares = expert_shares(model)
    assert set(shares.values()) == {chosen / count}
    stacks = sum(p.numel() for key, p in model.named_parameters() if ".experts." in key and p.ndim >= 2)
    family = Family(Components(model), "plain")
    all_, some = (cost_model(model, one, TUNE).token for one in (family, replace(family, expert_shares=shares)))
    assert all_ - some == pytest.approx(2 * stacks * (1 - chosen / count))
