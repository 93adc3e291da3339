"""What a run has left in its directory: config, figures of its data and model, metrics, and sampled answers."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtrain.config.yaml_file import read_yaml
from mmtrain.errors import UserError
from mmtrain.safe_text import visible
from mmtrain.text_files import json_object
from mmtrain.train.folder import FACTS
from mmtrain.train.metrics import METRICS, is_step, rows_of
from mmtrain.train.summary import RunSummary, rows_by_set, summarize

Row = dict[str, Any]

NUM_DROPPED_SHOWN = 20


@dataclass(frozen=True, slots=True)
class DroppedSamples:
    """The samples that a run left out."""

    number: int
    first: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """All that a page shows of a run."""

    path: Path
    name: str
    summary: RunSummary
    config: Row
    """The merged config, as written to config.yaml."""
    config_text: str
    facts: Row
    """What the run wrote about its data and its model before the first step; empty for pairs."""
    steps: tuple[Row, ...]
    evals: dict[str, list[Row]]
    """By evaluation set."""
    answers: dict[str, list[Row]]
    """Rows of answers generated during training, by evaluation set."""
    retrieval: dict[str, list[Row]]
    """Rows of retrieval in a contrastive run, by evaluation set."""
    dropped: DroppedSamples


def check_run(path: Path) -> None:
    """Raises UserError where no run is in the directory `path`."""
    if not os.path.isfile(path / "config.yaml"):
        name = visible(str(path))
        raise UserError(f"{name}: no run there (it has no config.yaml): give the directory of a run (run.output_dir)")


def read_run(path: Path) -> RunRecord:
    """The run in the directory `path`. Raises UserError where there is none, or it has taken no step yet."""
    check_run(path)
    rows = list(rows_of(path / METRICS))
    if not rows:
        raise UserError(f"{visible(str(path))}: {METRICS} has no row: the run has taken no step yet")
    text = (path / "config.yaml").read_text(encoding="utf-8")
    return RunRecord(
        path=path,
        name=path.resolve().name,
        summary=summarize(path),
        config=read_yaml(path / "config.yaml")[0],
        config_text=text,
        facts=_facts(path / FACTS),
        steps=tuple(row for row in rows if is_step(row)),
        evals=rows_by_set(rows, "eval"),
        answers=rows_by_set(rows, "answers"),
        retrieval=rows_by_set(rows, "retrieval"),
        dropped=_dropped(path / "dropped.jsonl"),
    )


def _facts(path: Path) -> Row:
    """From a file that a killed run may have left incomplete; empty where it cannot be read."""
    try:
        return json_object(path)
    except UserError:
        return {}


def _dropped(path: Path) -> DroppedSamples:
    number, first = 0, []
    for row in rows_of(path):
        number += 1
        if number <= NUM_DROPPED_SHOWN:
            first.append(row)
    return DroppedSamples(number, tuple(first))
