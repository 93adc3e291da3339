"""What a run learns from and is measured on: checked before the first step, and cut into steps."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID

from mmtrain.config import Config
from mmtrain.config.schema import Run, Source
from mmtrain.dataset.encode_all import Recipe
from mmtrain.dataset.microbatches import cut_step
from mmtrain.dataset.plan import Indices, Plan
from mmtrain.dataset.samples import SampleSet
from mmtrain.dataset.validate import Checked, check_samples
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError
from mmtrain.model.cost import CostModel
from mmtrain.model.load import length_limit
from mmtrain.scoring.scorer import Scorer


@dataclass(frozen=True, slots=True)
class EvalSet:
    """One source of `data.eval`, checked and ready to be scored."""

    name: str
    samples: SampleSet
    checked: Checked
    scorer: Scorer


@dataclass(frozen=True, slots=True)
class StepCut:
    """One step: its samples, and the micro-batches, some perhaps empty, that this process computes."""

    samples: tuple[int, ...]
    own: tuple[tuple[int, ...], ...]
    num_tokens: int
    num_supervised: int
    operations: float
    """What it must compute, over all processes: a multiplication and an addition are two."""


class Dataset:
    """The training samples, the evaluation sets and the plan of steps of one config.

    Raises UserError with every sample of every source that cannot be used.
    """

    def __init__(
        self, config: Config, processor: ChatProcessor, console: Console, tick: Callable[[], None] = lambda: None
    ) -> None:
        data, settings = config.data, config.train
        limit = length_limit(config.model.path, data.max_length)
        sets: dict[str, Sequence[Source]] = {source.name or Path(source.path).name: [source] for source in data.eval}
        if len(sets) < len(data.eval):
            raise UserError("data.eval: two sources have the same name: give each its own `name`")
        recipes = [Recipe.of(config, sources) for sources in (data.train, *sets.values())]
        check = functools.partial(check_samples, processor=processor, limit=limit, too_long=data.too_long)
        (self.train, self.checked), *found = _check_all(["train", *sets], recipes, check, console, tick)
        self.eval = [_eval_set(name, *one) for name, one in zip(sets, found, strict=True)]
        weights = [source.weight for source in data.train]
        self.plan = Plan(_by_source(self.train, self.checked), weights, settings.batch_size, settings.seed)
        by_epochs = max(1, math.ceil((settings.epochs or 1.0) * self.plan.steps_per_epoch))
        self.num_steps = settings.steps if settings.steps is not None else by_epochs

    def cut(
        self, step: int, settings: Run, packing: bool, costs: CostModel, process: int, num_processes: int
    ) -> StepCut:
        """Step `step` (from 1) and this process's share of its micro-batches, as many as every other process's."""
        samples = self.plan.step(step)
        checked = self.checked
        lengths = checked.num_tokens[samples]
        multiple = num_processes if settings.microbatches == "auto" else settings.microbatches
        supervised = checked.num_supervised[samples]
        cost = costs.of(lengths, checked.num_image_tokens[samples], checked.image_token_pairs[samples], supervised)
        cuts = cut_step(lengths.tolist(), settings.microbatch_tokens, packing, multiple, cost.tolist())
        share = len(cuts) // num_processes
        own = tuple(tuple(samples[i] for i in cut) for cut in cuts[process * share : (process + 1) * share])
        return StepCut(tuple(samples), own, int(lengths.sum()), int(supervised.sum()), 2.0 * float(cost.sum()))

    def summary(self) -> str:
        """What was read, in one line, and what was dropped."""
        used = self.checked.used
        tokens, supervised = self.checked.num_tokens.sum(), self.checked.num_supervised.sum()
        line = (
            f"{len(used):,} samples, {self.checked.num_images:,} images, {tokens:,} tokens "
            f"({supervised / tokens:.1%} learned); {self.num_steps:,} steps, {self.plan.steps_per_epoch:,} an epoch"
        )
        dropped = len(self.dropped_rows())
        return line + (f"; {dropped:,} samples dropped as too long, listed in dropped.jsonl" if dropped else "")

    def dropped_rows(self) -> list[dict[str, Any]]:
        """A row for each sample that stays out under `data.too_long: drop`."""
        sets = [(self.train, self.checked), *((e.samples, e.checked) for e in self.eval)]
        return [
            {"file": str(samples.place(index).file), "line": samples.place(index).line, "reason": reason}
            for samples, checked in sets
            for index, reason in checked.dropped
        ]


def _check_all(
    names: list[str],
    recipes: list[Recipe],
    check: Callable[..., tuple[SampleSet, Checked]],
    console: Console,
    tick: Callable[[], None],
) -> list[tuple[SampleSet, Checked]]:
    """Check every set, with the faults of all of them together. `tick` is called again and again meanwhile."""
    found, faults = [], []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for name, recipe in zip(names, recipes, strict=True):
            bar = progress.add_task(f"checking {name}", total=None)

            def advance(number: int, bar: TaskID = bar) -> None:
                tick()
                progress.advance(bar, number)

            try:
                found.append(check(recipe, advance=advance, tick=tick))
            except UserError as error:
                faults += error.faults
    if faults:
        raise UserError(faults)
    return found


def _eval_set(name: str, samples: SampleSet, checked: Checked) -> EvalSet:
    scorer = Scorer(samples, checked.used, checked.num_tokens[checked.used].tolist())
    return EvalSet(name, samples, checked, scorer)


def _by_source(samples: SampleSet, checked: Checked) -> list[Indices]:
    """The used sample numbers of each source. Raises UserError where a source has none."""
    of = samples.sources(checked.used)
    return [checked.used[of == number] for number in range(samples.num_sources)]
