"""Loading a model directory: nothing of it is run, and what is wrong with it is said by name, in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmtrain.config.schema import Config
from mmtrain.encoding.load import load_processor
from mmtrain.errors import UserError
from mmtrain.model.load import checkpoint_activations, load_config, load_model
from support.builders import MAKERS
from support.learning import LORA, learner_for, step_of


@pytest.fixture
def text_model(tmp_path: Path) -> Path:
    return MAKERS["text"](tmp_path / "model")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_weights_that_are_not_finite_are_refused_by_name(name: str, value: float, text_model: Path) -> None:
    processor = load_processor(str(text_model))
    load_model(str(text_model), "bfloat16", processor)
    file = text_model / "model.safetensors"
    weights = load_file(file)
    weights[name].view(-1)[-1] = value
    save_file(weights, file, {"format": "pt"})
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(UserError, match=f"1 weights have values that are NaN or infinite, such as '{name}'"):
            load_model(str(text_model), dtype, processor)


def write_config(path: Path, change: dict[str, Any]) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))


def test_code_in_a_model_directory_is_not_run(
    text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an explicit no, transformers asks on the terminal."""
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    ran = tmp_path / "ran"
    (text_model / "own.py").write_text(f"open({str(ran)!r}, 'w')\nfrom transformers import Qwen3Config as Own\n")
    write_config(text_model, {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}})
    with pytest.raises(UserError, match="the model needs code that is in its directory"):
        load_config(str(text_model))
    assert not ran.exists()


def test_what_is_wrong_with_a_config_is_not_cut_off(text_model: Path) -> None:
    write_config(text_model, {"hidden_size": "many"})
    with pytest.raises(UserError, match=r"hidden_size.*many") as refused:
        load_config(str(text_model))
    assert "\n" not in str(refused.value)


def test_weights_that_do_not_fit_are_reported_in_one_line(text_model: Path) -> None:
    processor = load_processor(str(text_model))
    write_config(text_model, {"intermediate_size": 96})
    with pytest.raises(UserError, match=r"weights have other shapes than config\.json requires") as refused:
        load_model(str(text_model), "float32", processor)
    assert "\n" not in str(refused.value)


def test_a_family_without_checkpointing_says_so() -> None:
    class Without:
        def activation_checkpointing_enable(self, settings: dict[str, bool]) -> None:
            raise ValueError("Without is not compatible:\n  see above")

    with pytest.raises(UserError, match="Without is not compatible: see above; set it to false"):
        checkpoint_activations(Without())


@pytest.mark.slow("steps under several settings")
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava"])
def test_with_checkpointing_a_frozen_vision_tower_is_computed_once(
    kind: str, make_config: Callable[..., Config]
) -> None:
    off = {"memory_gib": 0, "disk_gib": 0}
    config = make_config(kind, {"language": LORA}, activation_checkpointing=True, image_cache=off)
    learner, dataset = learner_for(config)
    tower = learner.model.get_base_model().get_encoder(modality="image")
    layers = next(module for module in tower.modules() if isinstance(module, torch.nn.ModuleList))
    decoder = learner.model.get_base_model().get_decoder()
    seen: dict[str, list[bool]] = {"vision": [], "language": []}
    layers[0].register_forward_pre_hook(lambda module, args: seen["vision"].append(args[0].requires_grad))
    decoder.layers[1].mlp.register_forward_pre_hook(lambda module, args: seen["language"].append(args[0].requires_grad))
    step_of(learner, dataset, [list(range(8))], True)
    assert seen["vision"] == [False]  # computed once, and no gradient passes
    assert len(seen["language"]) == 2  # what is trained is computed again


@pytest.mark.slow("steps under several settings")
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava"])
def test_with_checkpointing_features_are_cached(kind: str, make_config: Callable[..., Config]) -> None:
    learner, _ = learner_for(make_config(kind, {"language": LORA}, activation_checkpointing=True))
    assert learner.make_inputs.features is not None


def test_reading_weights_counts_as_progress(text_model: Path) -> None:
    processor, ticks = load_processor(str(text_model)), list[int]()
    model = load_model(str(text_model), "float32", processor, tick=lambda: ticks.append(1))
    assert len(ticks) >= 2 * len(model.state_dict())  # as each is read, and as its values are checked


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="the mappings of a process are found in /proc")
def test_processes_share_the_memory_of_weights_in_the_type_of_their_file(text_model: Path) -> None:
    """They are mapped from the file, so the kernel stores them once for all processes."""
    model = load_model(str(text_model), "float32", load_processor(str(text_model)))
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "model.safetensors" in line]
    mapped = [tuple(int(end, 16) for end in fields[0].split("-")) for fields in maps]
    weights = list(model.parameters())
    assert weights
    assert all(any(start <= weight.data_ptr() < end for start, end in mapped) for weight in weights)
