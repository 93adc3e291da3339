"""`run.activation_checkpointing: auto`: decided by the memory of the device, once for all processes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from rich.console import Console

from mmtrain.config import GIB
from mmtrain.config.schema import Config
from mmtrain.encoding.load import load_processor
from mmtrain.model.without_values import NeedsValuesError
from mmtrain.progress import QUIET, Progress
from mmtrain.runtime.processes import Runtime
from mmtrain.train import checkpointing
from mmtrain.train.checkpointing import available, decide_checkpointing
from mmtrain.train.dataset import Dataset
from support.builders import mixed_rows, train_and_run, write_jsonl

SLOW = pytest.mark.slow("a model is made without values")


@dataclass
class OneOfSeveral:
    """A process with a GPU; `decided` is what the first process decided, if this is another one."""

    device: torch.device
    num_processes: int = 1
    decided: list[Any] | None = None
    keys: list[str] = field(default_factory=list)

    def from_first(self, key: str, make: Callable[[], Any]) -> Any:
        self.keys.append(key)
        return make() if self.decided is None else self.decided


class Said(Progress):
    def __init__(self) -> None:
        super().__init__(console=Console(quiet=True))
        self.lines: list[str] = []

    def say(self, line: Any) -> None:
        self.lines.append(line)


@pytest.fixture
def config(model_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    data = write_jsonl(tmp_path / "eight.jsonl", mixed_rows(tmp_path, with_images=False))
    settings = {
        "model": {"path": str(model_dirs["text"]), "dtype": "float32"},
        "data": {"train": [{"path": str(data)}]},
    }
    return Config.model_validate(settings | train_and_run(output_dir=str(tmp_path / "run")))


def decided(config: Config, runtime: OneOfSeveral) -> tuple[bool, list[str]]:
    processor, said = load_processor(config.model.path), Said()
    dataset = Dataset(config, processor, QUIET)
    found = decide_checkpointing(config, dataset, processor, cast(Runtime, runtime), said)
    assert found.run.model_dump() | {"activation_checkpointing": 0} == config.run.model_dump() | {
        "activation_checkpointing": 0
    }
    assert isinstance(found.run.activation_checkpointing, bool)
    return found.run.activation_checkpointing, said.lines


def with_gpu_of(total: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=int(total)))


def test_a_gpu_keeps_5_percent_and_a_gib_free() -> None:
    assert available(20 * GIB) == 18 * GIB


def test_on_the_cpu_activations_are_stored_and_nothing_is_said(config: Config) -> None:
    assert config.run.activation_checkpointing == "auto"
    assert decided(config, OneOfSeveral(torch.device("cpu"))) == (False, [])


@pytest.mark.slow("counts the memory of steps")
@pytest.mark.parametrize(
    ("gib", "is_on"), [(80.0, False), pytest.param(1.0, True, marks=SLOW), pytest.param(1.07, False, marks=SLOW)]
)
def test_on_a_gpu_its_memory_decides(gib: float, is_on: bool, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model takes a few MiB; 1.07 GiB less the reserve are 17 MiB."""
    with_gpu_of(gib * GIB, monkeypatch)
    state = torch.random.get_rng_state()
    found, lines = decided(config, OneOfSeveral(torch.device("cuda", 0)))
    assert found is is_on
    (line,) = lines
    assert line.startswith(f"activation checkpointing: {'on' if is_on else 'off'}, a micro-batch of ")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_other_processes_do_as_the_first_one(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = OneOfSeveral(torch.device("cuda", 0), 2, [True, "because"])
    assert decided(config, runtime) == (True, ["activation checkpointing: on, because"])
    assert runtime.keys == ["activation checkpointing"]


def test_what_cannot_be_predicted_is_computed_again(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise NeedsValuesError("experts")

    monkeypatch.setattr(checkpointing, "predict_peak", fail)
    with_gpu_of(80 * GIB, monkeypatch)
    found, (line,) = decided(config, OneOfSeveral(torch.device("cuda", 0)))
    assert found
    assert line.endswith("its memory cannot be predicted: NeedsValuesError: experts")
