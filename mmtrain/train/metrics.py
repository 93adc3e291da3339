"""metrics.jsonl: the figures of every step and every evaluation of a run."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from mmtrain.errors import storage_faults

METRICS = "metrics.jsonl"


class MetricsFile:
    """The file, a row for each step and each evaluation set; rows after the step a run resumes from are removed.

    Only the main process writes (`active`).
    """

    def __init__(self, path: Path, step: int, active: bool = True) -> None:
        self._file: TextIO | None = None
        if not active:
            return
        kept = [line for line in _lines(path) if _step_of(line) <= step]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        with storage_faults(f"{path}: it cannot be written"):
            temporary.write_text("".join(kept), encoding="utf-8")
            temporary.replace(path)
            self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        if self._file is not None:
            with storage_faults(f"{self._file.name}: a row cannot be written"):
                self._file.write(json.dumps(row, allow_nan=False) + "\n")
                self._file.flush()

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def is_step(row: dict[str, Any]) -> bool:
    """Whether a row has the figures of a step, not of an evaluation."""
    return "loss" in row


def evaluated_at(path: Path, step: int) -> tuple[str, ...]:
    """The evaluation sets that have a row for `step` in the metrics at `path`."""
    rows = [json.loads(line) for line in _lines(path) if _step_of(line) == step]
    return tuple(row[key] for row in rows for key in ("eval", "retrieval") if key in row)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []


def _step_of(line: str) -> float:
    """The step of a row; a half-written last row counts as later than any."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
