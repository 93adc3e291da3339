"""Two processes give the curve and the adapter of one, also where one of them has nothing to do."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mmtrain.config import dump_config
from mmtrain.config.schema import Config
from mmtrain.errors import FINAL_CODES, PeerError, UserError
from mmtrain.runtime import processes as runtime
from mmtrain.runtime.processes import Runtime
from support.attention_models import make_text_family
from support.forked import Server
from support.learning import LORA, MIXED, relative_l2


def start(processes: int, words: list[str], folder: Path, server: Server) -> str:
    """What mmtrain in so many processes prints."""
    text = server.run(folder, words, processes).text
    assert words[0] != "train" or f" {processes} process" in text  # they did find each other
    return text


def run(config: Config, processes: int, output: Path, server: Server) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train in so many processes; the metrics' rows and the adapter."""
    start(processes, train_words(config, output), output.with_suffix(".logs"), server)
    return result(output)


def train_words(config: Config, output: Path) -> list[str]:
    """The command that trains into `output`."""
    path = output.with_suffix(".yaml")
    data = yaml.safe_load(dump_config(config))
    data["run"]["output_dir"] = str(output)
    path.write_text(yaml.safe_dump(data))
    return ["train", str(path)]


def result(output: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return rows, load_file(output / "adapter" / "adapter_model.safetensors")


def run_by_torchrun(config: Config, output: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The same in two processes that torchrun starts."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mmtrain"]
    words = [sys.executable, *launcher, *train_words(config, output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert " 2 process" in done.stderr
    return result(output)


SLOW = pytest.mark.slow("several runs of two processes")


@pytest.mark.slow("runs of two processes")
@pytest.mark.parametrize(
    "batch_size", [pytest.param(8, id="mixed"), pytest.param(1, id="fewer_samples_than_processes", marks=SLOW)]
)
def test_two_processes_equal_one(
    batch_size: int, make_config: Callable[..., Config], tmp_path: Path, server: Server
) -> None:
    tune = {**MIXED, "language": {**LORA, "dropout": 0.1}}
    # AdamW moves a weight whose gradient is nothing but rounding by the whole rate: 1e-2 would show that alone
    settings = {"steps": 10, "batch_size": batch_size, "microbatch_tokens": 100, "learning_rate": 1e-3}
    config = make_config("qwen2_5_vl", tune, **settings)
    source = {"path": config.data.train[0].path, "name": "same"}
    config = Config.model_validate(config.model_dump() | {"data": config.data.model_dump() | {"eval": [source]}})
    one_rows, one = run(config, 1, tmp_path / "one", server)
    output = tmp_path / "two"
    two_rows, two = run_by_torchrun(config, output) if batch_size == 8 else run(config, 2, output, server)
    assert len(one_rows) == len(two_rows) == 12
    for before, after in zip(one_rows, two_rows, strict=True):
        for key in before.keys() - {"seconds", "mfu", "eval", "interval"}:
            assert after[key] == pytest.approx(before[key], rel=1e-5), key
    difference = sum(float((one[name] - two[name]).double().pow(2).sum()) for name in one) ** 0.5
    assert difference <= 1e-5 * sum(float(one[name].double().pow(2).sum()) for name in one) ** 0.5


@SLOW
def test_two_processes_keep_features_and_give_the_same_bits(
    make_config: Callable[..., Config], tmp_path: Path, server: Server
) -> None:
    """Three epochs; each process keeps the features of the images that came to it."""
    settings = {"steps": 6, "batch_size": 4, "microbatches": 2, "learning_rate": 1e-3}
    config = make_config("qwen2_5_vl", {"language": {**LORA, "dropout": 0.1}}, **settings)
    one_rows, one = run(config, 1, tmp_path / "one", server)
    two_rows, two = run(config, 2, tmp_path / "two", server)
    without = config.model_dump() | {"run": config.run.model_dump() | {"image_cache": {"memory_gib": 0.0}}}
    plain_rows, plain = run(Config.model_validate(without), 1, tmp_path / "plain", server)
    assert [row["loss"] for row in one_rows] == [row["loss"] for row in two_rows]
    assert all(torch.equal(one[name], two[name]) for name in one)
    for kept, row in zip(one_rows, plain_rows, strict=True):
        assert kept["loss"] == pytest.approx(row["loss"], rel=1e-6)
    difference = sum(float((one[name] - plain[name]).double().pow(2).sum()) for name in one) ** 0.5
    assert difference <= 1e-5 * sum(float(one[name].double().pow(2).sum()) for name in one) ** 0.5


@SLOW
def test_a_trial_of_lost_gradients_does_not_disturb_sharded_weights(
    make_config: Callable[..., Config], tmp_path: Path, server: Server
) -> None:
    """LLaVA-1.5 never uses the last layer of its vision tower, so each process tries whether the loss depends on it."""
    settings = {"steps": 3, "batch_size": 2, "microbatch_tokens": 100, "learning_rate": 1e-3}
    config = make_config("llava", {"vision": {"mode": "full"}, "language": LORA}, **settings)
    one_rows, _ = run(config, 1, tmp_path / "one", server)
    sharded = config.model_dump() | {"run": config.run.model_dump() | {"weights": "shard"}}
    two_rows, _ = run(Config.model_validate(sharded), 2, tmp_path / "two", server)
    assert len(one_rows) == len(two_rows) == 3
    for before, after in zip(one_rows, two_rows, strict=True):
        for key in ("loss", "grad_norm"):
            assert after[key] == pytest.approx(before[key], rel=1e-5), key


@SLOW
@pytest.mark.parametrize("weights", ["replicate", "shard"])
def test_two_processes_with_adapters_on_experts_equal_one(
    weights: str, make_config: Callable[..., Config], tmp_path: Path, server: Server
) -> None:
    """Not every expert gets tokens on every process."""
    config = make_config("text", {"language": LORA}, steps=3, microbatch_tokens=100, learning_rate=1e-3)
    changed = config.model_dump() | {
        "model": {"path": str(make_text_family("mixture", tmp_path / "model")), "dtype": "float32"},
        "run": config.run.model_dump() | {"weights": weights},
    }
    rows, found = zip(*(run(Config.model_validate(changed), n, tmp_path / str(n), server) for n in (1, 2)), strict=True)
    assert any("experts" in name for name in found[0])
    for before, after in zip(*rows, strict=True):
        for key in ("loss", "grad_norm"):
            assert after[key] == pytest.approx(before[key], rel=1e-5), key
    assert relative_l2(found[1], found[0]) <= 1e-5


@SLOW
def test_two_processes_score_every_sample_once(
    make_config: Callable[..., Config], tmp_path: Path, server: Server
) -> None:
    config = make_config("qwen2_5_vl", microbatch_tokens=100)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    words = ["eval", "perplexity", str(tmp_path / "config.yaml"), "--data", config.data.train[0].path, "--json"]
    one, two = (
        json.loads(next(line for line in start(n, words, tmp_path / str(n), server).splitlines() if line[:1] == "{"))
        for n in (1, 2)
    )
    assert one["num_samples"] == two["num_samples"] == 8
    assert one["num_supervised"] == two["num_supervised"]
    assert two["nll"] == pytest.approx(one["nll"], rel=1e-5)
    assert two["interval"]["nll"] == pytest.approx(one["interval"]["nll"], rel=1e-5)


def test_who_does_not_meet_is_started_again_and_who_cannot_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise torch.distributed.DistNetworkError("the connection was reset")

    for key, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR") as cannot:
        Runtime("float32")
    monkeypatch.setattr(runtime, "rendezvous", broken)
    with pytest.raises(PeerError, match="did not meet: the connection was reset") as alone:
        Runtime("float32")
    assert cannot.value.exit_code in FINAL_CODES
    assert alone.value.exit_code not in FINAL_CODES
