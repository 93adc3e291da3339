"""QLoRA: the laws of training hold with the language model in 4 bits, and everything counts its weights right."""

import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from mmtrain.config import load_config
from mmtrain.config.schema import Config
from mmtrain.dataset.batch import Loader
from mmtrain.encoding.load import load_processor
from mmtrain.errors import LostGradientError, UserError
from mmtrain.evaluate.evaluation import ModelScoring
from mmtrain.inspect_labels.losses import token_losses
from mmtrain.model.cost import cost_model
from mmtrain.model.family import probe_family
from mmtrain.model.kernels.trial import kernel_of
from mmtrain.model.load import load_model
from mmtrain.model.tune import apply_tune
from mmtrain.scoring.statistics import summary
from mmtrain.train import chat as chat_module
from mmtrain.train.export import export
from mmtrain.train.lost_gradients import missing_gradients_are_errors
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
            batch = Loader(dataset.train, dataset.encoder.processor, packing=False).load([sample])
            logits = reference(**learner.make_inputs(batch)).logits[0, :-1]
            labels = batch.input_ids[0].masked_fill(~batch.supervised[0], -100)[1:]
            total += float(F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
    expected = total / int(dataset.checked.num_supervised[:8].sum())
    loss, _ = step_of(learner, dataset, CUTS["3+5"], packing=True)
    assert loss == pytest.approx(expected, rel=1e-5)  # measured: at most 2e-7
    full, _ = step_of(*learner_for(without_quantization(config)), CUTS["3+5"], packing=True)
    assert abs(full - loss) > 1e-4 * full  # so that it was quantized at all


@pytest.mark.slow("steps with a quantized model")
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


@pytest.mark.slow("steps with a quantized model")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_and_checkpointing_compute_the_same(dtype: str, make_quantized: Make) -> None:
    """Adapters and gates have kernels on quantized layers too."""
    settings_of: dict[str, dict[str, Any]] = {
        "plain": {"kernels": "off"},
        "kernels": {},
        "checkpointing": {"activation_checkpointing": True},
    }
    found = {}
    for name, settings in settings_of.items():
        learner, dataset = learner_for(make_quantized("text", dtype=dtype, **settings))
        kernels = [type(kernel).__name__ for one in learner.model.modules() if (kernel := kernel_of(one)) is not None]
        assert (kernels.count("AdaptedLinear"), kernels.count("Gated")) == ((0, 0) if name == "plain" else (14, 2))
        found[name] = step_of(learner, dataset, CUTS["3+5"], packing=True)
    loss, gradients = found["plain"]
    for other_loss, other_gradients in found.values():
        assert other_loss == pytest.approx(loss, rel={"float32": 1e-6, "bfloat16": 2e-3}[dtype])
        assert relative_l2(other_gradients, gradients) < {"float32": 1e-5, "bfloat16": 0.03}[dtype]
    assert relative_l2(found["checkpointing"][1], found["kernels"][1]) == 0


def test_only_language_layers_are_quantized(kind: str, make_quantized: Make) -> None:
    config = make_quantized(kind)
    model = load_model(config.model.path, "float32", load_processor(config.model.path), quantization="nf4")
    found = {name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    expected = {name for name, _ in model.named_modules() if re.fullmatch(LANGUAGE_LAYER[kind], name)}
    assert found == expected
    assert len(found) == 14
    assert all(module.weight.quant_state.nested for module in model.modules() if hasattr(module, "quant_state"))


def test_weights_are_counted_as_if_they_were_not_quantized(kind: str, make_quantized: Make) -> None:
    config = make_quantized(kind, None if kind == "text" else MIXED)
    processor, found = load_processor(config.model.path), []
    for quantized in (None, "nf4"):
        base = load_model(config.model.path, "float32", processor, quantization=quantized)
        family = probe_family(base, processor, print)
        model, report = apply_tune(base, family.components, config.tune)
        language = report[-1]
        found.append(([replace(row, quantized=0) for row in report], cost_model(base, family, config.tune)))
        weights = model.get_base_model().get_decoder().layers[0].mlp.down_proj.base_layer.weight
    assert found[0] == found[1]
    modules = model.get_base_model().named_modules()
    sizes = [one.in_features * one.out_features for name, one in modules if re.fullmatch(LANGUAGE_LAYER[kind], name)]
    assert language.quantized == sum(sizes) > 0
    assert all(row.quantized == 0 for row in report[:-1])
    assert weights.numel() * 2 == weights.quant_state.shape.numel()  # the last one is quantized


@pytest.mark.slow("runs with a quantized model")
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


@pytest.mark.slow("runs with a quantized model")
def test_another_version_of_the_quantizer_is_refused_on_resume(
    make_quantized: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_quantized("text", steps=2, batch_size=2)
    train(config)
    shutil.rmtree(Path(config.run.output_dir) / "adapter")
    with pytest.raises(UserError, match=r"model\.quantization: was 'nf4' and is not set"):
        train(without_quantization(config))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9")
    with pytest.raises(UserError, match=r"model\.quantizer: was .*blocks of 64, double quantization, bitsandbytes 0"):
        train(config)


def switch_repacking_on(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = True


@pytest.mark.slow("steps with a quantized model")
@pytest.mark.skipif(not bitsandbytes.functional.has_avx512bf16(), reason="only where the CPU has AVX512-BF16")
@pytest.mark.filterwarnings("ignore:bitsandbytes")  # torch warns of what is tried here, once
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_evaluation_takes_no_gradients_away(dtype: str, make_quantized: Make) -> None:
    """bitsandbytes repacks the weights at the first call without gradients, unless it is switched off."""
    for repacks in (False, True):
        learner, dataset = learner_for(make_quantized("text", dtype=dtype, kernels="off"))
        if repacks:
            switch_repacking_on(learner.model)
        batch = Loader(dataset.train, dataset.encoder.processor, packing=True).load([0])
        with torch.no_grad(), learner.runtime.autocast():
            learner.model(**learner.make_inputs(batch))
        if repacks:
            error = r"step 3: the operator .*bitsandbytes::gemv_4bit"
            with missing_gradients_are_errors(), pytest.raises(LostGradientError, match=error):
                step_of(learner, dataset, [[0, 1]], packing=True)
        else:
            _, gradients = step_of(learner, dataset, [[0, 1]], packing=True)
            assert all(gradient.any() for gradient in gradients.values())


CHECK = """
logits = model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10]]), use_cache=False).logits
import json, sys
json.dump(logits[0].tolist(), open(sys.argv[1], "w"))
"""


@pytest.mark.slow("runs with a quantized model")
def test_the_code_of_the_card_loads_the_adapter_on_the_quantized_base(
    make_quantized: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_quantized("qwen2_5_vl", MIXED, steps=2, batch_size=4)
    trained: list[Tensor] = []

    @torch.no_grad()
    def noting(learner: Any, *args: Any) -> str:
        trained.append(learner.model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10]]), use_cache=False).logits[0].clone())
        return export(learner, *args)

    monkeypatch.setattr(chat_module, "export", noting)
    train(config)
    folder = Path(config.run.output_dir) / "adapter"
    card = (folder / "README.md").read_text()
    assert "Load it quantized too" in card
    code, _ = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    # with gradients bitsandbytes computes in float32; without, on some CPUs, in a format of 16 bits
    code += "model.get_input_embeddings().requires_grad_()"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code + CHECK, str(tmp_path / "logits.json")]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found = torch.tensor(json.loads((tmp_path / "logits.json").read_text()))
    assert (found - trained[0]).norm() <= 1e-5 * trained[0].norm()


