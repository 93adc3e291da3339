"""The card of what a run leaves: its code loads what was trained, its figures are the run's, no path is in it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from mmtrain.config.schema import Config
from mmtrain.train import chat
from mmtrain.train.export import export
from mmtrain.train.model_card import hub_id
from mmtrain.train.run import train
from support.learning import ALL_FULL, LORA, MIXED

IDS = [[5, 6, 7, 8, 9, 10]]
CHECK = f"""
logits = model(input_ids=torch.tensor({IDS}), use_cache=False).logits
import json, sys
json.dump(logits[0].tolist(), open(sys.argv[1], "w"))
"""


def with_eval(config: Config) -> Config:
    data = config.model_dump()
    data["data"]["eval"] = [{"path": config.data.train[0].path, "name": "held-out"}]
    return Config.model_validate(data)


@pytest.mark.slow("runs the code of the model card in its own process")
@pytest.mark.parametrize(("kind", "tune"), [("text", {"language": LORA}), ("qwen2_5_vl", MIXED), ("llava", ALL_FULL)])
def test_the_code_of_the_card_loads_what_was_trained(
    kind: str,
    tune: dict[str, Any],
    make_config: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    config = make_config(kind, tune, steps=2, batch_size=4)
    # a base model given by a path that only means something here
    monkeypatch.chdir(Path(config.model.path).parent)
    config = with_eval(Config.model_validate(config.model_dump() | {"model": {"path": kind, "dtype": "float32"}}))
    trained: list[Tensor] = []

    @torch.no_grad()
    def noting(learner: Any, *args: Any) -> str:
        trained.append(learner.model(input_ids=torch.tensor(IDS), use_cache=False).logits[0].clone())
        return export(learner, *args)

    monkeypatch.setattr(chat, "export", noting)
    train(config)
    output = Path(config.run.output_dir)
    folder = output / ("model" if tune is ALL_FULL else "adapter")
    card = (folder / "README.md").read_text()
    load, ask = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    # the processor of this family needs torchvision, as the card says
    code = load + CHECK + ("" if kind == "qwen2_5_vl" else ask)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(tmp_path / "logits.json")]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found = torch.tensor(json.loads((tmp_path / "logits.json").read_text()))
    assert (found - trained[0]).norm() <= 1e-5 * trained[0].norm()
    assert kind == "qwen2_5_vl" or done.stdout.count("\n") >= 1
    assert "torchvision" in card or kind == "text"
    check_card(card, config, output)


def check_card(card: str, config: Config, output: Path) -> None:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "eval" not in row][-1]
    score = [row for row in rows if "eval" in row][-1]
    for line in (
        "- training samples: 8",
        "- steps: 2 of 4 samples each",
        f"- loss of the last step: {last['loss']:.4f}",
        "- trained on: mixed.jsonl",
        "- perplexity on held-out: {:,.4f} (95 % interval {:,.4f} to {:,.4f}), token accuracy {:.1%}, 8 samples".format(
            score["perplexity"], *score["interval"]["perplexity"], score["token_accuracy"]
        ),
    ):
        assert line in card.splitlines()
    for path in (str(output), config.data.train[0].path, str(output.parent), str(Path.cwd())):
        assert path not in card
    header = yaml.safe_load(card.split("---")[1])
    assert "base_model" not in header
    settings = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)[0])
    assert settings["train"]["learning_rate"] == config.train.learning_rate
    assert settings["tune"] == config.model_dump(mode="json")["tune"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"_name_or_path": "owner/model-7B"}, "owner/model-7B"),
        ({"_name_or_path": "/srv/models/model-7B"}, None),
        ({"_name_or_path": "./model"}, None),
        ({"_name_or_path": 3}, None),
        ({}, None),
    ],
)
def test_a_directory_has_the_hub_id_that_its_config_says(
    content: dict[str, Any], expected: str | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert hub_id(str(tmp_path)) == expected


def test_a_folder_of_the_hub_cache_has_the_id_of_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "models--owner--model-7B" / "snapshots" / "0123abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert hub_id(str(folder)) == "owner/model-7B"


def test_a_hub_id_is_its_own_and_a_directory_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_id("owner/model") == "owner/model"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    (tmp_path / "owner" / "model" / "config.json").write_text('{"_name_or_path": "owner/model"}')
    assert hub_id("owner/model") is None
