"""Checkpoints, each written completely or not at all, and the newest one that is intact.

A checkpoint is the trainable weights, the optimizer's moments, the step, the config and the fingerprints: safetensors
and JSON, never pickle. It has no random state because none is needed: whatever is random is seeded by the step and the
sample. It is written to a temporary folder, fsynced, then renamed; `manifest.json` has the SHA-256 of every file.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmtrain.atomic_files import flush, replacing
from mmtrain.dataset.hashes import sha256_of
from mmtrain.errors import NoCheckpointError, StorageError, UserError, storage_faults, system_error
from mmtrain.safe_text import shown

_MANIFEST = "manifest.json"
_FILES = {"trainable.safetensors", "optimizer.safetensors", "state.json"}
_NUM_MOMENTS = 2


def trainable_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The trainable weights and their moments at one step, complete and on the CPU."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]


def snapshot(
    model: Any, optimizer: torch.optim.Optimizer, whole: Callable[[Tensor], Tensor], tick: Callable[[], None]
) -> Snapshot:
    """Where weights are sharded all processes must call this: `whole` gathers them, one tensor at a time."""

    def gathered(value: Tensor) -> Tensor:
        tick()
        return whole(value.detach()).cpu().contiguous()

    parameters = trainable_parameters(model)
    return Snapshot(
        {name: gathered(parameter) for name, parameter in parameters.items()},
        {
            f"{name}|{key}": gathered(value)
            for name, parameter in parameters.items()
            for key, value in optimizer.state.get(parameter, {}).items()
        },
    )


def checkpoint_bytes(model: Any) -> int:
    """The size of a checkpoint on disk: float32 weights, and as much again for each moment."""
    return sum(4 * p.numel() for p in trainable_parameters(model).values()) * (1 + _NUM_MOMENTS)


class CheckpointFolder:
    """The checkpoints of one run: `step-000050` and so on under `folder`."""

    def __init__(self, folder: Path, keep: int, keeps_best: bool = False) -> None:
        """`keep`: how many of the newest are kept; `keeps_best`: the best one besides."""
        self._folder = folder
        self._keep, self._keeps_best = keep, keeps_best

    def check_room(self, size: int) -> None:
        """Raises StorageError where the checkpoints still to come, of `size` bytes each, will not fit."""
        with storage_faults(f"{self._folder}: it cannot be made"):
            self._folder.mkdir(parents=True, exist_ok=True)
        self.sweep()
        used = sum(file.stat().st_size for path in self._all() for file in path.rglob("*"))
        num_kept = self._keep + self._keeps_best
        needed = (num_kept + 1) * size - used
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise StorageError(
                f"{self._folder}: {num_kept} checkpoints and one in the making need {needed / 1e6:,.1f} MB more, "
                f"{free / 1e6:,.1f} MB are free: make room or take another run.output_dir"
            )

    def save(self, step: int, content: Snapshot, state: dict[str, Any], best: int | None = None) -> Path:
        """Write a checkpoint after `step`, read it back, then delete all but the newest `keep` and that of step `best`.

        Raises StorageError, with the checkpoints before untouched, where it cannot be written.
        """
        target = self._folder / f"step-{step:06d}"
        size = sum(value.nbytes for tensors in (content.weights, content.moments) for value in tensors.values())
        with storage_faults(lambda: self._needs(target, size)):
            self._folder.mkdir(parents=True, exist_ok=True)
            flush(self._folder.parent)
            self.sweep()
            with replacing(target) as made:
                made.mkdir()
                _write_tensors(content.weights, made / "trainable.safetensors")
                _write_tensors(content.moments, made / "optimizer.safetensors")
                (made / "state.json").write_text(json.dumps(state, indent=2))
                sums = {path.name: sha256_of(path) for path in sorted(made.iterdir())}
                (made / _MANIFEST).write_text(json.dumps({"step": step, "sha256": sums}, indent=2))
        fault = _fault(target)
        if fault is not None:
            raise StorageError(f"{target}: read back, {fault}: the disk did not keep what was written")
        with storage_faults(f"{self._folder}: {target.name} is saved, an older one cannot be deleted"):
            self._prune(step, best)
        return target

    def _prune(self, step: int, best: int | None) -> None:
        """Delete all but the newest `keep` up to `step` and the best, and those after `step`: they are damaged, and the
        run was resumed from an earlier one."""
        own = [path for path in self._all() if _step_of(path) <= step]
        old = [path for path in own[self._keep :] if _step_of(path) != best]
        for path in [*(path for path in self._all() if _step_of(path) > step), *old]:
            self._remove(path)

    def _needs(self, target: Path, size: int) -> str:
        there = next(path for path in (self._folder, *self._folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        return f"{target}: the checkpoint needs {size / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free"

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest intact checkpoint, and a line for each newer one that is damaged, saying what is wrong with it.

        Raises NoCheckpointError where there are checkpoints and none is intact.
        """
        broken: list[str] = []
        for path in self._all():
            fault = _fault(path)
            if fault is None:
                return path, [f"{line}; {path.name} is used" for line in broken]
            broken.append(f"{path}: {fault}")
        if broken:
            raise NoCheckpointError([*broken, f"{self._folder}: no checkpoint is intact; --fresh starts the run over"])
        return None, []

    def steps(self) -> tuple[int, ...]:
        """The steps that have a checkpoint, intact or not."""
        return tuple(_step_of(path) for path in self._all())

    def at(self, step: int) -> Path:
        """The checkpoint after `step`. Raises NoCheckpointError where it is not intact."""
        path = self._folder / f"step-{step:06d}"
        fault = _fault(path)
        if fault is not None:
            raise NoCheckpointError(f"{path}: {fault}")
        return path

    def _all(self) -> list[Path]:
        return sorted(self._folder.glob("step-*"), key=_step_of, reverse=True)

    def _remove(self, path: Path) -> None:
        """Renamed first: a half-deleted checkpoint must not look like a damaged one."""
        hidden = path.with_name(f".{path.name}.old")
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    def sweep(self) -> None:
        """Delete what a killed run was writing or deleting."""
        for path in self._folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)