@pytest.mark.slow("runs with a quantized model")
def test_evaluation_and_token_losses_use_the_quantized_model(make_quantized: Make) -> None:
    config = make_quantized("qwen2_5_vl", steps=2, batch_size=4)
    train(config)
    output = Path(config.run.output_dir)
    last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    evaluation = ModelScoring(config, adapters=[str(output)])
    with evaluation.model(str(output)) as model:
        assert summary(evaluation.scores(model))["nll"] == pytest.approx(last["nll"], rel=1e-6)
    losses = token_losses(
        config, output, evaluation.eval_samples.samples, evaluation.eval_samples.encoder.processor, range(8)
    )
    values = [value for of_sample in losses.values() for value in of_sample.values()]
    assert sum(values) / len(values) == pytest.approx(last["nll"], rel=1e-6)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["tune.language={mode: full}"], r"tune\.language is full: set it to lora"),
        (["tune={projector: {mode: full}}"], r"no component has mode: lora"),
        (["run.weights=shard"], r"does not work with run\.weights: shard"),
        (["model.quantization=int8"], r"model\.quantization: expected 'nf4'"),
    ],
)
def test_what_cannot_be_quantized_is_refused_in_one_line(
    overrides: list[str], expected: str, make_quantized: Make, tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(make_quantized("qwen2_5_vl").model_dump(mode="json")))
    with pytest.raises(UserError, match=expected) as caught:
        load_config(file, overrides)
    assert len(caught.value.faults) == 1


