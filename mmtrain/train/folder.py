"""The directory of a run: one run at a time may write to it. Imports no torch, so that the lock is taken at once."""

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from mmtrain.atomic_files import write_text
from mmtrain.config import Config
from mmtrain.errors import UserError, storage_faults
from mmtrain.file_locks import try_lock
from mmtrain.records.sources.place import Place
from mmtrain.runtime.launch import is_restart, may_write
from mmtrain.safe_text import visible
from mmtrain.train.metrics import METRICS

BEST = "best"
"""The folder of what is exported of the best checkpoint."""
FACTS = "facts.json"
_LOCK = ".lock"
_FINISHED = "finished.json"
_DROPPED = "dropped.jsonl"
_CONFIG = "config.yaml"
_FOLDERS = ("checkpoints", "adapter", "model", BEST, "answers", "trackers", "stacks")
_FILES = (METRICS, _DROPPED, "report.html", FACTS, _FINISHED)
"""What a run writes besides its config, and `start_over` deletes."""


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Take the directory's lock, which is released when the process ends, however it ends.

    Raises UserError naming the process that has it, or why the directory cannot be made, and StorageError.
    """
    name = visible(str(output_dir))
    try:
        with storage_faults(f"{name}: the directory of the run cannot be made"):
            output_dir.mkdir(parents=True, exist_ok=True)
            file = (output_dir / _LOCK).open("a+", encoding="utf-8")
    except FileExistsError:
        raise UserError(f"run.output_dir: {name} is not a directory: name another one") from None
    except OSError as error:
        why = f"{error.strerror}; name another one"
        raise UserError(f"run.output_dir: the directory {name} cannot be made: {why}") from None
    with file:
        try:
            is_free = try_lock(file)
        except OSError as error:
            raise UserError(f"{name}: the file system does not lock files ({error.strerror}): use another") from None
        if not is_free:
            raise UserError(
                f"{name}: another run is writing there ({_holder(output_dir / _LOCK)}); "
                "wait for it, stop it, or take another run.output_dir"
            )
        file.truncate(0)
        with suppress(OSError):  # no room for the name: the lock itself needs none
            os.write(file.fileno(), json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        yield


@contextmanager
def reserved(config: Config, fresh: bool = False, node_rank: int = 0) -> Iterator[None]:
    """Inside, the first process has the lock of the run's directory, unless its launcher has it. `fresh`: delete
    what an earlier run left, unless this process has been started again after a fault.

    Raises UserError where files of the user would be overwritten or deleted, and what `locked` and `start_over` raise.
    """
    writes, output_dir = may_write(node_rank), Path(config.run.output_dir)
    if writes:
        _check_not_the_users(output_dir)
        if fresh:
            _check_not_needed(config, output_dir)
    with locked(output_dir) if writes else nullcontext():
        if fresh and writes and not is_restart():
            start_over(output_dir)
        yield


def _check_not_the_users(output_dir: Path) -> None:
    """Raises UserError where no run was in `output_dir`, and it has something that a run would write or delete."""
    if any(os.path.exists(output_dir / name) for name in (_LOCK, METRICS, FACTS)):
        return
    there = [name for name in (_CONFIG, *_FOLDERS, *_FILES) if os.path.exists(output_dir / name)]
    if there:
        name = visible(str(output_dir))
        raise UserError(f"run.output_dir: {name} has {there[0]}, which is not of a run: name a new directory")


def _check_not_needed(config: Config, output_dir: Path) -> None:
    """Raises UserError where the run starts from what `start_over` deletes."""
    for key, path in (("model.path", config.model.path), ("model.adapter", config.model.adapter)):
        if path is not None and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(output_dir)):
            raise UserError(
                f"{key}: {visible(path)} is in run.output_dir, which --fresh deletes: name another run.output_dir"
            )


def is_locked(output_dir: Path) -> bool:
    """Whether a run is writing to the directory. The lock is taken for a moment to find out."""
    try:
        with (output_dir / _LOCK).open("rb") as file:
            return not try_lock(file)
    except OSError:  # no lock, or a file system without locks
        return False


def _holder(path: Path) -> str:
    """Who has the lock; its name is written a moment after the lock is taken."""
    for _ in range(10):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return f"process {int(found['pid'])} on {found['host']}"
        except (ValueError, KeyError, TypeError, OSError):
            time.sleep(0.02)
    return "its name cannot be read"


def start_over(output_dir: Path) -> None:
    """Delete what an earlier run left in `output_dir`, and nothing else."""
    for name in _FOLDERS:
        shutil.rmtree(output_dir / name, ignore_errors=True)
    with storage_faults(f"{visible(str(output_dir))}: an earlier run cannot be deleted"):
        for name in _FILES:
            (output_dir / name).unlink(missing_ok=True)


def is_exported(output_dir: Path) -> bool:
    return (output_dir / "adapter").is_dir() or (output_dir / "model").is_dir()


def finished_step(output_dir: Path) -> int | None:
    """The last step of what was exported; None where the run has not finished."""
    try:
        return int(json.loads((output_dir / _FINISHED).read_bytes())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_finished(output_dir: Path, step: int) -> None:
    """Note that everything of the run up to `step` is exported."""
    path = output_dir / _FINISHED
    with storage_faults(f"{path}: it cannot be written"):
        write_text(path, json.dumps({"step": step}))


def write_inputs(output_dir: Path, config: str, dropped: Sequence[dict[str, Any]], step: int = 0) -> None:
    """Write the merged config, and a row for each dropped sample, next to the results. Rows that `append_dropped` has
    added until `step` stay."""
    with storage_faults(f"{output_dir}: the config cannot be written"):
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / _CONFIG).write_text(config, encoding="utf-8")
        path = output_dir / _DROPPED
        rows = [*dropped, *_appended(path, step)]
        if rows:
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        else:
            path.unlink(missing_ok=True)


def dropped_row(place: Place, reason: str) -> dict[str, Any]:
    """What dropped.jsonl says about a sample."""
    return {"file": str(place.file), "line": place.line, "place": str(place), "reason": reason}


def append_dropped(output_dir: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows of samples that are dropped during the run, each with its `step`."""
    if not rows:
        return
    path = output_dir / _DROPPED
    with storage_faults(f"{path}: it cannot be written"), path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def _appended(path: Path, step: int) -> Iterator[dict[str, Any]]:
    """The rows of steps until `step`. The last one may be half a line: a later step wrote it."""
    if not step or not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            with suppress(ValueError):
                row = json.loads(line)
                if 0 < row.get("step", 0) <= step:
                    yield row
