"""`mmtrain plan`: its figures, and how they are shown."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from mmtrain.config.run_section import Run
from mmtrain.config.schema import Config
from mmtrain.dataset.validate import CheckedSamples
from mmtrain.errors import UserError
from mmtrain.model.cost import CostModel
from mmtrain.plan.command import plan
from mmtrain.plan.memory import CARDS, gpu_memory
from mmtrain.plan.waiting import Simulation, Waiting
from mmtrain.train.checkpoint import checkpoint_bytes
from mmtrain.train.peak_memory import PeakMemory
from mmtrain.user_cache import cache_folder
from support.builders import mixed_rows, train_and_run, write_jsonl
from support.learning import learner_for
from support.pair_data import pair_config, write_pairs
from support.tower_models import TOWERS

SLOW = pytest.mark.slow("a model is made without values")
GIB = 2**30


def config_of(model: Path, tmp_path: Path, with_images: bool, **run: Any) -> Config:
    data = write_jsonl(tmp_path / "eight.jsonl", mixed_rows(tmp_path, with_images=with_images))
    settings = {"model": {"path": str(model), "dtype": "float32"}, "data": {"train": [{"path": str(data)}]}}
    return Config.model_validate(settings | train_and_run(output_dir=str(tmp_path / "run"), batch_size=4, **run))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def figures_of(config: Config, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    plan(config, "1,2", True)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.slow("several runs")
def test_the_figures_are_those_of_the_run(
    model_dirs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(model_dirs["text"], tmp_path, with_images=False, device="cpu")
    found = figures_of(config, capsys)
    learner, dataset = learner_for(config)
    assert found["data"]["samples"] == 8
    assert found["data"]["tokens"] == dataset.checked.num_tokens.sum()
    assert found["data"]["supervised"] == dataset.checked.num_supervised.sum()
    assert found["steps"]["steps"] == dataset.num_steps
    assert found["steps"]["waiting"]["1"] == 0.0
    assert 0 < found["steps"]["waiting"]["2"] < 1
    assert found["disk"]["checkpoint"] == checkpoint_bytes(learner.model)
    (file,) = (cache_folder() / "encoded").glob("*.safetensors")
    assert 0 <= file.stat().st_size - found["disk"]["encoded_samples"] < 2000  # its header
    assert found["cpu_memory"]["microbatch_tokens"] <= config.run.microbatch_tokens
    assert "gpu_memory" not in found


@SLOW
def test_the_page_fits_80_columns_and_names_the_keys(
    model_dirs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(config_of(model_dirs["qwen2_5_vl"], tmp_path, with_images=True), "1,2,8", False)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    keys = ("run.microbatch_tokens", "activation_checkpointing", "shard, 8")
    for words in (*keys, "141 GB", "estimate", "by a formula", "at least"):
        assert words in out


@pytest.mark.parametrize("processes", ["", "0", "1,,2", "two", "-1"])
def test_other_numbers_of_processes_are_refused(processes: str, model_dirs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--processes: .* expected numbers above 0"):
        plan(config_of(model_dirs["text"], tmp_path, with_images=False), processes, True)


def test_a_row_says_how_large_a_microbatch_may_be(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    """16 GiB of weights, 3 of gradients and moments, 20 for 10,000 tokens, and one that is whole at a time."""
    peak = PeakMemory(16 * GIB, GIB, 39 * GIB, 10_000, 3, GIB)
    config = config_of(model_dirs["text"], tmp_path, with_images=False, activation_checkpointing=True)
    found = gpu_memory(config, lambda *_: peak, 2000, 4)
    alone, quantized, sharded = found["rows"]
    assert [row["quantization"] for row in found["rows"]] == [None, "nf4", None]
    assert quantized["shards"] == 1
    assert (alone["shards"], alone["peak"]) == (1, 39 * GIB)
    assert (alone["fits"], sharded["fits"]) == (["48 GB", "80 GB", "141 GB"], ["48 GB", "80 GB", "141 GB"])
    assert (sharded["shards"], sharded["peak"]) == (4, 20 * GIB + 19 * GIB // 4 + GIB)
    tokens_80 = (CARDS["80 GB"] * 0.95 - 1 - 19) * 500
    assert 0 <= tokens_80 - alone["largest"]["80 GB"] < 256
    found = gpu_memory(config, lambda *_: peak, 3000, 4)
    assert found["rows"][0]["largest"]["24 GB"] is None


@pytest.mark.parametrize(("weights", "expected"), [("replicate", 0.0), ("shard", 1 - 20 / 30)])
def test_waiting_is_the_time_in_which_the_slowest_is_awaited(weights: str, expected: float) -> None:
    """Two micro-batches each for two processes: 10 and 30, and 30 and 10, at a cost of 1 a token."""
    lengths = np.array([10, 30, 30, 10], np.int32)
    zeros = np.zeros(4)
    checked = CheckedSamples(lengths, lengths * 0, zeros, lengths * 0, zeros, 0, frozenset())
    run = Run.model_validate({"output_dir": "run", "weights": weights})
    simulation = Simulation(run, checked, CostModel(1.0, 0.0, 0.0, 0.0, 0.0), packing=True)
    step = simulation.step(range(4))
    times = simulation.times(step, [[[0], [1]], [[2], [3]]])
    assert times.tolist() == [[10.0, 30.0], [30.0, 10.0]]
    waiting = Waiting()
    simulation.add(waiting, times)
    assert waiting.share == pytest.approx(expected)


@pytest.mark.slow("the memory of runs is predicted")
def test_a_contrastive_run_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """24 pairs of 17 images and their texts; one micro-batch for each item where none may have two."""
    model, data = TOWERS["clip"](tmp_path / "clip"), write_pairs(tmp_path / "data")
    settings: dict[str, Any] = {"train": {"steps": None, "epochs": 3, "batch_size": 8}}
    config = pair_config(model, data, tmp_path / "run", **settings, run={"microbatch_tokens": 1})
    found = figures_of(config, capsys)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    texts = {text for row in rows for text in ([row["text"]] if isinstance(row["text"], str) else row["text"])}
    images = {(data.parent / row["image"]).read_bytes() for row in rows}
    expected = {"pairs": 24, "items": len(texts) + len(images), "items_with_images": len(images), "left_out": 0}
    assert {key: found["data"][key] for key in expected} == expected
    steps = found["steps"]
    assert (steps["steps"], steps["steps_per_epoch"], steps["batch_size"]) == (9, 3, 8)
    assert 8 < steps["items"] / 2 < steps["microbatches"] <= steps["items"] <= 24
    assert steps["waiting"]["1"] == 0.0 <= steps["waiting"]["2"] < 0.5
    weights = load_file(model / "model.safetensors")
    trainable = sum(value.numel() for value in weights.values())  # the towers and the scale: everything
    assert found["disk"]["checkpoint"] == 12 * trainable
    assert found["disk"]["num_checkpoints"] == config.run.keep_checkpoints + 1
    assert found["time"]["operations"] == pytest.approx(9 * steps["operations"])
    plan(config, "1", False)
    lines = capsys.readouterr().out
    assert "9 of 8 pairs, 3 an epoch" in lines
    assert "memory     on the CPU, " in lines
