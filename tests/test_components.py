"""The three components on the module tree: what was named is trainable, and nothing else."""

import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    Gemma4UnifiedConfig,
    LagunaConfig,
    LagunaForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    ModernBertDecoderConfig,
)

from mmtrain.config.schema import Config
from mmtrain.config.tune_section import ComponentModules, Lora, Tune
from mmtrain.errors import UserError
from mmtrain.model.components import Components, base_name, decoder_of
from mmtrain.model.lora_targets import targets_of, without_adapter
from mmtrain.model.tune import ComponentReport, apply_tune
from mmtrain.scoring.image_cache import caches_features
from mmtrain.train.optimizer import make_optimizer
from mmtrain.train.report import start_report
from support.attention_models import TEXT_MODELS
from support.builders import DECODER_SIZES
from support.learning import LORA, learner_for

# Where each component's parameters lie in each architecture, written down from the models' own module trees.
PATTERNS = {
    "qwen2_5_vl": {
        "vision": r"model\.visual\.(?!merger)",
        "projector": r"model\.visual\.merger\.",
        "language": r"model\.language_model\.|lm_head\.",
    },
    "llava": {
        "vision": r"model\.vision_tower\.",
        "projector": r"model\.multi_modal_projector\.",
        "language": r"model\.language_model\.|lm_head\.",
    },
    "text": {"language": r"model\.|lm_head\."},
}


def load(kind: str, model_dirs: dict[str, Path]) -> Any:
    auto = AutoModelForCausalLM if kind == "text" else AutoModelForImageTextToText
    return auto.from_pretrained(model_dirs[kind], dtype=torch.float32)


def prepared(model: Any, tune: Tune) -> tuple[Any, list[ComponentReport]]:
    return apply_tune(model, Components(model), tune)


def test_every_parameter_belongs_to_its_component(kind: str, model_dirs: dict[str, Path]) -> None:
    model = load(kind, model_dirs)
    components = Components(model)
    for name, _ in model.named_parameters():
        expected = next(component for component, pattern in PATTERNS[kind].items() if re.match(pattern, name))
        assert components.component_of(name) == expected, name


def test_a_model_without_an_image_encoder_has_a_projector() -> None:
    config = Gemma4UnifiedConfig(
        text_config={**DECODER_SIZES, "num_hidden_layers": 1, "layer_types": ["full_attention"]},
        vision_config={"mm_embed_dim": 8, "output_proj_dims": 8, "patch_size": 2, "mm_posemb_size": 4},
    )
    with torch.device("meta"):
        components = Components(AutoModelForMultimodalLM.from_config(config))
    assert components.roots("projector") == ["model.embed_vision"]
    assert components.component_of("model.embed_vision.patch_dense.weight") == "projector"
    assert components.component_of("model.language_model.layers.0.mlp.up_proj.weight") == "language"
    assert components.roots("vision") == []


def test_a_head_called_decoder_is_not_the_language_model() -> None:
    config = ModernBertDecoderConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.get_decoder() is model.get_output_embeddings()
    assert decoder_of(model) is model.model


