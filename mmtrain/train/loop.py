"""`mmtrain train`: check everything, load the model, take the steps, leave the adapter."""

import functools
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mmtrain.config import Config, dump_config
from mmtrain.data.batch import Batch, Loader
from mmtrain.data.processor import ChatProcessor, load_processor
from mmtrain.errors import NonFiniteError
from mmtrain.evaluate.statistics import summary
from mmtrain.model.components import PartReport, prepare_learning
from mmtrain.model.dropout import DropoutClock, install_dropout
from mmtrain.model.inputs import InputMaker
from mmtrain.model.load import load_model
from mmtrain.train.checkpoint import CheckpointFolder, restore
from mmtrain.train.dataset import Dataset, StepCut
from mmtrain.train.export import export
from mmtrain.train.metrics import MetricsFile, Reporter, make_console, show_parts
from mmtrain.train.optim import make_optimizer, rate_factor, set_rate
from mmtrain.train.resume import find_resume, start_over
from mmtrain.train.runtime import Runtime
from mmtrain.train.step import Learner, train_step


def train(config: Config, fresh: bool = False) -> None:
    """Run or continue the training that `config` describes. Raises UserError for what the user can mend."""
    runtime = Runtime(config.model.dtype)
    console = make_console(quiet=not runtime.is_main)
    output_dir = Path(config.train.output_dir)
    processor = load_processor(config.model.path)
    dataset = Dataset(config, processor, console)
    if fresh and runtime.is_main:
        start_over(output_dir)
    runtime.wait()
    checkpoints = CheckpointFolder(output_dir / "checkpoints", config.train.keep_checkpoints)
    resume = find_resume(checkpoints, config, dataset.fingerprint, console)
    if resume is not None and resume.step == dataset.num_steps and is_exported(output_dir):
        console.print(f"the run in {output_dir} is finished; --fresh starts it over")
        return
    if runtime.is_main:
        _write_inputs(output_dir, config, dataset)
    learner, parts = make_learner(config, processor, runtime)
    if resume is not None:
        restore(resume.checkpoint, learner.model, learner.optimizer)
    show_parts(parts, console)
    console.print(dataset.summary(), highlight=False, soft_wrap=True)
    run = Run(config, dataset, learner, checkpoints, console)
    run.take_steps(1 if resume is None else resume.step + 1)
    run.finish(processor)
    runtime.close()


def make_learner(config: Config, processor: ChatProcessor, runtime: Runtime) -> tuple[Learner, list[PartReport]]:
    """The model with what learns of it, on its device, and its optimizer; its first weights follow from the seed."""
    torch.manual_seed(config.train.seed)
    base = load_model(config.model.path, config.model.dtype, processor)
    model, components, parts = prepare_learning(base, config.tune)
    clock = DropoutClock(config.train.seed)
    install_dropout(model, components, config.tune, clock)
    model.to(runtime.device)
    make_inputs = InputMaker(model, config.train.packing, processor.image_token_id)
    return Learner(model, make_inputs, make_optimizer(model, components, config), clock, runtime), parts


class Run:
    """The loop over the steps, and what is written as it goes."""

    def __init__(
        self, config: Config, dataset: Dataset, learner: Learner, checkpoints: CheckpointFolder, console: Console
    ) -> None:
        self._config, self._dataset, self._learner = config, dataset, learner
        self._checkpoints, self._console = checkpoints, console
        self._output_dir = Path(config.train.output_dir)
        self._last: dict[str, Any] = {}
        self._cut = functools.lru_cache(maxsize=256)(self._cut_step)

    def take_steps(self, first: int) -> None:
        """Take the steps from `first` to the last."""
        settings, last = self._config.train, self._dataset.num_steps
        own_cuts = (cut for step in range(first, last + 1) for cut in self._cut(step).own)
        batches = Loader(self._dataset.train, settings.packing).batches(own_cuts)
        metrics = MetricsFile(self._output_dir / "metrics.jsonl", first - 1, self._learner.runtime.is_main)
        with Reporter(last, first - 1, self._console) as reporter, metrics:
            if first == 1:
                self._evaluate(0, metrics, reporter)  # what the model knew before
            for step in range(first, last + 1):
                row = self._take_step(step, batches)
                metrics.write(row)
                reporter.step(row)
                self._last |= row
                if step % settings.eval_every == 0 or step == last:
                    self._evaluate(step, metrics, reporter)
                if step % settings.checkpoint_every == 0 or step == last:
                    self._save(step)

    def finish(self, processor: ChatProcessor) -> None:
        """Write what the run leaves, and check it."""
        runtime = self._learner.runtime
        if runtime.is_main:
            first = int(self._dataset.checked.used[0])
            batch = Loader(self._dataset.train, self._config.train.packing).load([first]).to(runtime.device)
            line = export(self._learner, self._config, processor, batch, self._last)
            self._console.print(line, highlight=False, soft_wrap=True)
        runtime.wait()

    def _take_step(self, step: int, batches: Iterator[Batch]) -> dict[str, Any]:
        settings, start = self._config.train, time.perf_counter()
        cut = self._cut(step)
        factor = rate_factor(step, self._dataset.num_steps, settings.warmup_steps, settings.schedule)
        set_rate(self._learner.optimizer, factor)
        own = itertools.islice(batches, len(cut.own))
        try:
            loss, norm = train_step(self._learner, own, cut.num_supervised, step, settings.max_grad_norm)
        except NonFiniteError as error:
            places = ", ".join(str(self._dataset.train.place(number)) for number in cut.samples)
            raise NonFiniteError(f"{error}; its samples: {places}; nothing of it is saved") from None
        return {
            "step": step,
            "loss": loss,
            "num_tokens": cut.num_tokens,
            "num_supervised": cut.num_supervised,
            "learning_rate": settings.learning_rate * factor,
            "grad_norm": norm,
            "seconds": time.perf_counter() - start,
        }

    def _cut_step(self, step: int) -> StepCut:
        runtime, settings = self._learner.runtime, self._config.train
        return self._dataset.cut(
            step, settings.microbatch_tokens, settings.packing, runtime.index, runtime.num_processes
        )

    def _evaluate(self, step: int, metrics: MetricsFile, reporter: Reporter) -> None:
        settings, learner = self._config.train, self._learner
        for eval_set in self._dataset.eval:
            scores = eval_set.scorer.score(
                learner.model, learner.make_inputs, learner.runtime, settings.microbatch_tokens, settings.packing
            )
            found = summary(scores)
            metrics.write({"step": step, "eval": eval_set.name, **found})
            self._last[f"perplexity on {eval_set.name}"] = found["perplexity"]
            reporter.say(
                f"step {step}  eval {eval_set.name}: perplexity {found['perplexity']:.4f}, "
                f"token accuracy {found['token_accuracy']:.1%}"
            )

    def _save(self, step: int) -> None:
        if self._learner.runtime.is_main:
            state = {"step": step, "config": self._config.model_dump(mode="json"), "data": self._dataset.fingerprint}
            self._checkpoints.save(step, self._learner.model, self._learner.optimizer, state)
        self._learner.runtime.wait()


def is_exported(output_dir: Path) -> bool:
    return (output_dir / "adapter").is_dir() or (output_dir / "model").is_dir()


def _write_inputs(output_dir: Path, config: Config, dataset: Dataset) -> None:
    """The merged config and the samples that stay out, beside what the run makes."""
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    dropped = output_dir / "dropped.jsonl"
    rows = dataset.dropped_rows()
    dropped.unlink(missing_ok=True)
    if rows:
        dropped.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