def test_a_missing_package_is_named_before_anything_is_read(
    make_quantized: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_quantized("text")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'bitsandbytes is not installed.*pip install "mmtrain\[qlora\]"') as caught:
        train(config)
    assert len(caught.value.faults) == 1


def stored_quantized(source: Path, folder: Path, method: str, **settings: Any) -> Path:
    """A copy of a model whose config.json says that its weights are stored quantized."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("method", "wanted"),
    [("bitsandbytes", None), ("bitsandbytes", "nf4"), ("fp8", "nf4"), ("gptq", None), ("awq", None)],
)
def test_weights_that_are_stored_quantized_are_refused(
    method: str, wanted: str | None, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    folder = stored_quantized(model_dirs["text"], tmp_path / "stored", method, load_in_4bit=True, bits=4)
    with pytest.raises(UserError, match=rf"stored quantized \('{method}'\): expected the original model"):
        load_model(str(folder), "float32", load_processor(str(folder)), quantization=wanted)


def test_weights_that_are_stored_in_8_bit_floats_are_dequantized_and_one_line_says_so(
    model_dirs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    block = [16, 16]
    settings = {"activation_scheme": "dynamic", "weight_block_size": block, "modules_to_not_convert": ["lm_head"]}
    folder = stored_quantized(model_dirs["text"], tmp_path / "stored", "fp8", **settings)
    weights = load_file(folder / "model.safetensors")
    expected = {}
    for name in [name for name in weights if name.endswith("proj.weight")]:
        rows, columns = weights[name].shape
        shape = (rows // block[0], block[0], columns // block[1], block[1])
        scale = weights[name].float().view(shape).abs().amax((1, 3), keepdim=True) / 448
        stored = (weights[name].float().view(shape) / scale).to(torch.float8_e4m3fn)
        expected[name] = (stored.float() * scale).view(rows, columns)
        weights[name] = stored.view(rows, columns)
        weights[f"{name}_scale_inv"] = scale[:, 0, :, 0].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with caplog.at_level(logging.INFO):
        model = load_model(str(folder), "float32", load_processor(str(folder)))
    assert len(expected) > 10
    for name, weight in expected.items():
        torch.testing.assert_close(model.get_parameter(name), weight, rtol=1e-6, atol=1e-7)
    (line,) = [line for line in caplog.messages if "quantized" in line]
    assert line == f"{folder}: the weights are stored quantized ('fp8'): dequantized while they are read"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_quantized_weight_that_is_not_finite_is_refused(
    value: float, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(model_dirs["text"], tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][7, 5] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj.*NaN or infinite"):
        load_model(str(folder), "float32", load_processor(str(folder)), quantization="nf4")
