"""Checkpoints that are there whole or not at all, and the newest one that is sound.

A checkpoint is what learns, the optimizer's moments, the step and the config: safetensors and JSON, never pickle.
No random state is kept because none is needed: whatever is random is seeded by the step and the sample. It is made
in a folder beside, flushed to the disk, and renamed; `manifest.json` holds the SHA-256 of every file.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_MANIFEST = "manifest.json"


def trainable_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """What learns, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def write_folder(target: Path, files: Mapping[str, bytes] | None = None, made: Path | None = None) -> None:
    """Put a folder at `target` in one rename, its files flushed first, in place of any that is there.

    The folder is `made`, written beside `target`, or is made of `files`.
    """
    folder = made if made is not None else target.with_name(f".{target.name}.{os.getpid()}")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (files or {}).items():
        (folder / name).write_bytes(content)
    for path in [*folder.rglob("*"), folder]:
        _flush(path)
    if target.exists():
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        folder.rename(target)
        shutil.rmtree(old)
    else:
        folder.rename(target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class CheckpointFolder:
    """The checkpoints of one run: `step-000050` and so on under `folder`."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def save(self, step: int, model: Any, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Path:
        """Write a checkpoint behind `step`, then delete all but the newest `keep`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        target = self._folder / f"step-{step:06d}"
        made = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        parameters = trainable_parameters(model)
        save_file(
            {name: p.detach().cpu().contiguous() for name, p in parameters.items()}, made / "trainable.safetensors"
        )
        save_file(_moments(parameters, optimizer), made / "optimizer.safetensors")
        (made / "state.json").write_text(json.dumps(state, indent=2))
        sums = {path.name: _sha256(path) for path in sorted(made.iterdir())}
        (made / _MANIFEST).write_text(json.dumps({"step": step, "sha256": sums}, indent=2))
        write_folder(target, made=made)
        for old in self._all()[self._keep :]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest sound checkpoint, and a line for each newer one that is broken, saying what is wrong with it."""
        broken: list[str] = []
        for path in self._all():
            fault = _fault(path)
            if fault is None:
                return path, broken
            broken.append(f"{path}: {fault}; an older checkpoint is used")
        return None, broken

    def _all(self) -> list[Path]:
        return sorted(self._folder.glob("step-*"), reverse=True)


def read_state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    return state


def restore(checkpoint: Path, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Put the checkpoint's weights and moments into `model` and `optimizer`."""
    weights = load_file(checkpoint / "trainable.safetensors")
    moments = load_file(checkpoint / "optimizer.safetensors")
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            parameter.copy_(weights[name])
            prefix = f"{name}|"
            state = {key.removeprefix(prefix): value for key, value in moments.items() if key.startswith(prefix)}
            if state:
                on_device = {key: v.to(parameter.device) if v.ndim else v for key, v in state.items()}
                optimizer.state[parameter] = on_device


def _moments(parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}|{key}": value.detach().cpu().contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None where it is sound."""
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text())
        for name, expected in manifest["sha256"].items():
            if _sha256(checkpoint / name) != expected:
                return f"{name} is not what was written"
        if not {"trainable.safetensors", "optimizer.safetensors", "state.json"} <= manifest["sha256"].keys():
            return f"{_MANIFEST} does not list every file"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        return f"cannot be read ({error})"
    return None