def test_initial_weights_follow_from_the_seed_alone(model_dirs: dict[str, Path]) -> None:
    """They are those that peft itself draws right after the seed, whatever was tried before."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    plain = load("text", model_dirs)
    torch.manual_seed(5)
    expected = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", target_modules=names, r=4, lora_alpha=8))
    model, tune = load("text", model_dirs), Tune.model_validate({"language": LORA})
    torch.manual_seed(5)
    list(without_adapter(model, Components(model), tune))
    found, _ = prepared(model, tune)
    own, others = dict(found.named_parameters()), dict(expected.named_parameters())
    lora_a = [name for name in own if "lora_A" in name]
    assert len(lora_a) == len(names) * plain.config.num_hidden_layers
    assert all(torch.equal(own[name], others[name]) for name in lora_a)


@pytest.mark.parametrize("component", ["vision", "projector", "language"])
@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava"])
def test_only_the_named_component_is_trainable(
    kind: str, component: str, mode: str, model_dirs: dict[str, Path]
) -> None:
    tune = Tune.model_validate({component: LORA if mode == "lora" else {"mode": "full"}})
    base = load(kind, model_dirs)
    total = sum(p.numel() for p in base.parameters())
    model, report = prepared(base, tune)
    own = [(base_name(name), p) for name, p in model.named_parameters() if p.requires_grad]
    learning = {name for name, _ in own}
    assert learning
    assert all(re.match(PATTERNS[kind][component], name) for name in learning)
    if mode == "full":
        fresh = dict(load(kind, model_dirs).named_parameters())
        wanted = {name for name in fresh if re.match(PATTERNS[kind][component], name)}
        assert learning == wanted
    row = next(row for row in report if row.component == component)
    assert row.trainable == sum(p.numel() for _, p in own) > 0
    assert row.num_modules > 0
    assert sum(row.frozen for row in report) == total - (row.trainable if mode == "full" else 0)


def test_a_full_component_next_to_lora_is_saved_complete_and_alone(model_dirs: dict[str, Path]) -> None:
    tune = Tune.model_validate({"vision": {"mode": "full"}, "language": LORA})
    model, _ = prepared(load("qwen2_5_vl", model_dirs), tune)
    saved = set(model.peft_config["default"].modules_to_save)
    assert saved == {"model.visual.patch_embed", "model.visual.blocks.0", "model.visual.blocks.1"}
    assert re.fullmatch(model.peft_config["default"].target_modules, "model.language_model.layers.0.self_attn.q_proj")
    assert not re.fullmatch(model.peft_config["default"].target_modules, "model.visual.blocks.0.attn.proj")


def test_targets_are_literal_names(model_dirs: dict[str, Path]) -> None:
    tune = Tune.model_validate({"language": {**LORA, "targets": ["q_proj", "mlp.down_proj"]}})
    model, _ = prepared(load("llava", model_dirs), tune)
    hit = {base_name(name) for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rsplit(".", 2)[-2] for name in hit} == {"q_proj", "down_proj"}
    assert all(name.startswith("model.language_model.") for name in hit)


@pytest.mark.parametrize(
    ("tune", "reason"),
    [
        ({"language": {**LORA, "targets": ["q_porj"]}}, "no linear layer is called q_porj"),
        ({"language": {**LORA, "targets": [".*"]}}, "no linear layer is called"),
        ({"vision": LORA}, "the model has no vision component"),
        ({"projector": {"mode": "full"}}, "the model has no projector component"),
    ],
)
def test_targets_that_match_nothing_are_an_error(
    tune: dict[str, Any], reason: str, model_dirs: dict[str, Path]
) -> None:
    with pytest.raises(UserError, match=re.escape(reason)):
        prepared(load("text", model_dirs), Tune.model_validate(tune))


def test_ranks_of_two_components_may_differ(model_dirs: dict[str, Path]) -> None:
    tune = Tune.model_validate({"vision": {**LORA, "rank": 2, "alpha": 6.0}, "language": {**LORA, "rank": 5}})
    model, _ = prepared(load("llava", model_dirs), tune)
    for name, p in model.named_parameters():
        if "lora_A" in name:
            assert p.shape[0] == (2 if "vision_tower" in name else 5)
    layer = model.get_submodule("base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj")
    assert layer.scaling["default"] == pytest.approx(3.0)


@pytest.mark.parametrize(("variant", "scaling"), [("lora", 2.0), ("rslora", 4.0), ("dora", 2.0)])
def test_each_variant_of_lora_has_its_scaling(variant: str, scaling: float, model_dirs: dict[str, Path]) -> None:
    tune = Tune.model_validate({"language": {**LORA, "variant": variant}})
    model, _ = prepared(load("text", model_dirs), tune)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert layer.scaling["default"] == pytest.approx(scaling)  # alpha 8 over rank 4, or over its square root
    assert (variant == "dora") == any("magnitude" in name for name, _ in model.named_parameters())


def test_each_component_has_its_rate_and_only_matrices_decay(make_config: Callable[..., Config]) -> None:
    tune = {"projector": {"mode": "full", "learning_rate": 3e-4}, "language": LORA}
    config = make_config("llava", tune, weight_decay=0.1)
    base = AutoModelForImageTextToText.from_pretrained(config.model.path, dtype=torch.float32)
    components = Components(base)
    model, _ = apply_tune(base, components, config.tune)
    optimizer = make_optimizer(model, components, config)
    names = {id(p): name for name, p in model.named_parameters()}
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            assert group["base_rate"] == (3e-4 if "multi_modal_projector" in name else 1e-2)
            assert group["weight_decay"] == (0.0 if name.endswith("bias") else 0.1)
    assert seen == {name for name, p in model.named_parameters() if p.requires_grad}


def test_layers_that_peft_refuses_are_named_in_one_line() -> None:
    tune = Tune.model_validate({"language": LORA | {"targets": ["x_proj", "out_proj"]}})
    with pytest.raises(
        UserError, match=r"tune\.language: peft refuses it: .*out_proj.*; name other layers in `targets`"
    ) as refused:
        prepared(TEXT_MODELS["mamba"](), tune)
    assert "\n" not in str(refused.value)
    others = Tune.model_validate({"language": LORA | {"targets": ["x_proj", "in_proj"]}})
    _, (report,) = prepared(TEXT_MODELS["mamba"](), others)
    assert report.num_modules == 4


def test_layers_that_peft_refuses_are_left_out_by_default() -> None:
    tune = Tune.model_validate({"language": LORA})
    mamba = TEXT_MODELS["mamba"]()
    refused = "tune.language: no adapter on 2 linear layers that peft refuses: out_proj"
    assert list(without_adapter(mamba, Components(mamba), tune)) == [refused]
    _, (report,) = prepared(mamba, tune)
    assert report.num_modules == 6  # in_proj, x_proj and dt_proj of two layers


def test_layers_whose_adapter_peft_would_load_under_another_name_get_none() -> None:
    """A rule of transformers for an older name, `mlp.shared_expert.`, also matches today's `mlp.shared_experts`."""
    sizes = DECODER_SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model = LagunaForCausalLM(
        LagunaConfig(**sizes, layer_types=["full_attention"] * DECODER_SIZES["num_hidden_layers"])
    )
    tune = Tune.model_validate({"language": LORA})
    lost = {name for name, m in model.named_modules() if "shared_experts." in name and isinstance(m, nn.Linear)}
    (line,) = without_adapter(model, Components(model), tune)
    kinds = "down_proj, gate_proj, up_proj"
    assert line == f"tune.language: no adapter on {len(lost)} layers that peft would not load again: {kinds}"
    targets = targets_of(model, Components(model), "language", Lora(mode="lora"))
    assert not lost.intersection(targets.modules)
    assert any(name.endswith("mlp.down_proj") for name in targets.modules)
    with pytest.raises(
        UserError, match=r"peft would not load the adapters of \d layers again, such as .*shared_experts"
    ):
        targets_of(model, Components(model), "language", Lora(mode="lora", targets=("gate_proj",)))


