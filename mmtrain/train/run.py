"""`mmtrain train`: check everything, load the model, take the steps, leave the adapter."""

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mmtrain.config import Config, dump_config
from mmtrain.dataset.batch import Batch, Loader
from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import NonFiniteError, Stopped, StorageError, UserError, storage_faults
from mmtrain.model.components import PartReport, prepare_learning, without_adapter
from mmtrain.model.cost import CostModel, cost_model
from mmtrain.model.dropout import DropoutClock, install_dropout
from mmtrain.model.family import probe_family
from mmtrain.model.inputs import InputMaker
from mmtrain.model.kernels.install import install
from mmtrain.model.kernels.products import ROW_MULTIPLE
from mmtrain.model.load import checkpoint_activations, compile_layers, load_model
from mmtrain.model.root import Root
from mmtrain.runtime.processes import Runtime
from mmtrain.runtime.shard import Filled, num_held, shard, share, whole
from mmtrain.scoring.image_cache import find_features, keeps_features, make_store
from mmtrain.scoring.packing import choose_packing
from mmtrain.scoring.statistics import summary
from mmtrain.train.ceiling import matmul_rate
from mmtrain.train.checkpoint import CheckpointFolder, checkpoint_bytes, restore, snapshot
from mmtrain.train.dataset import Dataset, EvalSet, StepCut
from mmtrain.train.export import export
from mmtrain.train.gradients import is_exact
from mmtrain.train.metrics import METRICS, MetricsFile, Reporter, make_console, show_parts
from mmtrain.train.optimizer import make_optimizer, rate_factor, set_rate
from mmtrain.train.run_state import RunState
from mmtrain.train.step import Learner, train_step

OnStep = Callable[[dict[str, Any]], None]


def train(config: Config, accept: Sequence[str] = (), on_step: OnStep = lambda row: None) -> None:
    """Run or continue the training that `config` describes, `accept`ing changes of these keys.

    `on_step` is called after each step with its row of metrics.jsonl and the step's floating-point `operations`.

    Raises UserError for what the user can mend, and Stopped where a signal ended the run.
    """
    output_dir = Path(config.run.output_dir)
    runtime = Runtime(config.model.dtype, config.run.hang_timeout, config.run.num_threads)
    console = make_console(quiet=not runtime.is_main)
    with runtime.supervised(output_dir / "stacks"):
        _train(config, accept, on_step, runtime, output_dir, console)
    runtime.close()


def _train(
    config: Config, accept: Sequence[str], on_step: OnStep, runtime: Runtime, output_dir: Path, console: Console
) -> None:
    activity, microbatches = runtime.activity, config.run.microbatches
    if microbatches != "auto" and microbatches % runtime.num_processes:
        raise UserError(
            f"run.microbatches: {microbatches} cannot be shared by {runtime.num_processes} processes: "
            "expected a multiple of their number, or auto"
        )
    activity.set("checking the data")
    processor = load_processor(config.model.path)
    dataset = Dataset(config, processor, console, activity.tick)
    checkpoints = CheckpointFolder(output_dir / "checkpoints", config.run.keep_checkpoints)
    activity.set("comparing with the checkpoint")
    state = RunState(config, runtime)
    resume = state.resume(lambda: state.find(dataset, checkpoints, accept, console))
    if resume.step == dataset.num_steps and is_exported(output_dir):
        console.print(f"the run in {output_dir} is finished; --fresh starts it over")
        return
    if runtime.is_main:
        _write_inputs(output_dir, config, dataset)
    activity.set("loading the model")
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    learner, parts, costs = make_learner(config, processor, runtime, say)
    if runtime.is_main:
        checkpoints.check_room(checkpoint_bytes(learner.model))
    if resume.checkpoint is not None:
        restore(resume.checkpoint, learner.model, learner.optimizer, share)
    show_parts(parts, console)
    for line in (dataset.summary(), *layout_lines(config, learner)):
        say(line)
    loop = TrainingLoop(config, dataset, learner, costs, checkpoints, state, resume.evaluated, console)
    loop.take_steps(resume.step + 1, on_step)
    loop.finish(processor)


