"""Experiment trackers: the figures of metrics.jsonl, also for those who look at them elsewhere.

All of them write into `trackers/` in the run's directory. None reaches the network, whatever the environment says.
"""

import importlib.util
import json
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from mmtrain.atomic_files import write_text
from mmtrain.config import Config
from mmtrain.errors import UserError
from mmtrain.runtime.environment import keep_trackers_in
from mmtrain.safe_text import error_line

FOLDER = "trackers"
_IDS = "ids.json"
_PROJECT = "mmtrain"


class Tracker(Protocol):
    """One library."""

    def log(self, figures: dict[str, float], step: int) -> None:
        """May raise anything."""

    def close(self) -> None:
        """May raise anything."""


class Trackers:
    """Those of a run. One that fails is left out from then on, with one line: the run does not depend on it."""

    def __init__(self, config: Config, step: int, say: Callable[[str], None]) -> None:
        """`step`: after which the run resumes; the same runs are continued in the trackers."""
        self._say = say
        self._open: dict[str, Tracker] = {}
        folder = Path(config.run.output_dir) / FOLDER
        if config.run.trackers:
            keep_trackers_in(folder.resolve())
        for name in config.run.trackers:
            self._try(name, partial(self._start, name, config, folder, step))

    def log(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl."""
        found = figures(row)
        for name, tracker in list(self._open.items()):
            self._try(name, partial(tracker.log, found, row["step"]))

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.close)
        self._open.clear()

    def _start(self, name: str, config: Config, folder: Path, step: int) -> None:
        self._open[name] = _TRACKERS[name](config, folder, step)

    def _try(self, name: str, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception as error:  # a library of others can raise anything
            self._open.pop(name, None)
            self._say(f"warning: {name} gets no more figures: {error_line(error)}")


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError where a library is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        extras = ",".join(missing)
        raise UserError(f'run.trackers: not installed: {", ".join(missing)}: pip install "mmtrain[{extras}]"')


def figures(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row by the names under which trackers show them: `train/loss`, `eval/SOURCE/perplexity`,
    `answers/SOURCE/exact_match` and, of the best blind answers, `blind/SOURCE/exact_match`."""
    if "answers" in row:
        name = row["answers"]
        return _numbers(f"answers/{name}", row["metrics"]) | _numbers(f"blind/{name}", row["blind"])
    kind = next((kind for kind in ("eval", "retrieval") if kind in row), None)
    return _numbers("train" if kind is None else f"{kind}/{row[kind]}", row)


def _numbers(prefix: str, values: dict[str, Any]) -> dict[str, float]:
    """Those of `values`, and of sections in it."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _numbers(f"{prefix}/{key}", value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and key != "step":
            found[f"{prefix}/{key}"] = value
    return found


def _id_of(folder: Path, tracker: str, make: Callable[[], str]) -> str:
    """The id of the run in a tracker, made at the first start and kept in a file."""
    path = folder / _IDS
    ids: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if tracker not in ids:
        ids[tracker] = make()
        write_text(path, json.dumps(ids))
    return ids[tracker]


class _TensorBoard:
    def __init__(self, config: Config, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # figures after the step that the run resumes from are hidden
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, config: Config, folder: Path, step: int) -> None:
        import wandb

        folder.mkdir(exist_ok=True)
        self._run: Any = wandb.init(
            project=_PROJECT,
            name=Path(config.run.output_dir).name,
            id=_id_of(folder, "wandb", lambda: uuid.uuid4().hex),
            dir=str(folder),
            mode="offline",
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, figures: dict[str, float], step: int) -> None:
        self._run.log(figures, step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, config: Config, folder: Path, step: int) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        folder.mkdir(exist_ok=True)
        self._metric: Any = Metric
        self._client: Any = MlflowClient(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
        self._id = _id_of(folder, "mlflow", lambda: self._new_run(config, folder))

    def _new_run(self, config: Config, folder: Path) -> str:
        artifacts = (folder / "mlflow").resolve().as_uri()
        experiment = self._client.create_experiment(_PROJECT, artifact_location=artifacts)
        made = self._client.create_run(experiment, run_name=Path(config.run.output_dir).name)
        return str(made.info.run_id)

    def log(self, figures: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [self._metric(name, value, now, step) for name, value in figures.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id)


class _Trackio:
    def __init__(self, config: Config, folder: Path, step: int) -> None:
        import trackio

        self._trackio: Any = trackio
        name = Path(config.run.output_dir).name
        trackio.init(project=_PROJECT, name=name, config=config.model_dump(mode="json"), resume="allow", embed=False)

    def log(self, figures: dict[str, float], step: int) -> None:
        self._trackio.log(figures, step=step)

    def close(self) -> None:
        self._trackio.finish()


_TRACKERS: dict[str, Callable[[Config, Path, int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}
