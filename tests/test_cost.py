"""What a sample costs, against the multiply-additions that torch counts while it is computed."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from mmtrain.config.schema import Config
from mmtrain.config.tune_section import Tune
from mmtrain.dataset.batch import Batch, Loader
from mmtrain.encoding.load import load_processor
from mmtrain.model.components import Components
from mmtrain.model.cost import cost_model
from mmtrain.model.family import Family, probe_family
from mmtrain.model.inputs import InputMaker
from mmtrain.model.load import load_model, model_structure
from mmtrain.model.loss import supervised_nll
from mmtrain.model.tune import apply_tune
from mmtrain.model.vision_cost import _solved
from mmtrain.progress import QUIET
from mmtrain.train.dataset import Dataset
from support.builders import TINY
from support.learning import ALL_FULL, LORA, MIXED, learner_for

FULL = {"mode": "full"}
TUNES: dict[str, dict[str, Any]] = {
    "language lora": {"language": LORA},
    "projector full": {"projector": FULL, "language": LORA},
    "vision full": {"vision": FULL, "language": LORA},
    "mixed": MIXED,
    "vision alone": {"vision": FULL},
    "all full": ALL_FULL,
}


def in_place(_: Any, a: list[int], b: list[int], **ignored: Any) -> int:
    """What torch leaves uncounted: products that are added to what is there."""
    return 2 * math.prod(a) * b[-1]


def by_name(x: list[int], weight: list[int], *ignored: Any, **others: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def counter_of_products() -> FlopCounterMode:
    kinds = dict.fromkeys((torch.ops.aten.addmm_, torch.ops.aten.baddbmm_), in_place)
    return FlopCounterMode(display=False, custom_mapping={**kinds, torch.ops.mkldnn._linear_pointwise: by_name})


def measured(model: Any, make_inputs: InputMaker, batch: Batch) -> float:
    """Multiply-additions of a forward and a backward pass, the head left out."""
    base = getattr(model, "get_base_model", lambda: model)().base_model
    with counter_of_products() as counter:
        base(**make_inputs(batch)).last_hidden_state.pow(2).sum().backward()
    return float(counter.get_total_flops() / 2)


def first_inputs(base: Any) -> int:
    """Multiply-additions a token of the gradients that nothing before the first layer asks for."""
    attention = base.get_decoder().layers[0].self_attn
    weights = [weight for part in "qkv" for weight in getattr(attention, f"{part}_proj").named_parameters()]
    return sum(weight.numel() for name, weight in weights if weight.ndim == 2 and "lora_B" not in name)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("language lora", "mixed") else pytest.mark.slow("more ways to train"))
        for name in TUNES
    ],
)
def test_a_sample_costs_what_torch_counts(kind: str, name: str, make_config: Callable[..., Config]) -> None:
    """Within 6 % (measured: 5.6, where vision and projector are trainable); the first layer's only input is images."""
    if kind == "text" and name not in ("language lora", "all full"):
        pytest.skip("a model of text alone has one part")
    config = make_config(kind, {"language": TUNES[name]["language"]} if kind == "text" else TUNES[name])
    processor = load_processor(config.model.path)
    dataset = Dataset(config, processor, QUIET)
    base = load_model(config.model.path, "float32", processor)
    base.set_attn_implementation("eager")  # the one that torch counts on every device
    family = probe_family(base, processor, print)
    model, _ = apply_tune(base, family.components, config.tune)
    costs = cost_model(base, family, config.tune)
    make_inputs, checked = InputMaker(model, processor), dataset.checked
    for sample in (1, 2, 3, 5):
        tokens, images = checked.num_tokens[sample], checked.num_image_tokens[sample]
        if name == "vision alone" and not images:
            continue  # it is not trained on
        found = measured(model, make_inputs, Loader(dataset.train, dataset.encoder.processor, True).load([sample]))
        if name == "language lora" or (name != "all full" and not images):
            found += float(tokens) * first_inputs(base)
        found -= costs.token_pair * float(tokens) ** 2  # what lies after the causal mask is computed here
        assert found == pytest.approx(float(costs.of(tokens, images, checked.image_token_pairs[sample])), rel=0.06)


