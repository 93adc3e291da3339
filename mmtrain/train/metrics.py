"""What a run tells: metrics.jsonl, a progress bar on a terminal, plain lines elsewhere."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mmtrain.errors import storage_faults
from mmtrain.model.components import PartReport

LOG_SECONDS = 5.0
METRICS = "metrics.jsonl"


class MetricsFile:
    """metrics.jsonl: a row a step and a row an evaluation, cut back to the step that a run goes on from.

    Only the main process writes (`active`).
    """

    def __init__(self, path: Path, step: int, active: bool = True) -> None:
        self._file: TextIO | None = None
        if not active:
            return
        kept = [line for line in _lines(path) if _step_of(line) <= step]
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}")
        with storage_faults(f"{path}: it cannot be written"):
            beside.write_text("".join(kept), encoding="utf-8")
            beside.replace(path)
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


def evaluated_at(path: Path, step: int) -> tuple[str, ...]:
    """The evaluation sets that have a row for `step` in the metrics at `path`."""
    rows = [json.loads(line) for line in _lines(path) if _step_of(line) == step]
    return tuple(row["eval"] for row in rows if "eval" in row)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []


def _step_of(line: str) -> float:
    """The step of a row; a half-written last row counts as later than any."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class Reporter:
    """Shows how a run goes: one live line on a terminal, otherwise a line every few seconds."""

    def __init__(self, num_steps: int, done: int, console: Console) -> None:
        self._num_steps = num_steps
        self._console = console
        self._last_line = 0.0
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("loss {task.fields[loss]}  {task.fields[rate]} tok/s  {task.fields[mfu]} mfu"),
                TimeRemainingColumn(compact=True),
                console=console,
            )
            self._task = self._progress.add_task("", total=num_steps, completed=done, loss="–", rate="–", mfu="–")

    def __enter__(self) -> "Reporter":
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def step(self, row: dict[str, Any]) -> None:
        """`row` is the step's row of metrics.jsonl."""
        speed = f"{row['num_tokens'] / row['seconds']:,.0f}"
        if self._progress is not None:
            loss, mfu = f"{row['loss']:.4f}", f"{row['mfu']:.0%}"
            self._progress.update(self._task, completed=row["step"], loss=loss, rate=speed, mfu=mfu)
            return
        now = time.monotonic()
        if now - self._last_line >= LOG_SECONDS or row["step"] in (1, self._num_steps):
            self._last_line = now
            self.say(
                f"step {row['step']}/{self._num_steps}  loss {row['loss']:.4f}  "
                f"lr {row['learning_rate']:.2e}  grad {row['grad_norm']:.3f}  {speed} tok/s  {row['mfu']:.0%} mfu"
            )

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def make_console(quiet: bool) -> Console:
    """Everything a person reads goes to standard error."""
    return Console(file=sys.stderr, highlight=False, quiet=quiet)


def show_parts(parts: Sequence[PartReport], console: Console) -> None:
    """The table of what learns."""
    quantized = any(row.quantized for row in parts)
    columns = ["part", "mode", "modules", "trainable", "frozen", *(["in 4 bits"] if quantized else [])]
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for row in parts:
        modules = f"{row.num_modules:,}" if row.trainable else "–"
        numbers = [row.trainable, row.frozen, *([row.quantized] if quantized else [])]
        table.add_row(row.part, row.mode, modules, *(f"{number:,}" for number in numbers))
    console.print(table)