def make_learner(
    config: Config, processor: ChatProcessor, runtime: Runtime, say: Callable[[str], None] = lambda line: None
) -> tuple[Learner, list[PartReport], CostModel]:
    """The model with what learns of it, on its device, and its optimizer; its first weights follow from the seed."""
    seed, settings = config.train.seed, config.run
    torch.manual_seed(seed)
    base = load_model(config.model.path, config.model.dtype, processor)
    runtime.activity.set("preparing the model")
    family = probe_family(base, processor, say)
    for line in without_adapter(base, family.components, config.tune):
        say(line)
    model, parts = prepare_learning(base, family.components, config.tune)
    if settings.activation_checkpointing:
        checkpoint_activations(base)
    clock = DropoutClock(seed)
    install_dropout(model, family, config.tune, clock)
    root = Root(model)
    sharded = settings.weights == "shard" and runtime.num_processes > 1
    if not sharded:
        model.to(runtime.device)
    if settings.kernels == "auto":
        say(install(model).line)
    costs = cost_model(base, family, config.tune)
    packing = choose_packing(model, processor, config, runtime, say)  # on the CPU where weights are sharded later
    if settings.compile:
        compile_layers(base)
    if sharded:
        shard(root, runtime.device)
        model.to(runtime.device)
    store = make_store(config, runtime, say) if keeps_features(config, runtime.num_processes) else None
    features = find_features(model, processor, runtime, store, say)
    make_inputs = InputMaker(model, processor, features)
    exact = settings.microbatches != "auto" and not sharded
    optimizer = make_optimizer(model, family.components, config)
    learner = Learner(model, root, make_inputs, family.head_kind, optimizer, clock, runtime, exact, sharded, packing)
    return learner, parts, costs


def layout_lines(config: Config, learner: Learner) -> Iterator[str]:
    """How the weights are held, and whether another number of processes gives the same bits."""
    settings, runtime = config.run, learner.runtime
    held, total = num_held(learner.model)
    count, threads = runtime.num_processes, runtime.num_threads
    yield (
        f"weights {'spread over' if learner.sharded else 'whole on each of'} {count} process{'es' * (count > 1)}: "
        f"{held / 1e6:,.1f} of {total / 1e6:,.1f} MB, {threads} CPU thread{'s' * (threads > 1)}"
    )
    if learner.exact and is_exact(int(settings.microbatches), count):
        yield "bits: the same on 1, 2, 4 … processes of this kind of machine"
    elif count > 1:
        why = "the weights are sharded" if learner.sharded else "run.microbatches is auto"
        why = f"{count} is no power of two" if learner.exact else why
        yield f"bits: others than on another number of processes ({why})"
    limits = settings.image_cache
    if learner.make_inputs.features is not None:
        yield f"image cache: on, {limits.memory_gib:g} GiB in memory and {limits.disk_gib:g} GiB on disk"


