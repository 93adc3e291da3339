"""Trackers get the figures of metrics.jsonl, on this machine, and cannot stop a run."""

import json
import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mmtrain.config.schema import Config
from mmtrain.errors import UserError
from mmtrain.train.metrics import open_metrics
from mmtrain.train.run import train
from mmtrain.train.trackers import figures
from test_watched import interrupted_at

MakeConfig = Callable[..., Config]
RUN = {"steps": 3, "batch_size": 2, "checkpoint_every": 1}


class Fake:
    """What libraries were called with."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.closed = 0

    def init(self, **keys: Any) -> "Fake":
        self.started.append(keys)
        return self

    def log(self, found: dict[str, float], step: int) -> None:
        self.logged.append((step, found))

    def finish(self) -> None:
        self.closed += 1


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    found = Fake()
    for variable in ("WANDB_MODE", "WANDB_DIR", "WANDB_ERROR_REPORTING", "MLFLOW_DISABLE_TELEMETRY", "TRACKIO_DIR"):
        monkeypatch.setenv(variable, "")  # to be as it was afterwards

    def module(name: str, **members: Any) -> None:
        made = ModuleType(name)
        made.__spec__ = ModuleSpec(name, None)
        made.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, made)

    class Client:
        def __init__(self, uri: str) -> None:
            found.started.append({"uri": uri})

        def create_experiment(self, name: str, artifact_location: str) -> str:
            return name

        def create_run(self, experiment: str, run_name: str) -> Any:
            found.started.append({"experiment": experiment, "run_name": run_name})
            return SimpleNamespace(info=SimpleNamespace(run_id="id-1"))

        def log_batch(self, run_id: str, metrics: list[tuple[str, float, int, int]]) -> None:
            assert run_id == "id-1"
            found.log({name: value for name, value, _, _ in metrics}, metrics[0][3])

        def set_terminated(self, run_id: str) -> None:
            found.finish()

    module("wandb", init=found.init, Settings=lambda **keys: keys)
    module("trackio", init=found.init, log=found.log, finish=found.finish)
    module("mlflow", MlflowClient=Client)
    module("mlflow.entities", Metric=lambda *values: values)
    return found


def rows(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.run.output_dir) / "metrics.jsonl").read_text().splitlines()]


def test_figures_have_names_by_set() -> None:
    step = {"step": 1, "loss": 0.5, "num_tokens": 3}
    assert figures(step) == {"train/loss": 0.5, "train/num_tokens": 3}
    row = {"step": 1, "eval": "a", "perplexity": 2.0, "bits_per_byte": None, "interval": {"nll": [1, 2]}}
    assert figures(row) == {"eval/a/perplexity": 2.0}
    answers = {
        "metric": "exact_match",
        "num_answers": 4,
        "metrics": {"exact_match": 0.5},
        "blind": {"exact_match": 0.2},
    }
    named = {"answers/a/exact_match": 0.5, "blind/a/exact_match": 0.2}
    assert figures({"step": 1, "answers": "a", **answers}) == named


@pytest.mark.slow("several runs")
@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_killed_run_continues_in_the_tracker(
    name: str, fake: Fake, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/space")
    config = make_config("text", **RUN, trackers=[name])
    with pytest.raises(KeyboardInterrupt):
        train(config, on_step=interrupted_at(3))
    train(config)
    assert [step for step, _ in fake.logged] == [1, 2, 3, 3]
    losses = [row["loss"] for row in rows(config)]
    assert [found["train/loss"] for _, found in fake.logged] == [*losses, losses[2]]
    assert fake.closed == 2
    folder = Path(config.run.output_dir) / "trackers"
    if name == "mlflow":
        uri = {"uri": f"sqlite:///{folder}/mlflow.db"}
        assert fake.started == [uri, {"experiment": "mmtrain", "run_name": "run"}, uri]
    else:
        first, second = fake.started
        assert first == second
        assert first["name"] == "run"
        assert first["config"]["train"]["steps"] == 3
    assert os.environ["WANDB_MODE"] == "offline"
    assert os.environ["TRACKIO_DIR"] == str(folder / "trackio")
    assert "TRACKIO_SPACE_ID" not in os.environ


@pytest.mark.slow("several runs")
def test_wandb_is_offline_and_another_run_is_another_one_there(fake: Fake, make_config: MakeConfig) -> None:
    config = make_config("text", steps=1, batch_size=2, trackers=["wandb"])
    train(config)
    train(
        Config.model_validate(
            config.model_dump() | {"run": config.run.model_dump() | {"output_dir": f"{config.run.output_dir}-2"}}
        )
    )
    assert [keys["mode"] for keys in fake.started] == ["offline", "offline"]
    assert len({keys["id"] for keys in fake.started}) == 2


def test_a_tracker_that_fails_is_left_out_with_one_line(
    fake: Fake, make_config: MakeConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def log(found: dict[str, float], step: int) -> None:
        fake.logged.append((step, found))
        raise OSError("no\nspace")

    def init(**keys: Any) -> None:
        raise ValueError("never")

    monkeypatch.setattr(sys.modules["trackio"], "log", log)
    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    config = make_config("text", **RUN, trackers=["trackio", "wandb"])
    train(config)
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert lines == [
        "warning: wandb gets no more figures: ValueError: never",
        "warning: trackio gets no more figures: OSError: no space",
    ]
    assert len(fake.logged) == 1
    assert len(rows(config)) == 3


def test_only_the_main_process_has_trackers(fake: Fake, make_config: MakeConfig) -> None:
    config = make_config("text", trackers=["trackio"])
    with open_metrics(config, 0, False, print) as metrics:
        metrics.write({"step": 1, "loss": 1.0})
    assert (fake.started, fake.logged) == ([], [])


def test_a_library_that_is_missing_is_refused_before_anything_is_read(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as refused:
        train(make_config("text", trackers=["wandb", "tensorboard"]))
    expected = 'run.trackers: not installed: wandb, tensorboard: pip install "mmtrain[wandb,tensorboard]"'
    assert refused.value.faults == [expected]


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_reads_what_was_written(make_config: MakeConfig) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config("text", **RUN, trackers=["tensorboard"])
    with pytest.raises(KeyboardInterrupt):
        train(config, on_step=interrupted_at(3))
    train(config)
    events = EventAccumulator(str(Path(config.run.output_dir) / "trackers" / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(row["step"], pytest.approx(row["loss"])) for row in rows(config)]
