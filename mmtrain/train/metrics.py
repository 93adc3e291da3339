"""metrics.jsonl: the figures of every step and every evaluation of a run."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from mmtrain.atomic_files import write_text
from mmtrain.config import Config
from mmtrain.errors import storage_faults
from mmtrain.train.trackers import Trackers

METRICS = "metrics.jsonl"


class MetricsFile:
    """The file, a row for each step and each evaluation set; rows after the step a run resumes from are removed.

    Only the main process writes (`active`).
    """

    def __init__(self, path: Path, step: int, active: bool, also: Callable[[dict[str, Any]], None] | None) -> None:
        """`also`: is called with each row that is written."""
        self._file: TextIO | None = None
        self._also = also
        if not active:
            return
        kept = _rows_until(path, step)
        path.parent.mkdir(parents=True, exist_ok=True)
        with storage_faults(f"{path}: it cannot be written"):
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
            self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        if self._file is not None:
            with storage_faults(f"{self._file.name}: a row cannot be written"):
                self._file.write(json.dumps(row, allow_nan=False) + "\n")
                self._file.flush()
            if self._also is not None:
                self._also(row)

    def sync(self) -> None:
        """Flush the rows to the disk: a checkpoint relies on those before it."""
        if self._file is not None:
            with storage_faults(f"{self._file.name}: it cannot be written"):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


@contextmanager
def open_metrics(config: Config, step: int, active: bool, say: Callable[[str], None]) -> Iterator[MetricsFile]:
    """The metrics of a run that resumes after `step`, whose rows also go to its trackers."""
    path = Path(config.run.output_dir) / METRICS
    with ExitStack() as opened:
        trackers = opened.enter_context(closing(Trackers(config, step, say))) if active else None
        also = None if trackers is None else trackers.log
        yield opened.enter_context(closing(MetricsFile(path, step, active, also)))


def is_step(row: dict[str, Any]) -> bool:
    """Whether a row has the figures of a step, not of an evaluation."""
    return "loss" in row


def evaluations_until(path: Path, step: int) -> tuple[dict[str, Any], ...]:
    """The rows of evaluations up to `step` in the metrics at `path`."""
    return tuple(row for row in _rows_until(path, step) if not is_step(row))


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file that a run may be writing to: a half-written one is left out."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with suppress(ValueError):
            yield json.loads(line)


def _rows_until(path: Path, step: int) -> list[dict[str, Any]]:
    return [row for row in rows_of(path) if row["step"] <= step]
