"""Signals and faults in every phase of a run. A case gives what was wrong, one line each: nothing where it is well."""

import json
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmtrain.train.checkpoint import CheckpointFolder, read_state
from support.builders import make_text, mixed_rows, write_jsonl
from support.forked import Group, Patch, Server, patch, release, until

CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 138, signal.SIGINT: 130, signal.SIGHUP: 129}
NLL = "mmtrain.scoring.loaded_model.supervised_nll"
"""Called once for each micro-batch, in the phase `forward`."""


@dataclass(frozen=True)
class Phase:
    """Where a process is stopped: in `target` in step `step`. A signal there leaves the checkpoint of step `saved`."""

    target: str
    words: str
    """What the process is said to be doing."""
    saved: int
    step: int | None = None
    holder: str = "self"
    """self: the process that is meant; other: its peer, for which it waits; first: process 0."""
    waiting: str = ""
    """What process 1 is said to be doing meanwhile where the first is stopped."""


PHASES = {
    "checking": Phase("mmtrain.train.dataset.check_samples", "checking the data", 0),
    "loading": Phase("mmtrain.train.trainable.load_base", "loading the model", 0),
    "data": Phase("mmtrain.dataset.ahead.Future.result", "step 3, data", 3, step=3),
    "forward": Phase(NLL, "step 3, forward", 3, step=3),
    "gradients": Phase(NLL, "step 3, gradients", 3, step=3, holder="other"),
    "evaluating": Phase("mmtrain.scoring.scorer.Scorer._answers", "step 2, evaluating", 2, step=2),
    "saving": Phase(
        "mmtrain.train.checkpoint.save_file", "step 2, saving", 2, 2, "first", waiting="step 2, awaiting the save"
    ),
    "exporting": Phase("mmtrain.train.chat.export", "step 4, exporting", 4, holder="first", waiting="step 4, waiting"),
}


class World:
    """A model without images, data, a config of four steps in a folder, and what an uninterrupted run leaves."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder, self.server, self._number = folder, server, 0
        model, data = make_text(folder / "model"), folder / "data" / "mixed.jsonl"
        write_jsonl(data, mixed_rows(data.parent, with_images=False))
        config: dict[str, Any] = {
            "model": {"path": str(model), "dtype": "float32"},
            "tune": {"language": {"mode": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.1}},
            "data": {"train": [{"path": str(data)}], "eval": [{"path": str(data), "name": "same"}]},
        }
        config["train"] = {"steps": 4, "batch_size": 4, "learning_rate": 1e-2}
        every = {"checkpoint_every": 2, "eval_every": 2, "hang_timeout": 60.0}
        config["run"] = {"output_dir": str(folder / "run"), "microbatches": 2, "microbatch_tokens": 200, **every}
        self.config = self.write(config, "config.yaml")
        self.data = config
        self._reference: dict[tuple[str, ...], Path] = {}

    def write(self, config: dict[str, Any], name: str) -> Path:
        path = self.folder / name
        path.write_text(yaml.safe_dump(config))
        return path

    def new_folder(self) -> Path:
        self._number += 1
        return self.folder / f"case-{self._number}"

    def words(self, folder: Path, *more: str, config: Path | None = None) -> list[str]:
        return ["train", str(config or self.config), f"run.output_dir={folder / 'run'}", *more]

    def start(self, folder: Path, processes: int, patches: dict[int, list[Patch]], *more: str) -> Group:
        return self.server.start(folder, self.words(folder, *more), processes, patches)

    def reference(self, *more: str) -> Path:
        """The folder of a run in one process that nothing interrupts."""
        if more not in self._reference:
            folder = self.new_folder()
            group = self.start(folder, 1, {}, *more)
            assert group.wait() == [0], group.text
            self._reference[more] = folder / "run"
        return self._reference[more]

    def check_going_on(self, folder: Path, *more: str, processes: int = 1) -> list[str]:
        """The same command again, undisturbed: the run ends with the adapter and the losses of the reference."""
        group = self.server.start(folder / "again", self.words(folder, *more), processes)
        if group.wait() != [0] * processes:
            group.end()
            return [f"the resumed run ended otherwise than with 0: {group.text[-600:]}"]
        faults = self.check_same(folder, *more)
        shutil.rmtree(folder)
        return faults

    def check_same(self, folder: Path, *more: str) -> list[str]:
        found, expected = folder / "run", self.reference(*more)
        name = "adapter/adapter_model.safetensors"
        faults = []
        if (found / name).read_bytes() != (expected / name).read_bytes():
            faults.append("another adapter than that of a run without the fault")
        if losses(found) != losses(expected):
            faults.append("other losses than those of a run without the fault")
        return faults


def losses(run: Path) -> list[Any]:
    """What each step's row says next to its time; of evaluations that they are there, once, in their place."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["eval"]) if "eval" in row else row | {"seconds": 0, "mfu": 0} for row in rows]


