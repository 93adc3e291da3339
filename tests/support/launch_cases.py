"""Runs of several real processes by the launchers that people have: ours, torchrun, accelerate, srun, two nodes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from support.fault_cases import World, saved_step
from support.forked import free_port

LONG = ("train.steps=60", "run.checkpoint_every=5", "run.eval_every=50")
MMTRAIN = [sys.executable, "-m", "mmtrain"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]


class Started:
    """A command that runs, its output in a file."""

    def __init__(self, folder: Path, command: list[str], environment: dict[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("out-*")))
        self._log = folder / f"out-{number}.txt"
        env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "WORLD_SIZE"))}
        env |= {"OMP_NUM_THREADS": "1", "HOME": str(folder.parent), "COLUMNS": "120", **(environment or {})}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )

    @property
    def text(self) -> str:
        return self._log.read_text()

    def workers(self) -> list[psutil.Process]:
        """The processes that train: those below the one that was started, without the one that launches."""
        try:
            below = psutil.Process(self.process.pid).children(recursive=True)
            return [one for one in below if "train" in one.cmdline() and "launch" not in one.cmdline()]
        except psutil.Error:
            return []

    def wait(self, seconds: float = 120.0) -> int | None:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> None:
        for worker in self.workers():
            if worker.is_running():
                worker.kill()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)


@contextmanager
def started(folder: Path, command: list[str], environment: dict[str, str] | None = None) -> Iterator[Started]:
    one = Started(folder, command, environment)
    try:
        yield one
    finally:
        one.end()


def rows(folder: Path) -> int:
    path = folder / "run" / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def until(what: Callable[[], bool], seconds: float = 90.0) -> bool:
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.02)
    return what()


def reported_once(text: str, words: str) -> list[str]:
    count = text.count(words)
    return [] if count == 1 else [f"{words!r} is reported {count} times: {text[-1500:]}"]


def launched_signal_case(world: World, signum: signal.Signals, code: int) -> list[str]:
    """A signal to our launcher: passed on, saved, no restart."""
    folder = world.new_folder()
    with started(folder, [*MMTRAIN, *world.words(folder, *LONG), "--processes", "2"]) as run:
        if not until(lambda: rows(folder) > 8):
            return [f"it did not begin: {run.text[-1500:]}"]
        run.process.send_signal(signum)
        found = run.wait(90)
        faults = [] if found == code else [f"exit code {found}: {run.text[-1500:]}"]
        faults += reported_once(run.text, "stopped after step") + reported_once(run.text, "steps, 2 an epoch")
        if "Traceback" in run.text:
            faults.append(f"a traceback: {run.text[-3000:]}")
        if not 0 < saved_step(folder) < 60:
            faults.append(f"step {saved_step(folder)} is saved")
    return [f"{signum.name} to the launcher: {fault}" for fault in faults + world.check_going_on(folder, *LONG)]


def launcher_killed_case(world: World) -> tuple[list[str], float]:
    """SIGKILL to our launcher; the seconds until its workers are gone."""
    folder = world.new_folder()
    with started(folder, [*MMTRAIN, *world.words(folder, *LONG), "--processes", "2"]) as run:
        until(lambda: rows(folder) > 8)
        workers = run.workers()
        begun = time.monotonic()
        run.process.kill()
        run.wait()
        gone = until(lambda: not any(one.is_running() and one.status() != "zombie" for one in workers), 5)
        seconds = time.monotonic() - begun
    faults = [] if len(workers) == 2 else [f"{len(workers)} workers were found"]
    faults += [] if gone else ["workers are left after 5 s"]
    # continuing takes the lock
    return [f"launcher killed: {fault}" for fault in faults + world.check_going_on(folder, *LONG)], seconds


def user_error_case(world: World, processes: int) -> list[str]:
    """An image that is not there: said once, exit 2, no restart."""
    folder = world.new_folder()
    folder.mkdir()
    data = folder / "bad.jsonl"
    image = {"role": "user", "content": "<image>What?"}
    record = {"messages": [image, {"role": "assistant", "content": "Nothing."}], "images": ["none.png"]}
    data.write_text(json.dumps(record) + "\n")
    config = world.write({**world.data, "data": {"train": [{"path": str(data)}]}}, f"{folder.name}.yaml")
    command = [*MMTRAIN, *world.words(folder, config=config), "--processes", str(processes)]
    with started(folder, command) as run:
        code = run.wait()
        faults = [] if code == 2 else [f"exit code {code}: {run.text[-1500:]}"]
        faults += reported_once(run.text, "bad.jsonl:1")
        if "starting again" in run.text or "Traceback" in run.text:
            faults.append(f"more is reported: {run.text[-1500:]}")
    return [f"a missing image, {processes} processes: {fault}" for fault in faults]


def worker_killed_case(world: World, launcher: list[str], options: list[str]) -> list[str]:
    """SIGKILL to one worker of a launcher that restarts: the run ends as if nothing had been."""
    folder = world.new_folder()
    with started(folder, [*launcher, *world.words(folder, *LONG), *options]) as run:
        until(lambda: rows(folder) > 8)
        workers = run.workers()
        if len(workers) != 2:
            return [f"{len(workers)} workers were found: {run.text[-1500:]}"]
        workers[-1].kill()
        code = run.wait(150)
        faults = [] if code == 0 else [f"exit code {code}: {run.text[-2500:]}"]
        faults += reported_once(run.text, "continuing from")
        faults += world.check_same(folder, *LONG) if not faults else []
    return [f"a worker of {' '.join(launcher[1:3])} killed: {fault}" for fault in faults]


def worker_stopped_case(world: World) -> list[str]:
    """SIGSTOP to one worker: the launcher gets rid of it, starts again, and the run ends as if nothing had been."""
    folder = world.new_folder()
    with started(folder, [*MMTRAIN, *world.words(folder, *LONG, "run.hang_timeout=5"), "--processes", "2"]) as run:
        until(lambda: rows(folder) > 8)
        workers = run.workers()
        if len(workers) != 2:
            return [f"{len(workers)} workers were found: {run.text[-1500:]}"]
        workers[-1].send_signal(signal.SIGSTOP)
        code = run.wait(120)
        faults = [] if code == 0 else [f"exit code {code}: {run.text[-2500:]}"]
        faults += reported_once(run.text, "has not been heard of") + reported_once(run.text, "continuing from")
        faults += world.check_same(folder, *LONG) if not faults else []
    return [f"a worker of our launcher stopped: {fault}" for fault in faults]


def accelerate_case(world: World) -> list[str]:
    folder = world.new_folder()
    program = [str(Path(sys.executable).with_name("accelerate")), *ACCELERATE, "-m", "mmtrain"]
    with started(folder, [*program, *world.words(folder)]) as run:
        code = run.wait()
        faults = [] if code == 0 else [f"exit code {code}: {run.text[-1500:]}"]
        faults += reported_once(run.text, "replicated on 2 processes")
        faults += world.check_same(folder) if not faults else []
    return [f"accelerate launch: {fault}" for fault in faults]


def slurm_case(world: World, step: bool) -> list[str]:
    """Two tasks of srun take part in one run; a batch script's variables, without the step's, make one process."""
    folder = world.new_folder()
    folder.mkdir()
    job = {"SLURM_JOB_ID": str(free_port() - 20_000), "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "2"}
    job |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    tasks = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2"}
    ranks = ("0", "1") if step else ("0",)
    environments = [job | (tasks | {"SLURM_PROCID": r, "SLURM_LOCALID": r} if step else {}) for r in ranks]
    runs = [Started(folder, [*MMTRAIN, *world.words(folder)], environment) for environment in environments]
    try:
        codes = [run.wait() for run in runs]
        text = "".join(run.text for run in runs)
        faults = [] if codes == [0] * len(runs) else [f"exit codes {codes}: {text[-1500:]}"]
        faults += reported_once(text, f"replicated on {len(runs)} process")
        faults += world.check_same(folder) if not faults else []
    finally:
        for run in runs:
            run.end()
    return [f"SLURM, {'a step' if step else 'a batch script'}: {fault}" for fault in faults]


# --- two nodes


@contextmanager
def two_nodes() -> Iterator[tuple[list[str], list[str], str]]:
    """The words that run a command on each of two machines with their own network, and the first one's address."""
    mark = f"{os.getpid() % 100_000}"
    names, address = [f"mmt{mark}a", f"mmt{mark}b"], "10.231.7"
    commands = [["netns", "add", name] for name in names]
    commands.append(["link", "add", f"v{mark}a", "netns", names[0], "type", "veth", "peer", f"v{mark}b"])
    commands.append(["link", "set", f"v{mark}b", "netns", names[1]])
    for number, (name, end) in enumerate(zip(names, "ab", strict=True), start=1):
        for words in (["addr", "add", f"{address}.{number}/24", "dev", f"v{mark}{end}"], ["link", "set", "lo", "up"]):
            commands.append(["-n", name, *words])
        commands.append(["-n", name, "link", "set", f"v{mark}{end}", "up"])
    try:
        for command in commands:
            subprocess.run(["ip", *command], check=True, capture_output=True)
        yield (*([["ip", "netns", "exec", name] for name in names]), f"{address}.1")  # type: ignore[misc]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def can_make_nodes() -> str:
    """Why two network namespaces cannot be made here; nothing if they can."""
    try:
        with two_nodes():
            return ""
    except FileNotFoundError:
        return "there is no `ip`"
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not allowed ({error.stderr.decode().strip()})"


