"""What a run prints: how it is executed, before the first step, and how its steps go."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from mmtrain.config import Config
from mmtrain.model.components import ComponentReport
from mmtrain.progress import Progress, Task
from mmtrain.runtime.shard import num_held
from mmtrain.train.dataset import Dataset
from mmtrain.train.gradients import is_exact
from mmtrain.train.step import Learner

LOG_SECONDS = 5.0


def start_report(config: Config, dataset: Dataset, learner: Learner) -> Iterator[str | Table]:
    """What is printed before the first step."""
    yield _component_table(learner.component_reports)
    yield dataset.summary()
    yield _weights_line(learner)
    yield from _bits_lines(config, learner)
    yield from _image_cache_lines(config, learner)


def _component_table(reports: Sequence[ComponentReport]) -> Table:
    """What is trainable."""
    quantized = any(row.quantized for row in reports)
    columns = ["component", "mode", "modules", "trainable", "frozen", *(["in 4 bits"] if quantized else [])]
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for row in reports:
        modules = f"{row.num_modules:,}" if row.trainable else "–"
        numbers = [row.trainable, row.frozen, *([row.quantized] if quantized else [])]
        table.add_row(row.component, row.mode, modules, *(f"{number:,}" for number in numbers))
    return table


def _weights_line(learner: Learner) -> str:
    held, total = num_held(learner.model)
    count, threads = learner.runtime.num_processes, learner.runtime.num_threads
    return (
        f"weights {'sharded over' if learner.sharded else 'replicated on'} {count} process{'es' * (count > 1)}: "
        f"{held / 1e6:,.1f} of {total / 1e6:,.1f} MB, {threads} CPU thread{'s' * (threads > 1)}"
    )


def _bits_lines(config: Config, learner: Learner) -> Iterator[str]:
    """Whether another number of processes gives the same bits."""
    count = learner.runtime.num_processes
    if learner.exact and is_exact(int(config.run.microbatches), count):
        slower = ", with deterministic kernels, which are slower" if learner.runtime.device.type == "cuda" else ""
        yield f"bits: the same on 1, 2, 4 … processes of this kind of machine{slower}"
    elif learner.runtime.device.type == "cuda" and config.run.microbatches == "auto":
        yield "bits: differ from run to run within rounding; with a number in run.microbatches they do not"
    elif count > 1:
        why = "the weights are sharded" if learner.sharded else "run.microbatches is auto"
        why = f"{count} is no power of two" if learner.exact else why
        yield f"bits: not those of another number of processes ({why})"


def _image_cache_lines(config: Config, learner: Learner) -> Iterator[str]:
    limits = config.run.image_cache
    if learner.make_inputs.features is not None:
        yield f"image cache: on, {limits.memory_gib:g} GiB in memory and {limits.disk_gib:g} GiB on disk"


class StepReporter:
    """Shows how the steps go: next to a bar on a terminal, otherwise in a line every few seconds."""

    def __init__(self, num_steps: int, task: Task, progress: Progress) -> None:
        self._num_steps, self._task, self._progress = num_steps, task, progress
        self._last_line = 0.0

    def report(self, row: dict[str, Any]) -> None:
        """`row` is the step's row of metrics.jsonl."""
        step, loss, mfu = row["step"], f"loss {row['loss']:.4f}", f"{row['mfu']:.0%} mfu"
        speed = f"{row['num_tokens'] / row['seconds']:,.0f} tok/s"
        self._task.advance()
        self._task.note(f"{loss}  {speed}  {mfu}")
        now = time.monotonic()
        is_due = not self._progress.shows_bars and (step == 1 or now - self._last_line >= LOG_SECONDS)
        if is_due or step == self._num_steps:
            self._last_line = now
            rate, norm = f"lr {row['learning_rate']:.2e}", f"grad {row['grad_norm']:.3f}"
            self._progress.say(f"step {step}/{self._num_steps}  {loss}  {rate}  {norm}  {speed}  {mfu}")