def _step_of(path: Path) -> int:
    """From the name, which has more digits after step 999,999; -1 where the folder is no checkpoint."""
    digits = path.name.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Raises OSError where the file system refuses; safetensors reports that as text."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise system_error(error) or error from None


def read_state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    return state


def restore(
    checkpoint: Path, model: Any, optimizer: torch.optim.Optimizer, share: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Put the checkpoint's weights and moments into `model` and `optimizer`; `share` takes a process's shard.

    Raises UserError where the checkpoint is of other weights than the model's.
    """
    weights = load_file(checkpoint / "trainable.safetensors")
    moments = load_file(checkpoint / "optimizer.safetensors")
    parameters = trainable_parameters(model)
    _check_same(checkpoint, weights, parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(share(weights[name], parameter))
            prefix = f"{name}|"
            state = {key.removeprefix(prefix): value for key, value in moments.items() if key.startswith(prefix)}
            if state:
                optimizer.state[parameter] = {k: share(v, parameter) if v.ndim else v for k, v in state.items()}


def _check_same(checkpoint: Path, weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    names = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
    if names:
        raise UserError(
            f"{checkpoint}: {len(names)} weights differ from the model's, such as {shown(names[0])} "
            f"({shapes.get(names[0], 'none')} there, {expected.get(names[0], 'none')} now): it cannot be resumed"
        )


def _fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None where it is intact."""
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text())
        sums: dict[str, str] = manifest["sha256"]
        if sums.keys() != _FILES or f"step-{manifest['step']:06d}" != checkpoint.name:
            return f"{_MANIFEST} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{_MANIFEST} cannot be read ({error})"
    for name, expected in sums.items():
        try:
            if sha256_of(checkpoint / name) != expected:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None