class TrainingLoop:
    """The loop over the steps, and what is written as it goes."""

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        learner: Learner,
        costs: CostModel,
        checkpoints: CheckpointFolder,
        state: RunState,
        evaluated: Sequence[str],
        console: Console,
    ) -> None:
        self._config, self._dataset, self._learner, self._costs = config, dataset, learner, costs
        self._checkpoints, self._state, self._evaluated = checkpoints, state, evaluated
        self._console = console
        self._output_dir = Path(config.run.output_dir)
        runtime, dtype = learner.runtime, getattr(torch, config.model.dtype)
        self._ceiling = matmul_rate(runtime.device, dtype) * runtime.num_processes
        self._cut = functools.lru_cache(maxsize=256)(self._cut_step)
        self._filled = Filled(dataset.train, dataset.checked) if learner.sharded else None
        self._complete = self._saved = 0
        """The last step that is complete, and the last one that a checkpoint holds."""

    def take_steps(self, first: int, on_step: OnStep) -> None:
        """Take the steps from `first` to the last. Raises Stopped, with a checkpoint, where a signal asked to; where a
        fault of the data ends the run, the last complete step is saved before the error leaves."""
        self._complete = self._saved = first - 1
        runtime = self._learner.runtime
        runtime.activity.saves_alone = runtime.is_main and not self._learner.sharded
        try:
            self._take_steps(first, on_step)
        except UserError as error:
            self._save_complete(error)
            raise

    def _take_steps(self, first: int, on_step: OnStep) -> None:
        settings, last, activity = self._config.run, self._dataset.num_steps, self._learner.runtime.activity
        samples = self._dataset.train if self._filled is None else self._filled
        cuts = (cut for step in range(first, last + 1) for cut in self._cut(step).own if cut)
        learner, processor = self._learner, self._dataset.encoder.processor
        batches = Loader(samples, processor, learner.packing, learner.make_inputs.store, ROW_MULTIPLE).batches(cuts)
        metrics = MetricsFile(self._output_dir / METRICS, first - 1, self._learner.runtime.is_main)
        with Reporter(last, first - 1, self._console) as reporter, metrics:
            self._evaluate(first - 1, metrics, reporter, self._evaluated)  # at the start what the model knew before
            for step in range(first, last + 1):
                activity.set("data", step)
                row, asked = self._take_step(step, batches)
                self._complete = step
                metrics.write(row)
                reporter.step(row)
                on_step({**row, "operations": self._cut(step).operations})
                asked = asked or self._evaluate(step, metrics, reporter)
                if asked is not None or step % settings.checkpoint_every == 0 or step == last:
                    asked = self._save(step) or asked
                if asked is not None and step < last:
                    raise Stopped(asked, f"stopped after step {step}, which is saved; the same command resumes")

    def finish(self, processor: ChatProcessor) -> None:
        """Write what the run leaves, and check it."""
        runtime = self._learner.runtime
        runtime.activity.set("exporting" if runtime.is_main else "waiting")
        if runtime.is_main or self._learner.sharded:
            used = self._dataset.checked.used
            loader = Loader(self._dataset.train, processor, self._learner.packing, row_multiple=ROW_MULTIPLE)
            batch = loader.load([int(used[0])])
            line = export(self._learner, self._config, processor, batch, len(used))
            self._console.print(line, highlight=False, soft_wrap=True)
        runtime.activity.set("waiting")

    def _take_step(self, step: int, batches: Iterator[Batch]) -> tuple[dict[str, Any], int | None]:
        settings, start = self._config.train, time.perf_counter()
        cut = self._cut(step)
        factor = rate_factor(step, self._dataset.num_steps, settings.warmup_steps, settings.schedule)
        set_rate(self._learner.optimizer, factor)
        own = (self._next(batches) if numbers else None for numbers in cut.own)
        try:
            done = train_step(self._learner, own, cut.num_supervised, step, settings.max_grad_norm)
        except NonFiniteError as error:
            places = ", ".join(str(self._dataset.train.place(number)) for number in cut.samples)
            raise NonFiniteError(f"{error}; its samples: {places}; nothing of it is saved") from None
        seconds = time.perf_counter() - start
        row = {
            "step": step,
            "loss": done.loss,
            "num_tokens": cut.num_tokens,
            "num_supervised": cut.num_supervised,
            "learning_rate": settings.learning_rate * factor,
            "grad_norm": done.grad_norm,
            "seconds": seconds,
            "mfu": cut.operations / seconds / self._ceiling,
        }
        return row, done.asked

    def _next(self, batches: Iterator[Batch]) -> Batch:
        self._learner.runtime.activity.set("data")
        return next(batches)

    def _cut_step(self, step: int) -> StepCut:
        runtime = self._learner.runtime
        # from the second epoch on every picture was seen; a rule that follows from the step alone, as the cut must
        kept = self._learner.make_inputs.store is not None and step > self._dataset.plan.steps_per_epoch
        costs = self._costs.with_kept_features if kept else self._costs
        settings, packing = self._config.run, self._learner.packing
        cut = self._dataset.cut(step, settings, packing, costs, runtime.index, runtime.num_processes)
        return cut if self._filled is None else replace(cut, own=tuple(map(self._filled.fill, cut.own)))

    def _evaluate(self, step: int, metrics: MetricsFile, reporter: Reporter, done: Sequence[str] = ()) -> int | None:
        """Score the evaluation sets behind `step`, but those `done`, where it is due; gives the signal that asked to
        stop on the way. What a run was stopped in is taken again when the run goes on."""
        settings, learner = self._config.run, self._learner
        if step % settings.eval_every and step != self._dataset.num_steps:
            return None
        learner.runtime.activity.set("evaluating", step)
        for eval_set in self._dataset.eval:
            if eval_set.name in done:
                continue
            filled = Filled(eval_set.samples, eval_set.checked) if learner.sharded else None
            scores = eval_set.scorer.score(
                learner.root,
                learner.head_kind,
                learner.make_inputs,
                learner.runtime,
                settings.microbatch_tokens,
                learner.packing,
                filled,
            )
            if scores is None:
                return learner.runtime.agree(torch.zeros(0, dtype=torch.float64))[1]
            self._tell(step, eval_set, summary(scores), metrics, reporter)
        return None

    def _tell(
        self, step: int, eval_set: EvalSet, found: dict[str, Any], metrics: MetricsFile, reporter: Reporter
    ) -> None:
        metrics.write({"step": step, "eval": eval_set.name, **found})
        reporter.say(
            f"step {step}  eval {eval_set.name}: perplexity {found['perplexity']:.4f}, "
            f"token accuracy {found['token_accuracy']:.1%}"
        )

    def _save(self, step: int) -> int | None:
        """Write a checkpoint; gives the signal that came meanwhile."""
        runtime = self._learner.runtime
        runtime.activity.set("saving" if runtime.is_main else "awaiting the save")
        self._write(step)
        return runtime.agree(torch.zeros(0, dtype=torch.float64))[1]

    def _write(self, step: int) -> None:
        """The main process's part of saving; where weights are sharded, all processes gather them for it."""
        runtime, learner = self._learner.runtime, self._learner
        if runtime.is_main or learner.sharded:
            held = snapshot(learner.model, learner.optimizer, whole, runtime.activity.tick)
        if runtime.is_main:
            self._checkpoints.save(step, held, self._state.at(step))
        self._saved = step

    def _save_complete(self, error: UserError) -> None:
        """Save the last complete step before `error`, a fault of the data in any process, ends the run, and say so.

        The weights are those behind that step until the next one is complete. Only the main process can save: the
        others are on their way out, so sharded weights cannot be gathered any more.
        """
        step, runtime = self._complete, self._learner.runtime
        if error.exit_code != UserError.exit_code or step == self._saved or not runtime.is_main:
            return
        if self._learner.sharded:
            error.faults[-1] += f"; step {step} cannot be saved, because the weights are sharded"
            return
        runtime.activity.set("saving")
        try:
            self._write(step)
        except StorageError as failed:
            error.faults += failed.faults
        else:
            error.faults[-1] += f"; step {step} is saved: fix the data and run the same command again"


def is_exported(output_dir: Path) -> bool:
    return (output_dir / "adapter").is_dir() or (output_dir / "model").is_dir()


def _write_inputs(output_dir: Path, config: Config, dataset: Dataset) -> None:
    """The merged config and the samples that stay out, beside what the run makes."""
    with storage_faults(f"{output_dir}: the config cannot be written"):
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        dropped = output_dir / "dropped.jsonl"
        rows = dataset.dropped_rows()
        dropped.unlink(missing_ok=True)
        if rows:
            dropped.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
