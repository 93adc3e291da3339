"""Runs of a small random model, in processes that are forked: importing torch takes seconds.

Who forks must have no threads, so nothing is computed with torch in the parent.
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import hashlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl
import transformers.models.qwen2_5_vl.processing_qwen2_5_vl  # noqa: F401
from safetensors.numpy import load_file

import mmtrain.train.run  # noqa: F401
from mmtrain import cli
from support import builders
from torture import WORK

gc.freeze()  # a garbage collection in a child would copy the memory that it shares with this process
LORA = {"mode": "lora", "rank": 4, "alpha": 8.0}
TUNE = {"vision": LORA, "projector": {"mode": "full"}, "language": {**LORA, "dropout": 0.1}}
ADAPTER = "adapter/adapter_model.safetensors"
LONG = 120.0
"""Seconds after which a run counts as hung."""


def empty(name: str) -> Path:
    """A folder for a part, without what an earlier call left in it."""
    shutil.rmtree(WORK / name, ignore_errors=True)
    (WORK / name).mkdir(parents=True)
    return WORK / name


def model() -> Path:
    """The base model, made once, by a child: making it computes."""
    path = WORK / "model"
    if not path.exists():
        assert Group([fork(lambda: builders.make_qwen(path), WORK / "model.log")]).wait() == [0]
    return path


def data() -> Path:
    """Eight samples: text alone, one image, two, several turns."""
    path = WORK / "data" / "mixed.jsonl"
    if not path.exists():
        builders.write_jsonl(path, builders.mixed_rows(path.parent, with_images=True))
    return path


def write_config(output: Path, tune: dict[str, Any] | None = None, **more: Any) -> Path:
    """A config that trains into `output`, written next to it; a checkpoint after each step, or as given."""
    settings = {"steps": 8, "batch_size": 6, "learning_rate": 1e-2, "checkpoint_every": 1}
    config = {
        "model": {"path": str(model()), "dtype": "float32"},
        "tune": tune or TUNE,
        "data": {"train": [{"path": str(data())}]},
        **builders.train_and_run(output_dir=str(output), **settings | more),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_name(f"{output.name}.yaml")
    path.write_text(json.dumps(config))  # JSON is YAML too
    return path


@dataclass
class Group:
    """The processes of one run, each a child of this one."""

    pids: list[int]
    log: Path = Path(os.devnull)
    codes: dict[int, int] = field(default_factory=dict)

    def living(self) -> list[int]:
        for pid in self.pids:
            if pid not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    code = os.waitstatus_to_exitcode(status)
                    self.codes[pid] = code if code >= 0 else 128 - code
        return [pid for pid in self.pids if pid not in self.codes]

    def wait(self, seconds: float = LONG) -> list[int | None]:
        """Exit codes as a shell gives them; None for what had not ended after `seconds` and was killed then."""
        end = time.monotonic() + seconds
        while self.living() and time.monotonic() < end:
            time.sleep(0.005)
        hung = self.kill(self.living(), signal.SIGABRT)  # where each stood is written to the log
        end = time.monotonic() + 2
        while self.living() and time.monotonic() < end:
            time.sleep(0.005)
        self.kill(self.living())
        while self.living():
            time.sleep(0.005)
        return [None if pid in hung else self.codes[pid] for pid in self.pids]

    def kill(self, pids: Sequence[int], signum: int = signal.SIGKILL) -> list[int]:
        for pid in pids:
            os.kill(pid, signum)
        return list(pids)

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


def fork(work: Callable[[], object], log: Path) -> int:
    """Do `work` in a child that writes to `log`; gives its process id."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        faulthandler.enable()
        torch.set_num_threads(1)
        work()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(
    config: Path, processes: int = 1, words: Sequence[str] = (), prepare: Callable[[], object] = lambda: None
) -> Group:
    """`mmtrain train CONFIG WORDS…` in so many forked processes, each having called `prepare` first."""
    log = Path(tempfile.mkstemp(dir=config.parent, prefix="log-", suffix=".txt")[1])
    port = free_port()

    def work(rank: int) -> None:
        if processes > 1:
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ.update({key: str(value) for key, value in ranks.items()})
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        sys.argv = ["mmtrain", "train", str(config), *words]
        prepare()
        cli.main()

    return Group([fork(functools.partial(work, rank), log) for rank in range(processes)], log)


def run(config: Path, processes: int = 1, words: Sequence[str] = ()) -> Group:
    """A run that must end well."""
    group = start(config, processes, words)
    codes = group.wait()
    if any(codes):
        raise RuntimeError(f"{config}, {processes} processes: exit codes {codes}\n{group.said}")
    return group


def run_command(config: Path, *words: str) -> None:
    """The same through the command line and torch's agent, in processes that are not forked."""
    command = [sys.executable, "-m", "mmtrain", "train", str(config), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")


def die_after(step: int) -> Callable[[], None]:
    """For `prepare`: the process that saves is killed as soon as it has saved `step`."""

    def prepare() -> None:
        from mmtrain.train.checkpoint import CheckpointFolder

        save = CheckpointFolder.save

        def save_and_die(self: CheckpointFolder, number: int, *rest: Any) -> Path:
            saved = save(self, number, *rest)
            if number == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return saved

        CheckpointFolder.save = save_and_die  # type: ignore[method-assign, assignment]

    return prepare


def stop_after(config: Path, step: int, processes: int = 1) -> None:
    """A run that dies after the checkpoint of `step`, in all its processes."""
    group = start(config, processes, prepare=die_after(step))
    while len(group.living()) == processes:
        time.sleep(0.005)
    group.kill(group.living())
    group.wait()
    if 137 not in group.codes.values():
        raise RuntimeError(f"{config}: it did not come to step {step}\n{group.said}")


def digest(output: Path) -> str:
    """SHA-256 of the adapter that a run left, or why there is none."""
    path = output / ADAPTER
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no adapter"


def distance(found: Path, expected: Path) -> float:
    """Between two runs' adapters: norm of the difference over norm of the expected."""
    one, other = load_file(found / ADAPTER), load_file(expected / ADAPTER)
    if one.keys() != other.keys():
        return float("inf")
    squares = sum(float(((one[name].astype("f8") - other[name]) ** 2).sum()) for name in other)
    return math.sqrt(squares / sum(float((value.astype("f8") ** 2).sum()) for value in other.values()))


def losses(output: Path) -> list[float]:
    """Of every step, in order; those of a step that is missing or there twice make it too short or too long."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def sound_steps(output: Path) -> tuple[list[int], list[str]]:
    """The steps whose checkpoints are what their manifests say, and the names of those that are not."""
    sound, broken = [], []
    for path in sorted((output / "checkpoints").glob("step-*")):
        try:
            sums = json.loads((path / "manifest.json").read_bytes())["sha256"]
            files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}
            whole = files.pop("manifest.json") != "" and files == sums and len(files) == 3
        except (OSError, ValueError, KeyError):
            whole = False
        if whole:
            sound.append(int(path.name.removeprefix("step-")))
        else:
            broken.append(path.name)
    return sorted(sound), broken


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
