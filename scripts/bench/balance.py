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
from pathlib import Path

import numpy as np

from mmtrain.config import Config, load_config
from mmtrain.dataset.microbatches import Cut
from mmtrain.encoding.load import processor_of
from mmtrain.errors import UserError
from mmtrain.plan.structure import structure_of
from mmtrain.plan.waiting import Simulation, Step, Waiting
from mmtrain.progress import QUIET
from mmtrain.train.dataset import Dataset

HEAD = ("processes", "micro-batches each", "waiting", "at best", "as they come", "padding", "seconds a cut")


class Balance:
    """Steps over the data of one config, and what a number of processes makes of them."""

    def __init__(self, config: Config) -> None:
        processor = processor_of(config.model)
        self.dataset = Dataset(config, processor, QUIET)
        self.max_tokens = config.run.microbatch_tokens
        packing = config.run.packing is not False  # auto: the model that would be tried is not loaded
        self.simulation = Simulation(config.run, self.dataset.checked, structure_of(config, processor).costs, packing)

    def row(self, processes: int, each: int, steps: int) -> tuple[str, ...]:
        """One row of the table, from `steps` steps of `each` samples for every one of `processes`."""
        simulation, packing = self.simulation, self.simulation.packing
        waiting, best, as_they_come = Waiting(), Waiting(), Waiting()
        shares, tokens, positions, seconds = [], 0, 0, 0.0
        for step in itertools.islice(self._steps(processes * each), steps):
            started = time.process_time()
            cuts = simulation.cut(step, processes)
            seconds += time.process_time() - started
            share = len(cuts) // processes
            times = simulation.times(step, [cuts[n : n + share] for n in range(0, len(cuts), share)])
            simulation.add(waiting, times)
            best.add(times.sum(1).mean(), max(times.sum(1).mean(), *step.costs))
            simulation.add(
                as_they_come, simulation.times(step, [self._in_order(step, n, each) for n in range(processes)])
            )
            shares.append(share)
            tokens += int(step.lengths.sum())
            positions += sum(step.positions(cut, packing) for cut in cuts)
        shown = [f"{found.share:.2%}" for found in (waiting, best, as_they_come)]
        return (
            f"{processes:,}",
            f"{np.mean(shares):.3g}",
            *shown,
            f"{1 - tokens / positions:.1%}",
            f"{seconds / steps:.3f}",
        )

    def _steps(self, size: int) -> Iterator[Step]:
        """Steps of `size` samples in the order of training, each epoch begun where the last one ends."""
        order = itertools.chain.from_iterable(map(self.dataset.plan.step, itertools.count(1)))
        while True:
            yield self.simulation.step(list(itertools.islice(order, size)))

    def _in_order(self, step: Step, process: int, each: int) -> Cut:
        """A process's micro-batches of the samples that come, each begun where the last one is full."""
        cuts: Cut = [[]]
        for i in range(process * each, (process + 1) * each):
            if step.positions([*cuts[-1], i], self.simulation.packing) > self.max_tokens and cuts[-1]:
                cuts.append([])
            cuts[-1].append(i)
        return cuts


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
        balance = Balance(load_config(args.config, args.overrides))
    except UserError as error:
        sys.exit("\n".join(error.faults))
    show(balance.row(number, args.samples_per_process, args.steps) for number in args.processes)
