"""The loop over the steps of a run."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mmtrain.config import Config
from mmtrain.errors import NonFiniteError, Stopped, UserError
from mmtrain.progress import Progress
from mmtrain.train.ceiling import matmul_rate
from mmtrain.train.checkpointer import Checkpointer
from mmtrain.train.metrics import METRICS, MetricsFile
from mmtrain.train.objective import Objective
from mmtrain.train.optimizer import rate_factor, set_rate
from mmtrain.train.report import StepReporter
from mmtrain.train.step import train_step

OnStep = Callable[[dict[str, Any]], None]


class TrainingLoop:
    """Takes steps, and evaluates and saves after those where that is due."""

    def __init__(self, config: Config, objective: Objective, checkpointer: Checkpointer, progress: Progress) -> None:
        self._config, self._objective = config, objective
        self._checkpointer, self._progress = checkpointer, progress
        self._data, self._learner, self._steps = objective.data, objective.load(), objective.steps()
        dtype, runtime = getattr(torch, config.model.dtype), self._learner.runtime
        self._ceiling = matmul_rate(runtime.device, dtype) * runtime.num_processes

    def take_steps(self, first: int, evaluated: Sequence[str], on_step: OnStep) -> None:
        """Take the steps from `first` to the last. `evaluated`: the sets that were scored before it.

        Raises Stopped, with a checkpoint, where a signal asked to stop. Where a fault of the data ends the run, the
        last complete step is saved before the error leaves.
        """
        runtime, last = self._learner.runtime, self._data.num_steps
        runtime.activity.saves_alone = runtime.is_main and not self._learner.sharded
        path = Path(self._config.run.output_dir) / METRICS
        try:
            with (
                MetricsFile(path, first - 1, runtime.is_main) as metrics,
                self._progress.task("step", last, first - 1) as task,
            ):
                reporter = StepReporter(last, self._data.plan.steps_per_epoch, task, self._progress)
                evaluations = self._objective.evaluations(metrics)
                evaluations.run(first - 1, evaluated)  # at the start what the base model scores
                batches = self._steps.batches(first, last)
                for step in range(first, last + 1):
                    row, stop_signal = self._take_step(step, batches)
                    metrics.write(row)
                    reporter.report(row)
                    on_step({**row, "operations": self._steps.of(step).operations})
                    self._after(step, stop_signal or evaluations.run(step))
        except UserError as error:
            self._checkpointer.save_complete(error)
            raise

    def _after(self, step: int, stop_signal: int | None) -> None:
        """Save if that is due after `step`. Raises Stopped where a signal asked to stop."""
        last = self._data.num_steps
        if stop_signal is not None or step % self._config.run.checkpoint_every == 0 or step == last:
            stop_signal = self._checkpointer.save(step) or stop_signal
        if stop_signal is not None and step < last:
            raise Stopped(stop_signal, f"stopped after step {step}, which is saved; the same command resumes")

    def _take_step(self, step: int, batches: Iterator[Any]) -> tuple[dict[str, Any], int | None]:
        """One step: its row of metrics.jsonl, and the signal that asked to stop."""
        self._learner.runtime.activity.set("data", step)
        settings, start = self._config.train, time.perf_counter()
        cut = self._steps.of(step)
        factor = rate_factor(step, self._data.num_steps, settings.warmup_steps, settings.schedule)
        set_rate(self._learner.optimizer, factor)
        own = (self._next(batches) if indices else None for indices in cut.own)
        try:
            done = train_step(self._learner, own, cut.count, step, settings.max_grad_norm)
        except NonFiniteError as error:
            places = ", ".join(str(self._data.train.place(index)) for index in cut.samples)
            raise NonFiniteError(f"{error}; its samples: {places}; nothing of it is saved") from None
        self._checkpointer.complete = step
        seconds = time.perf_counter() - start
        row = {
            "step": step,
            "loss": done.loss,
            **cut.figures,
            "learning_rate": settings.learning_rate * factor,
            "grad_norm": done.grad_norm,
            "seconds": seconds,
            "mfu": cut.operations / seconds / self._ceiling,
        }
        return row, done.stop_signal

    def _next(self, batches: Iterator[Any]) -> Any:
        self._learner.runtime.activity.set("data")
        return next(batches)
