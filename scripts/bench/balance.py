"""How long processes would wait for each other over your data, for any number of them, without a single device.

    python scripts/bench balance CONFIG [KEY=VALUE ...] [--processes 1,8,64] [--samples-per-process 16] [--steps 50]

Reads the config, checks the data and cuts steps of SAMPLES-PER-PROCESS times PROCESSES samples as training does; where
the data is smaller than a step, a step spans several epochs. Time is counted in multiply-additions, from the model's
shape: its weights are not read. With ``run.weights=replicate`` processes wait once per step, with ``shard`` after
every micro-batch.

``waiting`` is the share of all processes' time in which they wait for the slowest: 1 - mean / max. No cut can go below
``at best``: a sample is never divided, so the slowest process takes as long as the most expensive sample. ``as they
come`` is the waiting if each process took the next SAMPLES-PER-PROCESS samples in order. ``seconds a cut`` are CPU
seconds of one core.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mmtrain.config import Config, load_config
from mmtrain.dataset.microbatches import Cut, cut_step
from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError
from mmtrain.model.cost import CostModel, cost_model
from mmtrain.model.family import probe_family
from mmtrain.model.load import model_structure
from mmtrain.model.tune import apply_tune
from mmtrain.progress import QUIET
from mmtrain.train.dataset import Dataset

HEAD = ("processes", "micro-batches each", "waiting", "at best", "as they come", "padding", "seconds a cut")


def costs_in(config: Config, processor: ChatProcessor) -> CostModel:
    """What samples cost in the config's model, made without its weights."""
    model = model_structure(config.model.path)
    with torch.device("meta"):
        family = probe_family(model, processor, QUIET.say)
        apply_tune(model, family.components, config.tune)
    return cost_model(model, family, config.tune)


@dataclass
class Step:
    """The samples of one step: their tokens, their images' tokens and those squared, and what each costs alone."""

    lengths: np.ndarray
    image_tokens: np.ndarray
    image_token_pairs: np.ndarray
    costs: np.ndarray

    def positions(self, cut: list[int], packing: bool) -> int:
        """Places that a micro-batch takes, padding counted."""
        return int(self.lengths[cut].sum() if packing else len(cut) * self.lengths[cut].max(initial=0))


@dataclass
class Lost:
    """Time of the mean and of the slowest process, summed over steps."""

    mean: float = 0.0
    slowest: float = 0.0

    def add(self, mean: float, slowest: float) -> None:
        self.mean += mean
        self.slowest += slowest

    def __str__(self) -> str:
        return f"{1 - self.mean / self.slowest:.2%}"


class Simulation:
    """Steps over the data of one config, and what a number of processes makes of them."""

    def __init__(self, config: Config) -> None:
        self.settings = config.run
        self.packing = config.run.packing is not False  # auto: the model that would be tried is not loaded
        processor = load_processor(config.model.path)
        self.dataset = Dataset(config, processor, QUIET)
        self.costs = costs_in(config, processor)

    def row(self, processes: int, each: int, steps: int) -> tuple[str, ...]:
        """One row of the table, from `steps` steps of `each` samples for every one of `processes`."""
        waiting, best, as_they_come = Lost(), Lost(), Lost()
        shares, tokens, positions, seconds = [], 0, 0, 0.0
        for step in itertools.islice(self._steps(processes * each), steps):
            lengths, costs = step.lengths.tolist(), step.costs.tolist()
            started = time.process_time()
            cuts = cut_step(lengths, self.settings.microbatch_tokens, self.packing, processes, costs)
            seconds += time.process_time() - started
            share = len(cuts) // processes
            times = self._times(step, [cuts[n : n + share] for n in range(0, len(cuts), share)])
            self._add(waiting, times)
            best.add(times.sum(1).mean(), max(times.sum(1).mean(), *costs))
            self._add(as_they_come, self._times(step, [self._in_order(step, n, each) for n in range(processes)]))
            shares.append(share)
            tokens += sum(lengths)
            positions += sum(step.positions(cut, self.packing) for cut in cuts)
        measured = f"{1 - tokens / positions:.1%}", f"{seconds / steps:.3f}"
        return (f"{processes:,}", f"{np.mean(shares):.3g}", *map(str, (waiting, best, as_they_come)), *measured)

    def _steps(self, size: int) -> Iterator[Step]:
        """Steps of `size` samples in the order of training, each epoch begun where the last one ends."""
        checked = self.dataset.checked
        order = itertools.chain.from_iterable(map(self.dataset.plan.step, itertools.count(1)))
        while True:
            chosen = list(itertools.islice(order, size))
            of = checked.num_tokens[chosen], checked.num_image_tokens[chosen], checked.image_token_pairs[chosen]
            yield Step(*of, self.costs.of(*of))

    def _in_order(self, step: Step, process: int, each: int) -> Cut:
        """A process's micro-batches of the samples that come, each begun where the last one is full."""
        cuts: Cut = [[]]
        for i in range(process * each, (process + 1) * each):
            if step.positions([*cuts[-1], i], self.packing) > self.settings.microbatch_tokens and cuts[-1]:
                cuts.append([])
            cuts[-1].append(i)
        return cuts

    def _times(self, step: Step, cuts: list[Cut]) -> np.ndarray:
        """(processes, micro-batches) what each costs; padding is computed like any token."""
        times = np.zeros((len(cuts), max(map(len, cuts))))
        for at in ((p, n) for p, own in enumerate(cuts) for n in range(len(own))):
            cut = cuts[at[0]][at[1]]
            if self.packing or not cut:
                times[at] = step.costs[cut].sum()
            else:
                longest = np.full(len(cut), step.lengths[cut].max())
                times[at] = self.costs.of(longest, step.image_tokens[cut], step.image_token_pairs[cut]).sum()
        return times

    def _add(self, lost: Lost, times: np.ndarray) -> None:
        """Processes wait for each other after every micro-batch (sharded weights), else once."""
        waits = times if self.settings.weights == "shard" else times.sum(1, keepdims=True)
        lost.add(waits.mean(0).sum(), waits.max(0).sum())


def show(rows: Iterable[tuple[str, ...]]) -> None:
    """A table in Markdown."""
    print("| " + " | ".join(HEAD) + " |\n" + "|---:" * len(HEAD) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def counts(text: str) -> list[int]:
    """Whole numbers above zero, with commas between them."""
    numbers = [int(word) for word in text.split(",")]
    if min(numbers) < 1:
        raise ValueError(text)
    return numbers


def count(text: str) -> int:
    (number,) = counts(text)
    return number


def main(words: list[str]) -> None:
    """`python scripts/bench balance` with these arguments."""
    parser = argparse.ArgumentParser(
        "bench balance", None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the config to set")
    parser.add_argument("--processes", type=counts, default="1,2,8,64,256,1024,4096", metavar="N,N,...")
    parser.add_argument("--samples-per-process", type=count, default=16, metavar="N")
    parser.add_argument("--steps", type=count, default=50, metavar="N", help="steps to cut for each row")
    args = parser.parse_intermixed_args(words)
    # peft calls transformers by a name that is going away: nothing a reader of the table can act on
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        simulation = Simulation(load_config(args.config, args.overrides))
    except UserError as error:
        sys.exit("\n".join(error.faults))
    show(simulation.row(number, args.samples_per_process, args.steps) for number in args.processes)
