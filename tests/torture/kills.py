"""Processes killed at random instants, the launcher's and its workers' too, and two launches at once."""

from __future__ import annotations

import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from torture import runs

LEAVE = 12.0
"""Seconds in which the others must find out that one of them is gone."""
SMALL_TUNE = {"vision": runs.LORA, "language": {**runs.LORA, "dropout": 0.1}}


@dataclass(slots=True)
class Tally:
    signals: int = 0
    live: int = 0
    finished: int = 0
    equal: int = 0
    unresumable: int = 0
    unmet: int = 0
    """Starts in which one died before all had met, so that the others would have waited for it."""
    hung: int = 0
    report: str = ""
    """What the first run that failed said."""


def kills(signals: int = 200, worlds: Sequence[int] = (1, 2, 4)) -> tuple[str, bool]:
    """SIGKILL at random instants to one process or all, their number drawn anew at each start."""
    begun, draw, output = time.monotonic(), random.Random(0), runs.empty("kills") / "run"
    config = runs.write_config(output, SMALL_TUNE, batch_size=4, steps=6, microbatches=4)
    expected, seconds = _uninterrupted(config, output, worlds)
    tally = Tally()
    while tally.signals < signals:
        world = draw.choice(worlds)
        group = runs.start(config, world)
        _kill_one(group, draw.uniform(0, 1.2 * seconds[world]), draw, tally)
        codes = group.wait(LEAVE)
        if all(code == 0 for code in codes):
            tally.finished += 1
            tally.equal += runs.digest(output) == expected
            shutil.rmtree(output)
            continue
        if None in codes and "in _meet" in group.said:  # nobody watches yet: a launcher ends them
            tally.unmet += 1
        elif None in codes:
            tally.hung += 1
            tally.report = tally.report or group.said
        if 137 not in codes and None not in codes:
            tally.unresumable += 1
            tally.report = tally.report or group.said
            shutil.rmtree(output)
    if not tally.finished:  # every signal hit a run
        runs.run(config)
        tally.finished += 1
        tally.equal += runs.digest(output) == expected
    good = tally.equal == tally.finished and not tally.unresumable and not tally.hung
    line = (
        f"{tally.signals} signals, {tally.live} on a live process, {tally.finished} finished runs, "
        f"{tally.equal} equal bit for bit, {tally.unresumable} unresumable, {tally.hung} hung, "
        f"{tally.unmet} ended as a launcher does since one was gone before all had met, "
        f"{time.monotonic() - begun:.0f} s"
    )
    return line + (f"\n{tally.report}" if tally.report else ""), good


def _uninterrupted(config: Path, output: Path, worlds: Sequence[int]) -> tuple[str, dict[int, float]]:
    """What a run that nobody disturbs leaves, and how long it takes in each number of processes."""
    seconds, digests = {}, set()
    for world in worlds:
        begun = time.monotonic()
        runs.run(config, world)
        seconds[world] = time.monotonic() - begun
        digests.add(runs.digest(output))
        shutil.rmtree(output)
    if len(digests) != 1:
        raise RuntimeError(f"without any signal {worlds} processes gave {len(digests)} different adapters")
    return digests.pop(), seconds


def _kill_one(group: runs.Group, after: float, draw: random.Random, tally: Tally) -> None:
    """Kill one process of the group, or all, so many seconds from now, if it still lives then."""
    end = time.monotonic() + after
    while time.monotonic() < end and group.living():
        time.sleep(0.002)
    living = group.living()
    tally.signals += 1
    tally.live += bool(living)
    if living:
        group.kill(living if draw.random() < 0.5 else [draw.choice(living)])