def saved_step(folder: Path) -> int:
    """The step of the newest checkpoint, all of them being sound; 0 without any."""
    checkpoint, broken = CheckpointFolder(folder / "run" / "checkpoints", 2).newest()
    assert not broken, broken
    return 0 if checkpoint is None else int(read_state(checkpoint)["step"])


def hold(folder: Path, phase: Phase, rank: int, processes: int) -> tuple[dict[int, list[Patch]], list[Path]]:
    """Patches that hold process `rank` in the phase, and the flags to wait for."""
    holder = {"self": rank, "other": 1 - rank, "first": 0}[phase.holder]
    flags = [folder / f"stopped-{holder}"]
    patches = {holder: [patch(phase.target, "hold", flags[0], phase.step)]}
    if phase.holder == "other":  # the one that is meant is to be inside the collective
        flags.append(folder / f"reached-{rank}")
        patches[rank] = [patch("mmtrain.runtime.processes.Runtime.gather", "mark", flags[1], phase.step)]
    return patches, flags


def once(group: Group, words: str) -> list[str]:
    """The line with `words` is printed once, whoever prints it, and nobody prints a traceback."""
    count = sum(words in line for line in group.text.splitlines())
    faults = [] if count == 1 else [f"{count} lines with {words!r}: {group.text[-1500:]}"]
    return faults + ([f"a traceback: {group.text[-3000:]}"] if "Traceback" in group.text else [])


def signal_case(
    world: World, phase_name: str, signum: signal.Signals, rank: int, processes: int = 2
) -> tuple[list[str], float]:
    """A signal to one process of a run in one phase; and the seconds until all had left."""
    folder, phase = world.new_folder(), PHASES[phase_name]
    patches, flags = hold(folder, phase, rank, processes)
    group = world.start(folder, processes, patches)
    try:
        for flag in flags:
            until(flag)
        begun = time.monotonic()
        group.send(rank, signum)
        if phase.step is not None:  # what has begun is finished; before the first step it is left at once
            time.sleep(1.0)  # the signal is heard before it continues, also where the machine has other work
            release(flags[0])
        codes = group.wait(60)
        seconds = time.monotonic() - begun
        where = f"{phase_name}, {signum.name} to {rank} of {processes}: "
        faults = [] if codes == [CODES[signum]] * processes else [f"exit codes {codes}: {group.text[-1500:]}"]
        if phase.step is not None:
            faults += once(group, f"{signum.name}: stopped after step {phase.saved}, which is saved")
        else:
            faults += once(group, f"{signum.name}: stopped while {phase.words}") if rank == 0 else []
        if saved_step(folder) != phase.saved:
            faults.append(f"step {saved_step(folder)} is saved, not {phase.saved}")
    finally:
        group.end()
    return [where + fault for fault in faults + world.check_going_on(folder)], seconds


def second_signal_case(world: World, phase_name: str, signum: signal.Signals, rank: int) -> tuple[list[str], float]:
    """The signal twice, more than a second apart, while a process does not move; the seconds after the second one."""
    folder, phase = world.new_folder(), PHASES[phase_name]
    patches, flags = hold(folder, phase, rank, 2)
    group = world.start(folder, 2, patches)
    try:
        for flag in flags:
            until(flag)
        group.send(rank, signum)
        time.sleep(1.3)
        begun = time.monotonic()
        group.send(rank, signum)
        codes = group.wait(60)
        seconds = time.monotonic() - begun
        faults = [] if codes == [CODES[signum]] * 2 else [f"exit codes {codes}: {group.text[-1500:]}"]
    finally:
        group.end()
    faults += once(group, "left at once") if rank == 0 else []
    where = f"{phase_name}, {signum.name} twice to {rank}: "
    return [where + fault for fault in faults + world.check_going_on(folder)], seconds


