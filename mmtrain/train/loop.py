"""The loop over the steps of a run."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmtrain.config import Config
from mmtrain.errors import NonFiniteError, Stopped, UserError
from mmtrain.progress import Progress
from mmtrain.runtime.device import used_memory
from mmtrain.train.ceiling import matmul_rate
from mmtrain.train.checkpointer import Checkpointer
from mmtrain.train.evaluations import Evaluations
from mmtrain.train.metrics import MetricsFile, open_metrics
from mmtrain.train.objective import TrainingObjective
from mmtrain.train.optimizer import rate_factor, set_rate
from mmtrain.train.report import StepReporter, early_line
from mmtrain.train.resume import Resume
from mmtrain.train.step import train_step
from mmtrain.train.stream_steps import begin_step
from mmtrain.train.watched import Best, History

OnStep = Callable[[dict[str, Any]], None]


class TrainingLoop:
    """Takes steps, and evaluates and saves after those where that is due."""

    def __init__(
        self, config: Config, objective: TrainingObjective, checkpointer: Checkpointer, progress: Progress
    ) -> None:
        self._config, self._objective = config, objective
        self._checkpointer, self._progress = checkpointer, progress
        self._data, self._learner, self._steps = objective.data, objective.learner, objective.steps()
        dtype, runtime = getattr(torch, config.model.dtype), self._learner.runtime
        self._ceiling = matmul_rate(runtime.device, dtype) * runtime.num_processes

    def take_steps(self, resume: Resume, on_step: OnStep) -> Best | None:
        """Take the steps from where the run resumes to the last, or until `train.early_stopping` ends them; gives the
        best evaluation by `run.keep_best`, whose checkpoint is kept.

        Raises Stopped, with a checkpoint, where a signal asked to stop. Where a fault of the data ends the run, the
        last complete step is saved before the error leaves.
        """
        runtime, last, done = self._learner.runtime, self._data.num_steps, resume.step
        runtime.activity.saves_alone = runtime.is_main and not self._learner.sharded
        history = History(resume.evaluated)
        try:
            with (
                open_metrics(self._config, done, runtime.is_main, self._progress.say) as metrics,
                nullcontext() if self._data.stream is None else closing(self._data.stream),
                self._progress.task("step", last, done) as task,
            ):
                memory = partial(used_memory, runtime.device)
                per_epoch = None if self._data.stream else self._data.plan.steps_per_epoch
                reporter = StepReporter(last, per_epoch, task, self._progress, memory)
                each, learner = self._objective.evaluations(), self._learner
                evaluations = Evaluations(each, history, self._config, last, learner.runtime, metrics, self._progress)
                self._keep_best(history, resume)
                evaluations.run(done)  # at the start what the base model scores
                batches = self._steps.batches(done + 1, last)
                while done < last and not evaluations.has_ended:
                    done += 1
                    row, stop_signal = self._take_step(done, batches)
                    metrics.write(row)
                    reporter.report(row)
                    on_step({**row, "operations": self._steps.of(done).operations})
                    stop_signal = stop_signal or evaluations.run(done)
                    is_best = self._keep_best(history, resume) == done
                    self._save(done, stop_signal, is_best, done == last or evaluations.has_ended, metrics)
        except UserError as error:
            self._checkpointer.save_complete(error)
            raise
        if self._data.stream is not None:
            self._progress.say(self._data.stream.summary(done))
        if done < last:
            self._progress.say(early_line(self._config, history, done))
        return self._best(history, resume)

    def _best(self, history: History, resume: Resume) -> Best | None:
        """Of the evaluations whose checkpoint is there. A new best one is always saved."""
        name = self._config.run.keep_best
        return None if name is None else history.best(name, among=resume.saved, since=resume.step + 1)

    def _keep_best(self, history: History, resume: Resume) -> int | None:
        """The step of the best checkpoint so far, which is not deleted from now on."""
        best = self._best(history, resume)
        self._checkpointer.best = None if best is None else best.step
        return self._checkpointer.best

    def _save(self, step: int, stop_signal: int | None, is_best: bool, is_end: bool, metrics: MetricsFile) -> None:
        """Save if that is due after `step`. Raises Stopped where a signal asked to stop."""
        if stop_signal is not None or step % self._config.run.checkpoint_every == 0 or is_best or is_end:
            metrics.sync()
            stop_signal = self._checkpointer.save(step) or stop_signal
        if stop_signal is not None and not is_end:
            raise Stopped(stop_signal, f"stopped after step {step}, which is saved; the same command resumes")

    def _take_step(self, step: int, batches: Iterator[Any]) -> tuple[dict[str, Any], int | None]:
        """One step: its row of metrics.jsonl, and the signal that asked to stop."""
        self._learner.runtime.activity.set("data", step)
        settings, start = self._config.train, time.perf_counter()
        if self._data.stream is not None:
            begin_step(self._data.stream, step, self._learner.runtime, Path(self._config.run.output_dir))
        cut = self._steps.of(step)
        factor = rate_factor(step, self._data.num_steps, settings.warmup_steps, settings.schedule)
        set_rate(self._learner.optimizer, factor)
        own = (self._next(batches) if indices else None for indices in cut.own)
        try:
            done = train_step(self._learner, own, cut.count, step, settings.max_grad_norm)
        except NonFiniteError as error:
            samples = self._data.stream or self._data.train
            places = ", ".join(str(samples.place(index)) for index in cut.samples)
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
