"""QLoRA: the laws of training hold with the language model in 4 bits, and everything counts its weights right."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from mmtrain.config.schema import Config
from mmtrain.dataset.batch import Loader
from mmtrain.encoding.load import load_processor
from mmtrain.model import quantization
from mmtrain.model.components import prepare_learning
from mmtrain.model.cost import cost_model
from mmtrain.model.load import load_model
from mmtrain.train.run import train
from support.learning import LORA, MIXED, learner_for, relative_l2, step_of

bitsandbytes = pytest.importorskip("bitsandbytes")

LANGUAGE_LAYER = {
    "qwen2_5_vl": r"model\.language_model\.layers\..*_proj",
    "llava": r"model\.language_model\.layers\..*_proj",
    "text": r"model\.layers\..*_proj",
}
"""The linear layers of the language model in each architecture, written down from the models' own module trees."""
CUTS = {
    "1x8": [[0, 1, 2, 3, 4, 5, 6, 7]],
    "8x1": [[7], [2], [0], [1], [6], [5], [4], [3]],
    "3+5": [[6, 1, 3], [0, 7, 2, 5, 4]],
}
Make = Callable[..., Config]


@pytest.fixture
def make_quantized(make_config: Make) -> Make:
    def make(kind: str, tune: dict[str, Any] | None = None, dtype: str = "float32", **settings: Any) -> Config:
        config = make_config(kind, tune, **settings).model_dump()
        config["model"] |= {"quantization": "nf4", "dtype": dtype}
        config["data"]["eval"] = [{"path": config["data"]["train"][0]["path"], "name": "held-out"}]
        return Config.model_validate(config)

    return make


def without_quantization(config: Config) -> Config:
    data = config.model_dump()
    data["model"]["quantization"] = None
    return Config.model_validate(data)


def dequantized(config: Config, kind: str) -> Any:
    """transformers' own model, its language layers replaced by what NF4 makes of them."""
    auto = AutoModelForCausalLM if kind == "text" else AutoModelForImageTextToText
    model = auto.from_pretrained(config.model.path, dtype=torch.float32).eval()
    functional = bitsandbytes.functional
    for name, module in model.named_modules():
        if re.fullmatch(LANGUAGE_LAYER[kind], name):
            stored, state = functional.quantize_4bit(
                module.weight.data, blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            module.weight.data = functional.dequantize_4bit(stored, state)
    return model


def add_adapters(model: Any, weights: dict[str, Tensor], scaling: float) -> None:
    """Add scaling B A (Hu et al. 2021, section 4.1) of the trained model's `weights` to the layers of `model`."""
    for name, a in weights.items():
        if ".lora_A." in name:
            b = weights[name.replace(".lora_A.", ".lora_B.")]
            layer = name.removeprefix("base_model.model.").partition(".lora_A.")[0]
            model.get_submodule(layer).weight.data += scaling * b @ a


def test_the_loss_is_that_of_the_dequantized_weights(kind: str, make_quantized: Make) -> None:
    """Per sample, by transformers alone: all logits, shifted, in float32."""
    config = make_quantized(kind)
    learner, dataset = learner_for(config)
    reference = dequantized(config, kind)
    total = 0.0
    with torch.no_grad():
        add_adapters(reference, dict(learner.model.named_parameters()), scaling=2.0)
        for sample in range(8):
            batch = Loader(dataset.train, packing=False).load([sample])
            logits = reference(**learner.make_inputs(batch)).logits[0, :-1]
            labels = batch.input_ids[0].masked_fill(~batch.supervised[0], -100)[1:]
            total += float(F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
    expected = total / int(dataset.checked.num_supervised[:8].sum())
    loss, _ = step_of(learner, dataset, CUTS["3+5"], packing=True)
    assert loss == pytest.approx(expected, rel=1e-5)  # measured: at most 2e-7
    full, _ = step_of(*learner_for(without_quantization(config)), CUTS["3+5"], packing=True)
    assert abs(full - loss) > 1e-4 * full  # so that it was quantized at all


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_no_cut_changes_loss_or_gradient(kind: str, variant: str, make_quantized: Make) -> None:
    language = {**LORA, "variant": variant, "dropout": 0.1}
    others = {} if kind == "text" else {**MIXED, "vision": {**LORA, "variant": variant}}
    learner, dataset = learner_for(make_quantized(kind, {**others, "language": language}))
    assert learner.packing
    loss, gradients = step_of(learner, dataset, CUTS["1x8"], packing=True)
    assert all(gradient.any() for name, gradient in gradients.items() if "language_model" in name)
    for cuts in CUTS.values():
        for packing in (True, False):
            other_loss, other_gradients = step_of(learner, dataset, cuts, packing)
            assert abs(other_loss - loss) <= 1e-5 * loss
            assert relative_l2(other_gradients, gradients) <= 1e-5  # measured: at most 1e-6


def test_only_language_layers_are_quantized(kind: str, make_quantized: Make) -> None:
    config = make_quantized(kind)
    model = load_model(config.model.path, "float32", load_processor(config.model.path), "nf4")
    found = {name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    expected = {name for name, _ in model.named_modules() if re.fullmatch(LANGUAGE_LAYER[kind], name)}
    assert found == expected
    assert len(found) == 14
    assert all(module.weight.quant_state.nested for module in model.modules() if hasattr(module, "quant_state"))
    (line,) = quantization.quantization_lines(model)
    assert "14 linear layers" in line


def test_weights_are_counted_as_if_they_were_not_quantized(kind: str, make_quantized: Make) -> None:
    config = make_quantized(kind, None if kind == "text" else MIXED)
    processor, found = load_processor(config.model.path), []
    for quantized in (None, "nf4"):
        base = load_model(config.model.path, "float32", processor, quantized)
        model, components, report = prepare_learning(base, config.tune)
        found.append((report, cost_model(base, components, config.tune)))
        weights = model.get_base_model().get_decoder().layers[0].mlp.down_proj.base_layer.weight
    assert found[0] == found[1]
    assert weights.numel() * 2 == weights.quant_state.shape.numel()  # the last one is quantized


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_repeats_and_resumes_bit_for_bit(dtype: str, make_quantized: Make, tmp_path: Path) -> None:
    settings = {"steps": 4, "batch_size": 3, "checkpoint_every": 2, "eval_every": 2}

    def run(name: str) -> Path:
        train(make_quantized("qwen2_5_vl", MIXED, dtype, output_dir=str(tmp_path / name), **settings))
        return tmp_path / name

    def result(folder: Path) -> list[bytes]:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        kept = [{key: row.get(key) for key in ("step", "loss", "grad_norm", "perplexity")} for row in rows]
        last = folder / "checkpoints" / "step-000004"
        return [
            json.dumps(kept).encode(),
            *((last / f"{n}.safetensors").read_bytes() for n in ("trainable", "optimizer")),
        ]

    first, second = run("first"), run("second")
    assert result(first) == result(second)
    for path in ("adapter", "checkpoints/step-000004"):
        shutil.rmtree(second / path)
    run("second")
    assert result(first) == result(second)