def kill_case(world: World, phase_name: str, rank: int, going_on: bool = True) -> tuple[list[str], float]:
    """SIGKILL to one of two; the seconds until the other has left."""
    folder, phase = world.new_folder(), PHASES[phase_name]
    patches, flags = hold(folder, phase, rank, 2)
    group = world.start(folder, 2, patches)
    try:
        for flag in flags:
            until(flag)
        time.sleep(1.5)  # the others have heard where it is
        begun = time.monotonic()
        group.send(rank, signal.SIGKILL)
        if phase.holder != "first" or rank == 1:
            release(flags[0])
        codes = group.wait(60)
        seconds = time.monotonic() - begun
        words = phase.waiting if rank == 1 and phase.waiting else phase.words
        expected: list[int | None] = [7, 7]
        expected[rank] = -signal.SIGKILL
        faults = [] if codes == expected else [f"exit codes {codes}: {group.text[-1500:]}"]
        faults += once(group, f"process {rank} (pid {group.pids[rank]} on ") + once(group, f"is dead: {words}")
    finally:
        group.end()
    faults += world.check_going_on(folder) if going_on else []
    return [f"{phase_name}, {rank} killed: {fault}" for fault in faults], seconds


def stop_case(world: World, processes: int, rank: int, delay: float, timeout: float = 3.0) -> tuple[list[str], float]:
    """SIGSTOP to one process somewhere in its steps; the seconds until the others have left."""
    folder = world.new_folder()
    more = (f"run.hang_timeout={timeout}", "train.steps=5000", "run.microbatches=4", "run.checkpoint_every=5")
    flag = folder / "begun"
    group = world.start(folder, processes, {rank: [patch(NLL, "mark", flag, 2)]}, *more)
    others = [number for number in range(processes) if number != rank]
    try:
        until(flag)
        time.sleep(delay)
        group.send(rank, signal.SIGSTOP)
        begun = time.monotonic()
        codes = group.wait(timeout + 40, others)
        seconds = time.monotonic() - begun
        faults = [] if codes == [5] * len(others) else [f"exit codes {codes}: {group.text[-1500:]}"]
        faults += once(group, "where each process stood is in")
        message = next((line for line in group.text.splitlines() if "has not been heard of" in line), "")
        if f"process {rank} (pid {group.pids[rank]} on" not in message or ": step " not in message:
            faults.append(f"not named with its step and phase: {message!r}")
        stacks = sorted(path.name for path in (folder / "run" / "stacks").glob("*"))
        if stacks != [f"process-{number}.txt" for number in others]:
            faults.append(f"stacks: {stacks}")
        group.send(rank, signal.SIGCONT)
        if None in group.wait(30):
            faults.append("woken up, the stopped one continues")
        saved_step(folder)
    finally:
        group.end()
    return [f"{rank} of {processes} stopped after {delay:.2f} s: {fault}" for fault in faults], seconds


def stop_then_signal_case(world: World, rank: int, grace: float) -> tuple[list[str], float]:
    """A8: SIGTERM to one while the other is stopped; `grace`: peers.STOP_SECONDS, or less with a low timeout."""
    folder, phase = world.new_folder(), PHASES["gradients"]
    patches, flags = hold(folder, phase, rank, 2)
    more = () if grace == 20 else (f"run.hang_timeout={grace}",)
    group = world.start(folder, 2, patches, *more)
    other = 1 - rank
    try:
        for flag in flags:
            until(flag)
        group.send(other, signal.SIGSTOP)
        begun = time.monotonic()
        group.send(rank, signal.SIGTERM)
        codes = group.wait(grace + 30, [rank])
        seconds = time.monotonic() - begun
        faults = [] if codes == [143] else [f"exit codes {codes}: {group.text[-1500:]}"]
        if f"process {other} (pid {group.pids[other]} on" not in group.text:
            faults.append(f"the stopped one is not named: {group.text[-1500:]}")
        if saved_step(folder) != 2:
            faults.append(f"step {saved_step(folder)} is saved, not 2")
    finally:
        group.end()
    return [
        f"SIGTERM to {rank}, the other stopped: {fault}" for fault in faults + world.check_going_on(folder)
    ], seconds
