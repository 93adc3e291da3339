"""Parts of the torture: signals and faults in every phase of a run, under every launcher, and two nodes."""

from __future__ import annotations

import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support import data_cases as dc
from support import fault_cases as fc
from support import launch_cases as lc
from support.forked import Server

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Tally:
    """How many cases there were, which went wrong, and the longest time of each kind."""

    def __init__(self) -> None:
        self.num = 0
        self.faults: list[str] = []
        self.longest: dict[str, float] = {}
        self._begun = time.monotonic()

    def add(self, kind: str, case: Any, *args: Any) -> None:
        try:
            found = case(*args)
        except AssertionError as error:
            found = [f"{case.__name__}{args[1:]}: {error}"]
        faults, seconds = found if isinstance(found, tuple) else (found, None)
        self.num += 1
        if faults:
            self.faults.append(faults[0])
            print(*faults, sep="\n", file=sys.stderr, flush=True)
        if seconds is not None:
            self.longest[kind] = max(seconds, self.longest.get(kind, 0.0))

    def line(self, limits: dict[str, float]) -> tuple[str, bool]:
        times = ", ".join(f"{kind} at most {seconds:.1f} s" for kind, seconds in self.longest.items())
        late = [kind for kind, limit in limits.items() if self.longest.get(kind, 0.0) > limit]
        good = not self.faults and not late
        line = f"{self.num - len(self.faults)} of {self.num} cases as they should be"
        line += f"; {times}" if times else ""
        line += f"; too late: {', '.join(late)}" if late else ""
        return f"{line}; {time.monotonic() - self._begun:.0f} s", good


@contextmanager
def worlds() -> Iterator[fc.World]:
    server = Server()
    try:
        with tempfile.TemporaryDirectory(prefix="mmtrain-torture-", ignore_cleanup_errors=True) as folder:
            yield fc.World(Path(folder), server)
    finally:
        server.close()


def signals(
    signums: tuple[signal.Signals, ...] = SIGNALS, phases: tuple[str, ...] = tuple(fc.PHASES)
) -> tuple[str, bool]:
    """Three signals in eight phases to either of two processes and to one alone, and twice."""
    tally = Tally()
    with worlds() as world:
        for phase in phases:
            for signum in signums:
                for rank in (0, 1):
                    tally.add("left", fc.signal_case, world, phase, signum, rank)
        for number, phase in enumerate(phases):
            if phase != "gradients":
                tally.add("one process left", fc.signal_case, world, phase, signums[number % len(signums)], 0, 1)
            if fc.PHASES[phase].step is not None and phase not in ("saving",):
                signum = signums[number % len(signums)]
                tally.add("left after the second signal", fc.second_signal_case, world, phase, signum, number % 2)
    return tally.line({"left after the second signal": 2.0})


def faults(
    stops: int = 10, nans: int = 10, loaders: int = 3, launched: bool = True, full: bool = True
) -> tuple[str, bool]:
    """Processes killed, stopped, hanging, failing; launchers killed and signalled. `full`: all of it, not a sample."""
    tally, random_ = Tally(), random.Random(0)
    with worlds() as world:
        for phase in fc.PHASES if full else ("forward",):
            for rank in (0, 1):
                tally.add("the peer of a killed process left", fc.kill_case, world, phase, rank)
        for number in range(stops):
            processes = 2 + 2 * (number % 2)
            rank = random_.randrange(processes)
            tally.add("a stopped one found", fc.stop_case, world, processes, rank, random_.uniform(1.2, 3))
        for rank in (0, 1):
            grace = 20.0 if full else 3.0
            tally.add("left with the peer stopped", fc.stop_then_signal_case, world, rank, grace)
        for number in range(nans):
            target = (fc.NLL, "mmtrain.train.step.flatten")[number % 2]
            tally.add("", dc.nan_case, world, target, random_.randrange(2), random_.randint(1, 4))
        for number in range(loaders):
            for rank in (0, 1) if full else (1,):
                tally.add("a loader's fault found", dc.loader_case, world, ("break", "raise", "hang")[number], rank)
        if launched:
            _launched(tally, world)
    limits = {"a stopped one found": 5.0, "left with the peer stopped": 24.0, "workers of a killed launcher gone": 5.0}
    return tally.line(limits)


def _launched(tally: Tally, world: fc.World) -> None:
    for signum in SIGNALS:
        tally.add("", lc.launched_signal_case, world, signum, fc.CODES[signum])
    tally.add("workers of a killed launcher gone", lc.launcher_killed_case, world)
    for processes in (1, 2):
        tally.add("", lc.user_error_case, world, processes)
    tally.add("", lc.worker_killed_case, world, lc.MMTRAIN, ["--processes", "2"])
    tally.add("", lc.worker_killed_case, world, [*lc.TORCHRUN, "--max-restarts", "2", "-m", "mmtrain"], [])
    tally.add("", lc.worker_stopped_case, world)
    tally.add("", lc.accelerate_case, world)
    for step in (True, False):
        tally.add("", lc.slurm_case, world, step)


def nodes() -> tuple[str, bool]:
    """Two nodes with a network between them, undisturbed and with a worker killed on the second."""
    why = lc.can_make_nodes()
    if why:
        return f"skipped, {why}", True
    tally = Tally()
    with worlds() as world:
        for kill in (False, True):
            tally.add("", lc.nodes_case, world, kill)
    line, good = tally.line({})
    return f"bits of one process on one node: {line}", good
