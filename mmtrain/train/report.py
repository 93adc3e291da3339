"""What a run prints: how it is executed, before the first step, how its steps go, and a summary at the end."""

import shlex
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from mmtrain.config import Config
from mmtrain.config.tune_section import Lora
from mmtrain.dataset.validate import CheckedSamples
from mmtrain.model.tune import ComponentReport
from mmtrain.progress import Progress, Task
from mmtrain.runtime.shard import own_and_total_bytes
from mmtrain.safe_text import counted, visible
from mmtrain.scoring.statistics import perplexity_text
from mmtrain.train.dataset import Dataset
from mmtrain.train.folder import BEST
from mmtrain.train.gradients import is_exact
from mmtrain.train.metrics import METRICS
from mmtrain.train.objective import Trained
from mmtrain.train.step import Learner
from mmtrain.train.summary import duration, summarize
from mmtrain.train.watched import Best, History

LOG_SECONDS = 5.0
NUM_AVERAGED = 50
"""Steps, up to the last one, whose average loss is shown."""


def start_report(config: Config, dataset: Dataset, learner: Learner) -> Iterator[str | Table]:
    """What is printed before the first step."""
    yield from component_lines(learner.component_reports)
    yield data_line(dataset)
    yield from _trial_lines(learner)
    yield weights_line(learner)
    yield from bits_lines(config, learner)
    yield from image_cache_lines(config, learner.make_inputs.features is not None)
    yield from serving_lines(config)


def data_line(dataset: Dataset) -> str:
    """What was read, and what was left out."""
    checked = dataset.checked
    tokens, supervised = checked.num_tokens.sum(), checked.num_supervised.sum()
    num_records = len(np.unique(dataset.train.store.records[checked.used]))
    samples = counted(len(checked.used), "sample")
    if num_records < len(checked.used):
        samples = f"{counted(num_records, 'conversation')} gave {counted(len(checked.used), 'sequence')}"
    line = (
        f"{samples}, {counted(checked.num_images, 'image')}, {tokens:,} tokens "
        f"({supervised / tokens:.1%} trained on); {counted(dataset.num_steps, 'step')}"
    )
    if dataset.stream is not None:
        how = f"{counted(len(dataset.stream.order), 'file')}, {counted(dataset.stream.window, 'record')} at a time"
        return f"streaming: {how}; in the first window {line}"
    line += f", {dataset.plan.steps_per_epoch:,} an epoch"
    return line + "".join(f"; {more}" for more in (_left_out(dataset), _not_chosen(checked)) if more)


def _left_out(dataset: Dataset) -> str:
    """What is missing from all sets for what it is."""
    reasons = {
        "dropped": "dropped as too long",
        "skipped": "skipped because of faults",
        "duplicates": "left out as duplicates",
    }
    numbers = {why: sum(len(getattr(one, name)) for one in dataset.all_checked) for name, why in reasons.items()}
    found = [f"{counted(number, 'sample')} {why}" for why, number in numbers.items() if number]
    num_read = sum(len(one.num_tokens) for one in dataset.all_checked)
    return f"of {num_read:,} read, {', '.join(found)}, listed in dropped.jsonl" if found else ""


def _not_chosen(checked: CheckedSamples) -> str:
    """What the config leaves out of the training data otherwise."""
    numbers = {"held out for evaluation": checked.num_other_side, "over max_samples": checked.num_over_max}
    return ", ".join(f"{counted(number, 'sample')} {why}" for why, number in numbers.items() if number)


def component_lines(reports: Sequence[ComponentReport]) -> Iterator[str | Table]:
    """What is trainable, and the modules that each component was found in."""
    yield _component_table(reports)
    for row in reports:
        if row.roots:
            yield f"{row.component}: {', '.join(map(visible, row.roots))}"


def _component_table(reports: Sequence[ComponentReport]) -> Table:
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


def _trial_lines(learner: Learner) -> Iterator[str]:
    """What the trials at the start found; what falls back has been said."""
    if learner.processor.trial is not None:
        yield from (f"ids {line}" for line in learner.processor.trial.summary())
    if learner.packing:
        yield "packing: on, packed rows equal samples alone"


def weights_line(learner: Trained) -> str:
    """Where the weights are."""
    own, total = own_and_total_bytes(learner.model)
    count, threads = learner.runtime.num_processes, learner.runtime.num_threads
    return (
        f"weights {'sharded over' if learner.sharded else 'replicated on'} {count} process{'es' * (count > 1)}: "
        f"{own / 1e6:,.1f} of {total / 1e6:,.1f} MB, {threads} CPU thread{'s' * (threads > 1)}"
    )


def bits_lines(config: Config, learner: Trained) -> Iterator[str]:
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


def image_cache_lines(config: Config, is_on: bool) -> Iterator[str]:
    """How much of the outputs of frozen vision and projector is cached."""
    limits = config.run.image_cache
    if is_on:
        yield f"image cache: on, {limits.memory_gib:g} GiB in memory and {limits.disk_gib:g} GiB on disk"


def serving_lines(config: Config) -> Iterator[str]:
    """Whether vLLM, which many use to serve adapters, serves this one: it refuses components trained in full and DoRA,
    and ignores LoRA outside the language model."""
    modes = config.tune.trainable
    loras = {name: mode for name, mode in modes.items() if isinstance(mode, Lora)}
    reasons = [f"{name} is full" for name in modes if name not in loras]
    reasons += ["the variant is dora"] if any(mode.variant == "dora" for mode in loras.values()) else []
    reasons += [f"{name} has LoRA" for name in loras if name != "language"]
    if loras and reasons:
        merged = f"mmtrain merge {shlex.quote(visible(config.run.output_dir))} -o DIR"
        yield f"serving: vLLM does not serve this adapter ({', '.join(reasons)}); after the run: {merged}"