def nodes_case(world: World, kill: bool) -> list[str]:
    """A run on two nodes, with a worker killed on the second: the bits of one process on one node."""
    folder = world.new_folder()
    with two_nodes() as (first, second, address):
        port = free_port()
        runs = []
        for rank, inside in enumerate((first, second)):
            options = ["--nodes", "2", "--node-rank", str(rank), "--rendezvous", f"{address}:{port}"]
            command = [*inside, *MMTRAIN, *world.words(folder, *LONG), *options, "--processes", "1"]
            runs.append(Started(folder / f"node-{rank}", command))
        try:
            if kill:
                until(lambda: rows(folder) > 8)
                for worker in runs[1].workers()[-1:]:
                    worker.kill()
            codes = [run.wait(150) for run in runs]
            text = "".join(run.text for run in runs)
            faults = [] if codes == [0, 0] else [f"exit codes {codes}: {text[-2500:]}"]
            if kill:
                faults += reported_once(text, "continuing from")
            faults += [] if "replicated on 2 processes" in text else [f"they did not meet: {text[-1500:]}"]
            faults += world.check_same(folder, *LONG) if not faults else []
        finally:
            for run in runs:
                run.end()
    return [f"two nodes{', a worker killed' if kill else ''}: {fault}" for fault in faults]
