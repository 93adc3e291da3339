"""Checkpoints that are there whole or not at all, and the newest one that is sound.

A checkpoint is what learns, the optimizer's moments, the step, the config and the fingerprints: safetensors and JSON,
never pickle. No random state is kept because none is needed: whatever is random is seeded by the step and the sample.
It is made in a folder beside, flushed to the disk, and renamed; `manifest.json` holds the SHA-256 of every file.
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

from mmtrain.atomic_files import flush, move_into_place, temporary_path
from mmtrain.dataset.hashes import sha256_of
from mmtrain.errors import NoCheckpointError, StorageError, UserError, storage_faults, system_error
from mmtrain.safe_text import shown

_MANIFEST = "manifest.json"
_FILES = {"trainable.safetensors", "optimizer.safetensors", "state.json"}
_NUM_MOMENTS = 2


def trainable_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """What learns, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What learns and its moments at one step, whole and on the CPU."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]


def snapshot(
    model: Any, optimizer: torch.optim.Optimizer, whole: Callable[[Tensor], Tensor], tick: Callable[[], None]
) -> Snapshot:
    """Every process must ask where weights are spread: `whole` gathers them, one tensor at a time."""

    def held(value: Tensor) -> Tensor:
        tick()
        return whole(value.detach()).cpu().contiguous()

    parameters = trainable_parameters(model)
    return Snapshot(
        {name: held(parameter) for name, parameter in parameters.items()},
        {
            f"{name}|{key}": held(value)
            for name, parameter in parameters.items()
            for key, value in optimizer.state.get(parameter, {}).items()
        },
    )


def checkpoint_bytes(model: Any) -> int:
    """What a checkpoint takes on the disk: float32 weights and as much again for each moment."""
    return sum(4 * p.numel() for p in trainable_parameters(model).values()) * (1 + _NUM_MOMENTS)


class CheckpointFolder:
    """The checkpoints of one run: `step-000050` and so on under `folder`."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def check_room(self, size: int) -> None:
        """Raises StorageError where the checkpoints still to come, of `size` bytes each, will not fit."""
        with storage_faults(f"{self._folder}: it cannot be made"):
            self._folder.mkdir(parents=True, exist_ok=True)
        self.sweep()
        held = sum(file.stat().st_size for path in self._all() for file in path.rglob("*"))
        needed = (self._keep + 1) * size - held
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise StorageError(
                f"{self._folder}: {self._keep} checkpoints and one in the making need {needed / 1e6:,.1f} MB more, "
                f"{free / 1e6:,.1f} MB are free: make room or take another run.output_dir"
            )

    def save(self, step: int, held: Snapshot, state: dict[str, Any]) -> Path:
        """Write a checkpoint behind `step`, read it back, then delete all but the newest `keep`.

        Raises StorageError, with the checkpoints before untouched, where it cannot be written.
        """
        target = self._folder / f"step-{step:06d}"
        size = sum(value.nbytes for part in (held.weights, held.moments) for value in part.values())
        with storage_faults(lambda: self._needs(target, size)):
            self._folder.mkdir(parents=True, exist_ok=True)
            flush(self._folder.parent)
            self.sweep()
            with temporary_path(target) as made:
                made.mkdir()
                _write_tensors(held.weights, made / "trainable.safetensors")
                _write_tensors(held.moments, made / "optimizer.safetensors")
                (made / "state.json").write_text(json.dumps(state, indent=2))
                sums = {path.name: sha256_of(path) for path in sorted(made.iterdir())}
                (made / _MANIFEST).write_text(json.dumps({"step": step, "sha256": sums}, indent=2))
                move_into_place(target, made)
        fault = _fault(target)
        if fault is not None:
            raise StorageError(f"{target}: read back, {fault}: the disk did not keep what was written")
        with storage_faults(f"{self._folder}: {target.name} is saved, an older one cannot be deleted"):
            self._prune(step)
        return target

    def _prune(self, step: int) -> None:
        """Delete all but the newest `keep` up to `step`, and what is behind it: the run went back over it as broken."""
        own = [path for path in self._all() if _step_of(path) <= step]
        for old in [*(path for path in self._all() if _step_of(path) > step), *own[self._keep :]]:
            self._remove(old)

    def _needs(self, target: Path, size: int) -> str:
        there = next(path for path in (self._folder, *self._folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        return f"{target}: the checkpoint needs {size / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free"

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest sound checkpoint, and a line for each newer one that is broken, saying what is wrong with it.

        Raises NoCheckpointError where there are checkpoints and none is sound.
        """
        broken: list[str] = []
        for path in self._all():
            fault = _fault(path)
            if fault is None:
                return path, [f"{line}; {path.name} is used" for line in broken]
            broken.append(f"{path}: {fault}")
        if broken:
            raise NoCheckpointError([*broken, f"{self._folder}: no checkpoint is sound; --fresh starts the run over"])
        return None, []

    def _all(self) -> list[Path]:
        return sorted(self._folder.glob("step-*"), key=_step_of, reverse=True)

    def _remove(self, path: Path) -> None:
        """Out of sight in one rename first: a half-deleted checkpoint must not look like a broken one."""
        hidden = path.with_name(f".{path.name}.old")
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    def sweep(self) -> None:
        """Delete what a killed run was writing or deleting."""
        for path in self._folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)


def _step_of(path: Path) -> int:
    """From the name, which has more digits behind step 999,999; -1 where somebody else made the folder."""
    digits = path.name.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """As OSError what the file system refuses: safetensors gives it as text."""
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
    """Put the checkpoint's weights and moments into `model` and `optimizer`; `share` cuts out what a process holds.

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
            f"{checkpoint}: {len(names)} weights are others than the model's, such as {shown(names[0])} "
            f"({shapes.get(names[0], 'none')} there, {expected.get(names[0], 'none')} now): it cannot be continued"
        )


def _fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None where it is sound."""
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