def end_report(run: Path) -> Iterator[str]:
    """What is printed when the run in `run` has finished."""
    found, name = summarize(run), visible(str(run))
    trained_on = f"{counted(found.num_pairs, 'pair')}" if found.num_pairs else f"{found.num_supervised:,} trained on"
    yield f"{counted(found.num_steps, 'step')} in {duration(found.seconds)}, {found.num_tokens:,} tokens ({trained_on})"
    for one in found.evals:
        yield (
            f"perplexity on {visible(one.name)}: {perplexity_text(one.first)} before the first step, "
            f"{perplexity_text(one.last)} after the last, best {perplexity_text(one.best)} after step {one.best_step:,}"
        )
    for answers in found.answers:
        yield (
            f"{answers.metric} on {visible(answers.name)}: {answers.first:.1%} before the first step, "
            f"{answers.last:.1%} after the last, best {answers.best:.1%} after step {answers.best_step:,}; "
            f"best blind answer {answers.blind:.1%}"
        )
        if answers.verdict is not None:
            yield f"on {visible(answers.name)} the model {answers.verdict}"
    for way in found.retrieval:
        yield (
            f"recall@1 of {way.direction} on {visible(way.name)}: {way.first:.1%} before the first step, "
            f"{way.last:.1%} after the last"
        )
    saved = "adapter" if (run / "adapter").is_dir() else "model"
    yield f"{saved}: {name}/{saved}, metrics: {name}/{METRICS}, config: {name}/config.yaml"
    config, word = shlex.quote(f"{name}/config.yaml"), shlex.quote(name)
    if found.num_pairs:
        if found.retrieval:
            yield f"next: mmtrain eval retrieval {config} --adapter {word}"
        return
    if saved == "adapter" and found.evals:
        yield f"next: mmtrain eval answers {config} --adapter {word}"
    else:
        yield f"next: mmtrain generate {word} -i"


def early_line(config: Config, history: History, step: int) -> str:
    """Why the run ended after `step`."""
    stopping = config.train.early_stopping
    assert stopping is not None
    best = history.best(stopping.metric)
    assert best is not None
    return f"ended early after step {step:,}: {visible(stopping.metric)} has not improved since step {best.step:,}"


def best_line(config: Config, best: Best) -> str:
    """What is exported as the best."""
    after_last = "" if best.value == best.last else f", {best.last:.4f} at the end"
    return (
        f"best: {visible(config.run.output_dir)}/{BEST}, after step {best.step:,}: "
        f"{visible(str(config.run.keep_best))} {best.value:.4f}{after_last}"
    )


def finished_line(run: Path, step: int, num_steps: int) -> str:
    """What is printed when a finished run is started again."""
    name = visible(str(run))
    if step < num_steps:
        return (
            f"the run in {name} has finished early after step {step:,} (train.early_stopping); --fresh starts it over"
        )
    return f"the run in {name} has finished; larger train.steps or epochs extend it, --fresh starts it over"


class StepReporter:
    """Shows how the steps go: next to a bar on a terminal, otherwise in a line every few seconds."""

    def __init__(
        self, num_steps: int, steps_per_epoch: int | None, task: Task, progress: Progress, memory: Callable[[], int]
    ) -> None:
        """`steps_per_epoch`: None where it is not known. `memory`: gives the bytes in use, whose peak is shown."""
        self._num_steps, self._steps_per_epoch = num_steps, steps_per_epoch
        self._memory, self._peak = memory, 0
        self._task, self._progress = task, progress
        self._losses: deque[float] = deque(maxlen=NUM_AVERAGED)
        self._start, self._num_done, self._last_line = time.monotonic(), 0, 0.0

    def report(self, row: dict[str, Any]) -> None:
        """`row` is the step's row of metrics.jsonl."""
        step, now = row["step"], time.monotonic()
        self._losses.append(row["loss"])
        self._num_done += 1
        average = sum(self._losses) / len(self._losses)
        loss, mfu = f"loss {row['loss']:.4f} (average {average:.4f})", f"{row['mfu']:.0%} mfu"
        epoch = f"epoch {step / self._steps_per_epoch:.2f}  " if self._steps_per_epoch else ""
        speed = f"{row['num_tokens'] / row['seconds']:,.0f} tok/s"
        self._peak = max(self._peak, self._memory())
        memory = f"peak {self._peak / 2**30:.1f} GiB"
        self._task.advance()
        self._task.note(f"{epoch}{loss}  {speed}  {mfu}  {memory}")
        is_due = not self._progress.shows_bars and (step == 1 or now - self._last_line >= LOG_SECONDS)
        if is_due or step == self._num_steps:
            self._last_line = now
            rate, norm = f"lr {row['learning_rate']:.2e}", f"grad {row['grad_norm']:.3f}"
            left = (now - self._start) / self._num_done * (self._num_steps - step)
            eta = f"  ETA {duration(left)}" if left else ""
            self._progress.say(
                f"step {step}/{self._num_steps}  {epoch}{loss}  {rate}  {norm}  {speed}  {mfu}  {memory}{eta}"
            )