def test_a_router_that_inherits_from_a_linear_layer_gets_no_adapter() -> None:
    sizes = DECODER_SIZES | {"num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 32}
    model = Llama4ForCausalLM(Llama4TextConfig(**sizes))
    assert any(name.endswith("router") and isinstance(m, nn.Linear) for name, m in model.named_modules())
    targets = targets_of(model, Components(model), "language", Lora(mode="lora"))
    assert {name.rpartition(".")[2] for name in targets.modules} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }


MOVED = ComponentModules(
    projector=("model.visual.patch_embed", "model.language_model.embed_tokens"),
    language=("model.visual.merger.ln_q.weight",),
)


def test_named_modules_and_parameters_belong_to_the_component_that_names_them(model_dirs: dict[str, Path]) -> None:
    model = load("qwen2_5_vl", model_dirs)
    components = Components(model, MOVED)
    patterns = {
        "projector": r"model\.visual\.(patch_embed|merger\.(?!ln_q))|model\.language_model\.embed_tokens",
        "vision": r"model\.visual\.blocks",
        "language": r"model\.visual\.merger\.ln_q|model\.language_model\.(?!embed)|lm_head",
    }
    for name, _ in model.named_parameters():
        (expected,) = (component for component, pattern in patterns.items() if re.match(pattern, name))
        assert components.component_of(name) == expected, name
    assert set(components.roots("projector")) == {"model.visual.merger", *MOVED.projector}
    total = sum(p.numel() for p in model.parameters())
    tune = Tune.model_validate({"projector": {"mode": "full"}})
    _, report = apply_tune(model, components, tune)
    assert sum(row.trainable + row.frozen for row in report) == total
    (projector,) = (row for row in report if row.component == "projector")
    assert projector.trainable == sum(
        p.numel() for n, p in model.named_parameters() if re.match(patterns["projector"], n)
    )


def test_a_name_that_the_model_does_not_have_is_refused_with_close_ones(model_dirs: dict[str, Path]) -> None:
    model = load("llava", model_dirs)
    with pytest.raises(UserError) as refused:
        Components(model, ComponentModules(vision=("model.multi_modal_projektor",)))
    assert str(refused.value).startswith(
        "tune.components.vision: the model has no module called 'model.multi_modal_projektor'; "
        "did you mean 'model.multi_modal_projector' or "
    )
    with pytest.raises(ValidationError, match=r"a\.b: named twice; each belongs to one component"):
        ComponentModules(vision=("a.b",), projector=("a.b",))


def test_a_vision_tower_that_is_not_found_can_be_named(
    model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("qwen2_5_vl", model_dirs)
    expected = {name: Components(model).component_of(name) for name, _ in model.named_parameters()}
    monkeypatch.setattr(model, "get_encoder", lambda modality: None)
    model.config.vision_config = deepcopy(model.config.vision_config)
    with pytest.raises(
        UserError,
        match=r"name its modules in tune\.components, such as tune\.components=.\{vision: \[model\.visual\]\}",
    ):
        Components(model)
    named = Components(model, ComponentModules(vision=("model.visual",)))
    assert {name: named.component_of(name) for name, _ in model.named_parameters()} == expected


def test_features_are_cached_only_where_nothing_that_makes_them_is_trained(
    make_config: Callable[..., Config],
) -> None:
    def config(mode: dict[str, Any], names: dict[str, list[str]]) -> Config:
        return make_config("qwen2_5_vl", {"language": mode, "projector": {"mode": "frozen"}, "components": names})

    inside = {"language": ["model.visual.merger"]}
    assert caches_features(config(LORA, {}), 1)
    assert caches_features(config(LORA, {"projector": ["model.visual.patch_embed"]}), 1)
    assert not caches_features(config(LORA, inside), 1)


def test_the_start_names_the_modules_of_each_component(make_config: Callable[..., Config]) -> None:
    tune = {"projector": {"mode": "full"}, "components": {"projector": ["model.visual.patch_embed"]}}
    config = make_config("qwen2_5_vl", tune)
    learner, dataset = learner_for(config)
    assert list(start_report(config, dataset, learner))[1:4] == [
        "vision: model.visual",
        "projector: model.visual.merger, model.visual.patch_embed",
        "language: lm_head, model.language_model",
    ]