@pytest.mark.slow("steps are measured")
def test_a_supervised_token_costs_what_torch_counts_in_the_head(kind: str, make_config: Callable[..., Config]) -> None:
    """Exactly: forward and backward for the input, which the chunks compute at once; and the last layer's MLP, with its
    adapters' own gradients, where a token is trained on and nowhere else."""
    config = make_config(kind, {"language": LORA})
    learner, dataset = learner_for(config)
    base = learner.model.get_base_model()
    costs = cost_model(base, Family(Components(base), "plain"), config.tune)
    batch = Loader(dataset.train, dataset.encoder.processor, True).load([1])
    with counter_of_products() as counter:
        nll, _ = supervised_nll(learner.model, learner.head_kind, learner.make_inputs(batch), batch)
        nll.sum().backward()  # type: ignore[no-untyped-call]
    body = measured(learner.model, learner.make_inputs, batch)
    num_supervised, num_tokens = int(batch.supervised.sum()), batch.input_ids.numel()
    mlp = base.get_decoder().layers[-1].mlp
    at_labels = sum((3 if "lora" in name else 2) * weight.numel() for name, weight in mlp.named_parameters())
    assert costs.supervised == at_labels + 2 * base.get_output_embeddings().weight.numel()
    assert counter.get_total_flops() / 2 - body == costs.supervised * num_supervised - at_labels * num_tokens


def test_what_is_looked_up_costs_nothing() -> None:
    """Worked out by hand from the tiny model's config: 4 layers, q and o of 128², k and v of 128 x 64, 3 of 128 x 352;
    4 layers of images, 4 of 96² and 3 of 96 x 256, patches of 3 x 2 x 8², 4 patches a token, 2 layers in windows."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(TINY))
    tune = Tune.model_validate({"language": {"mode": "full"}})
    components = Components(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(components.component_of(name) == "language")
    attention = 2.0 * 2 * 96, 2.0 * 2 * 64 * 96
    costs = cost_model(model, Family(components, "plain", patches_per_token=4, image_attention=attention), tune)
    assert costs.token == 3 * 4 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 352)
    assert costs.token_pair == 3 * 4 * 128
    vision = 4 * (4 * (4 * 96 * 96 + 3 * 96 * 256) + 384 * 96 + 2 * 2 * 64 * 96)
    assert costs.image_token == vision + (4 * 96) ** 2 + 4 * 96 * 128
    assert costs.image_token_pair == 2 * 2 * 96 * 4**2
    assert costs.supervised == 3 * 128 * model.config.text_config.vocab_size


def test_the_width_of_attention_is_that_of_its_heads(model_dirs: dict[str, Path]) -> None:
    config = AutoConfig.from_pretrained(model_dirs["text"], head_dim=32)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    costs = cost_model(model, Family(Components(model), "plain"), Tune.model_validate({"language": LORA}))
    assert costs.token_pair == 3 * 2 * 4 * 32


def implementations(model: Any) -> dict[str, str]:
    """The kind of attention by module."""
    return {name: m.config._attn_implementation for name, m in model.named_modules() if hasattr(m, "config")}


@pytest.mark.slow("steps are measured")
def test_the_attention_to_images_is_measured(model_dirs: dict[str, Path]) -> None:
    """Worked out by hand. Qwen2.5-VL: one of 2 layers attends to the whole image, one within windows of 8 x 8 patches;
    both are 96 wide. Images have 14 and 28 patches a side: 8 + 6, and 8 + 8 + 8 + 4. LLaVA-1.5: 3 layers,
    32 wide, and every image has 16 patches and a class token."""

    def found(kind: str) -> tuple[float, float]:
        processor = load_processor(str(model_dirs[kind]))
        model = load_model(str(model_dirs[kind]), "float32", processor)
        before, lines = implementations(model), list[str]()
        measured = probe_family(model, processor, lines.append).image_attention
        assert lines == []
        assert implementations(model) == before
        return measured

    small, large = 14**2, 28**2
    windows = (8**2 + 6**2) ** 2 / small, (3 * 8**2 + 4**2) ** 2 / large
    pairs = 2 * 96 * (1 + (windows[1] - windows[0]) / (large - small))
    each = 2 * 96 * (small + windows[0]) - pairs * small
    assert found("qwen2_5_vl") == pytest.approx((pairs, each), rel=1e-9)
    assert found("llava") == pytest.approx((3 * 2 * 17**2 * 32 / 16**2, 0.0), rel=1e-9)
    assert found("text") == (0.0, 0.0)
    path = str(model_dirs["qwen2_5_vl"])
    without_weights, processor = model_structure(path), load_processor(path)
    with torch.device("meta"):
        family = probe_family(without_weights, processor, print)
    assert family.image_attention == pytest.approx((pairs, each), rel=1e-9)
    assert {parameter.device.type for parameter in without_weights.parameters()} == {"meta"}


def test_costs_are_never_negative() -> None:
    """8 n² and 3 n of two images; and a cost that grows more than with n², as where patches are counted wrong."""
    assert _solved([(10.0, 830.0), (20.0, 3260.0)]) == pytest.approx((8.0, 3.0))
    assert _solved([(10.0, 100.0), (20.0, 1000.0)]) == (2.5, 0.0)
    assert _solved([(10.0, 700.0), (10.0, 700.0)]) == (7.0, 0.0)
