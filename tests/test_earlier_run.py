"""model.adapter: a run that starts from the trained weights of an earlier one, or is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from mmtrain.config import load_config
from mmtrain.config.schema import Config
from mmtrain.encoding.load import load_processor
from mmtrain.errors import UserError
from mmtrain.progress import QUIET
from mmtrain.runtime.processes import Runtime
from mmtrain.train.run import train
from mmtrain.train.trainable import TrainableModel, make_trainable
from support.builders import randomized
from support.learning import LORA, MIXED

MakeConfig = Callable[..., Config]
PROJECTOR: dict[str, Any] = {"projector": {"mode": "full"}}
BOTH: dict[str, Any] = {**PROJECTOR, "language": LORA}


def trained(config: Config) -> Path:
    train(config)
    return Path(config.run.output_dir)


def after(config: Config, earlier: Path, tune: dict[str, Any] | None = None, **model: Any) -> Config:
    """`config` with another `tune`, starting from an earlier run, in a folder of its own."""
    data = config.model_dump()
    data["model"] |= {"adapter": str(earlier), **model}
    data["tune"] = tune or data["tune"]
    data["run"]["output_dir"] = str(earlier.parent / "after")
    return Config.model_validate(data)


def started(config: Config) -> TrainableModel:
    return make_trainable(config, load_processor(config.model.path), Runtime(config.model.dtype), QUIET)


def weights_in(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def evaluations(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["nll"] for row in rows if "eval" in row]


def with_eval(config: Config) -> Config:
    data = config.model_dump()
    data["data"]["eval"] = [{"path": config.data.train[0].path}]
    return Config.model_validate(data)


@pytest.mark.slow("several runs")
@pytest.mark.parametrize("tune", [{"language": LORA}, pytest.param(MIXED, marks=pytest.mark.slow("trains again"))])
def test_an_adapter_is_continued_with_a_fresh_optimizer(tune: dict[str, Any], make_config: MakeConfig) -> None:
    config = with_eval(make_config("qwen2_5_vl", tune, steps=3))
    earlier = trained(config)
    run = trained(after(config, earlier))
    assert evaluations(run)[0] == pytest.approx(evaluations(earlier)[-1], rel=1e-5)
    model = started(after(config, earlier)).model
    found, expected = get_peft_model_state_dict(model, save_embedding_layers=False), weights_in(earlier / "adapter")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    first = load_file(run / "checkpoints" / "step-000003" / "optimizer.safetensors")
    steps = {float(value) for name, value in first.items() if name.endswith("|step")}
    assert steps == {3.0}  # not 6: the moments of the earlier run are not continued
    # the result stands alone: base + its adapter
    base = AutoModelForImageTextToText.from_pretrained(config.model.path)
    both = PeftModel.from_pretrained(base, str(run / "adapter"))
    assert both.peft_config["default"].base_model_name_or_path == str(Path(config.model.path).resolve())
    card = (run / "adapter" / "README.md").read_text()
    assert "- started from the trained weights of an earlier run" in card
    assert str(earlier) not in card


@pytest.mark.slow("several runs")
def test_a_component_trained_in_full_continues_next_to_new_adapters(make_config: MakeConfig) -> None:
    """The two stages of LLaVA: the projector alone, then the projector and LoRA on the language model."""
    config = with_eval(make_config("llava", PROJECTOR, steps=3))
    earlier = trained(config)
    run = trained(after(config, earlier, BOTH))
    assert evaluations(run)[0] == pytest.approx(evaluations(earlier)[-1], rel=1e-5)
    model = started(after(config, earlier, BOTH)).model
    complete = AutoModelForImageTextToText.from_pretrained(earlier / "model").state_dict()
    found = {name: value for name, value in model.named_parameters() if ".modules_to_save." in name}
    assert len(found) == 4
    for name, value in found.items():
        plain = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        assert torch.equal(value, complete[plain])
    untouched = [value for name, value in model.named_parameters() if ".original_module." in name]
    base = AutoModelForImageTextToText.from_pretrained(config.model.path).state_dict()
    assert all(any(torch.equal(value, own) for own in base.values()) for value in untouched)


@pytest.mark.slow("a run")
def test_the_start_says_how_many_tensors_have_earlier_values(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config("text", {"language": LORA | {"targets": ["q_proj"]}}, steps=1)
    earlier = trained(config)
    capsys.readouterr()
    train(after(config, earlier, {"language": LORA | {"targets": ["q_proj", "v_proj"]}}))
    # two layers; A and B each
    assert f"started from {earlier}: 4 of 8 trainable tensors have its values" in capsys.readouterr().err


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (BOTH, {"language": LORA}, r"4 of 32 tensors are not trainable here, such as '.*multi_modal_projector"),
    (BOTH, PROJECTOR, "it is an adapter, and no component has mode lora here"),
    (BOTH, {**PROJECTOR, "language": LORA | {"rank": 8}}, r"has the shape \(4, \d+\), and \(8, \d+\) here"),
    (BOTH, {**PROJECTOR, "language": LORA | {"alpha": 16.0}}, "scaled by 2 in .*, and by 4 here: use the rank, alpha"),
    (BOTH, {**PROJECTOR, "language": LORA | {"variant": "rslora"}}, "scaled by 2 in .*, and by 4 here"),
    (
        BOTH,
        {**PROJECTOR, "language": LORA | {"variant": "dora"}},
        "lora_magnitude_vector.* is missing",
    ),
    (BOTH, {**PROJECTOR, "language": LORA | {"targets": ["q_proj"]}}, "tensors are not trainable here"),
    (PROJECTOR, {"language": LORA}, "4 weights that were trained there are not trained in full here.*tune.projector"),
    (PROJECTOR, {"projector": LORA}, "4 weights that were trained there are not trained in full here"),
]


@pytest.mark.slow("several runs")
def test_what_would_be_lost_or_computed_otherwise_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    runs = {}
    for name, tune in (("both", BOTH), ("projector", PROJECTOR)):
        runs[name] = trained(make_config("llava", tune, steps=1, output_dir=str(tmp_path / name)))
    config = make_config("llava", BOTH, steps=1)
    for before, tune, reason in REFUSED:
        with pytest.raises(UserError, match=reason) as caught:
            started(after(config, runs["both" if before is BOTH else "projector"], tune))
        assert len(caught.value.faults) == 1
        assert str(caught.value).startswith("model.adapter: ")


@pytest.mark.slow("trains twice and copies models")
def test_an_adapter_of_another_model_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("llava", {"language": LORA}, steps=1)
    earlier = trained(config)
    other = tmp_path / "other"
    shutil.copytree(config.model.path, other)
    model = AutoModelForImageTextToText.from_pretrained(other)
    model.model.multi_modal_projector.linear_1.bias.data += 1
    model.save_pretrained(other)
    with pytest.raises(UserError, match=r"was trained on .*, whose weights are not those of model\.path"):
        started(after(config, earlier, path=str(other)))
    shutil.copytree(config.model.path, tmp_path / "moved")
    started(after(config, earlier, path=str(tmp_path / "moved")))  # the same weights elsewhere
    complete = trained(make_config("llava", PROJECTOR, steps=1, output_dir=str(tmp_path / "complete")))
    model.resize_token_embeddings(model.config.text_config.vocab_size + 3)
    randomized(model, other)
    with pytest.raises(UserError, match=r"its weights have other names or shapes than model\.path"):
        started(after(config, complete, PROJECTOR, path=str(other)))


@pytest.mark.slow("several runs")
def test_a_change_of_the_earlier_run_is_noticed(make_config: MakeConfig) -> None:
    config = make_config("text", {"language": LORA}, steps=2, checkpoint_every=1)
    earlier = trained(config)
    later = after(config, earlier)
    train(later)
    (Path(later.run.output_dir) / "adapter" / "adapter_model.safetensors").unlink()
    file = earlier / "adapter" / "adapter_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    with pytest.raises(UserError, match=r"model\.adapter\.weights: the content has changed since the run started"):
        train(later)


def test_a_path_that_is_not_there_is_a_fault_of_the_config(tmp_path: Path, model_dirs: dict[str, Path]) -> None:
    file = tmp_path / "c.yaml"
    (tmp_path / "d.jsonl").write_text("")
    file.write_text(
        f"model:\n  path: {model_dirs['text']}\n  adapter: {tmp_path / 'none'}\n"
        f"data: {{train: {tmp_path / 'd.jsonl'}}}\nrun: {{output_dir: {tmp_path / 'run'}}}\n"
    )
    with pytest.raises(UserError, match=r"c\.yaml:3: model\.adapter: there is no '.*none'"):
        load_config(file)
