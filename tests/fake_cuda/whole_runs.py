"""A whole run by `mmtrain` itself, on the CPU and then on the fake device: what it reports, and how often it waits."""

import json
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import PIL.Image
from typer.testing import CliRunner

from fake_cuda.device import FakeDevice, ReadNumbers
from mmtrain.cli import app
from mmtrain.config.schema import Config
from mmtrain.train import ceiling
from mmtrain.train.run import train
from support.builders import MAKERS, mixed_rows, train_and_run, write_jsonl
from support.families_grid import GRID
from support.families_more import MORE
from support.families_other import OTHER
from support.families_text import TEXT_ONLY
from support.families_tile import TILE
from support.family_models import make_family
from support.meter import Meter
from support.pair_data import write_pairs
from support.tower_models import TOWERS

FAMILIES = {**GRID, **TILE, **TEXT_ONLY, **MORE, **OTHER}
HIDDEN = ("/torch/", "/fake_cuda/device.py")


def make_model(kind: str, path: Path) -> Path:
    if kind in TOWERS:
        TOWERS[kind](path)
        return path
    return MAKERS[kind](path) if kind in MAKERS else make_family(FAMILIES[kind], path)


def run(case: dict[str, Any]) -> dict[str, Any]:
    """The rows of metrics.jsonl on both devices, the waits of each step, and how the `commands` of `case` ended.

    `case` has `kind` of model and `sections` of the config, over those that are given here; in a command, RUN stands
    for the directory of the run.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = _config(case, folder)
        train(_on("cpu", config))
        expected = _rows(folder / "cpu")
        with ReadNumbers(), FakeDevice(), Meter(hidden=HIDDEN) as meter, patch.dict(ceiling._SIDE, cuda=64):  # type: ignore[no-untyped-call]
            waits: list[dict[str, int]] = []

            def on_step(row: dict[str, Any]) -> None:
                waits.append(dict(meter.waits))
                meter.reset()

            train(_on("cuda", config), on_step=on_step)
            ended = [_command(words, folder) for words in case.get("commands", ())]
        return {
            "expected": expected,
            "found": _rows(folder / "cuda"),
            "waits": waits,
            "commands": ended,
        }


def _config(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    sections = case["sections"]
    if sections.get("objective", {}).get("kind") == "contrastive":
        data = write_pairs(folder / "data")
    else:
        data = write_jsonl(folder / "data" / "mixed.jsonl", mixed_rows(folder / "data", case.get("images", True)))
    lora = {"mode": "lora", "rank": 4, "alpha": 8.0}
    given: dict[str, Any] = {
        "model": {"path": str(make_model(case["kind"], folder / case["kind"])), "dtype": "float32"},
        "data": {"train": [{"path": str(data)}], "eval": [{"path": str(data), "name": "held-out"}]},
        **train_and_run(steps=4, batch_size=4, learning_rate=1e-3, checkpoint_every=2),
    }
    for name, keys in sections.items():
        given[name] = given.get(name, {}) | keys
    return given | {"tune": sections.get("tune", {"language": lora})}


def _on(device: str, config: dict[str, Any]) -> Config:
    output = str(Path(config["model"]["path"]).parent / device)
    return Config.model_validate(config | {"run": config["run"] | {"output_dir": output, "device": device}})


def _rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def _command(words: list[str], folder: Path) -> dict[str, Any]:
    image = folder / "image.png"
    PIL.Image.new("RGB", (64, 48), "red").save(image)
    own = [word.replace("RUN", str(folder / "cuda")).replace("IMAGE", str(image)) for word in words]
    result = CliRunner().invoke(app, own)
    return {"words": words, "code": result.exit_code, "output": result.output[-2000:]}