def agent(times: int = 2, steps: Sequence[int] = (3, 7, 11), launcher: bool = True) -> tuple[str, bool]:
    """Workers killed under `mmtrain train --processes 2`, which starts them again; then the launcher itself."""
    begun, draw, folder = time.monotonic(), random.Random(1), runs.empty("agent")
    tune, train = SMALL_TUNE, {"batch_size": 4, "steps": 16, "microbatches": 4}
    config = runs.write_config(folder / "whole", tune, **train)
    runs.run(config)
    expected = runs.digest(folder / "whole")
    killed = restarts = equal = 0
    for number in range(times):
        output = folder / f"killed-{number}"
        process = _launch(runs.write_config(output, tune, **train), "--processes", "2")
        for step in steps:
            worker = _worker_after(process, output, step, draw)
            if worker is not None:
                worker.kill()
                killed += 1
        said = process.communicate(timeout=runs.LONG)[1]
        restarts += said.count("starting again")
        equal += process.returncode == 0 and runs.digest(output) == expected
    orphans, resumed = _kill_the_launcher(folder / "launcher", draw, train) if launcher else (0, expected)
    line = f"{killed} workers killed in {times} runs, {restarts} restarts, {equal} equal bit for bit; "
    if launcher:
        again = "equal" if resumed == expected else resumed
        line += f"launcher killed: {orphans} orphans after 5 s, {again} when run again; "
    line += f"{time.monotonic() - begun:.0f} s"
    return line, equal == times and restarts == killed > 0 and not orphans and resumed == expected


def _launch(config: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mmtrain", "train", str(config), *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def _worker_after(
    process: subprocess.Popen[str], output: Path, step: int, draw: random.Random
) -> psutil.Process | None:
    """One of the launcher's workers, as soon as `step` is saved; None where the launcher ended before."""
    end = time.monotonic() + runs.LONG
    while process.poll() is None and time.monotonic() < end:
        workers = _workers(process.pid)
        saved = max(runs.sound_steps(output)[0], default=0)
        if saved >= step and len(workers) == 2:
            return draw.choice(workers)
        time.sleep(0.02)
    return None


def _workers(launcher: int) -> list[psutil.Process]:
    """The launcher's children that train; it may have others, and they may be ending."""
    found = []
    for child in psutil.Process(launcher).children():
        with suppress(psutil.Error):
            found += [child] if "train" in child.cmdline() else []
    return found


def _kill_the_launcher(output: Path, draw: random.Random, train: dict[str, int]) -> tuple[int, str]:
    """How many workers are left 5 s after their launcher's death, and what the same command then makes."""
    config = runs.write_config(output, SMALL_TUNE, **train)
    process = _launch(config, "--processes", "2")
    if _worker_after(process, output, 3, draw) is None:
        return 0, f"the run ended early: {process.communicate()[1]}"
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    _, left = psutil.wait_procs(workers, timeout=5)
    for worker in left:
        worker.kill()
    runs.run_command(config, "--processes", "2")
    return len(left), runs.digest(output)


def launches(pairs: int = 50) -> tuple[str, bool]:
    """Two starts at once in one directory. The winner is killed, which must leave no lock, or now and then finishes."""
    begun, output = time.monotonic(), runs.empty("launches") / "run"
    config = runs.write_config(output, steps=4, microbatches=4)
    seconds: list[float] = []
    single = named = finished = 0
    let_finish = range(0, pairs, 10)
    for number in range(pairs):
        both = [runs.start(config, words=["--fresh"]) for _ in range(2)]
        started = time.monotonic()
        while all(group.living() for group in both):
            time.sleep(0.001)
        seconds.append(time.monotonic() - started)
        losers = [group for group in both if not group.living()]
        winner = both[0] if losers[0] is both[1] else both[1]
        said = losers[0].said
        single += len(losers) == 1 and losers[0].wait() == [2]
        named += re.search(rf"\(process {winner.pids[0]} on \S+\)", said) is not None and said.count("\n") == 1
        if number not in let_finish:
            winner.kill(winner.pids)
        finished += winner.wait() == [0]
    line = (
        f"{pairs} pairs, {single} with one winner and one exit 2, {named} naming the winner's pid and host in a line; "
        f"the loser ends after {statistics.median(seconds):.2f} s (median), {max(seconds):.2f} s (longest); "
        f"{finished} of {len(let_finish)} winners left alone finished, {time.monotonic() - begun:.0f} s"
    )
    return line, single == named == pairs and finished == len(let_finish)
