"""Things that change between a checkpoint and the run that continues from it: each is refused by name, or accepted."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image

from torture import runs

FITS = "weights differ from the model's"
"""What is said where a change was accepted and the checkpoint's weights still have no place in the model."""


@dataclass(frozen=True, slots=True)
class Change:
    """`key`: what must be named. `edit` changes `file`; `words` are keys given on the command line."""

    key: str
    words: tuple[str, ...] = ()
    file: Path | None = None
    edit: Callable[[Path], None] = field(default=lambda path: None)
    fits: bool = True
    """Whether the checkpoint's weights have a place in the changed model."""


def changes(names: Sequence[str] | None = None) -> tuple[str, bool]:
    """Each change: refused with exit code 2 and its key, taken and recorded with --accept-change."""
    begun, output = time.monotonic(), runs.empty("changes") / "stopped"
    config = runs.write_config(output, steps=3)
    runs.stop_after(config, 2)
    chosen = {name: change for name, change in _all().items() if names is None or name in names}
    refused = accepted = misfits = 0
    found_faults = []
    for name, change in chosen.items():
        before = None if change.file is None else change.file.read_bytes()
        try:
            if change.file is not None:
                _edit(change.file, change.edit)
            fault = _refused(config, change)
            refused += fault is None
            found_faults += [f"{name}: {fault}"] if fault else []
            fault = _accepted(config, change) if change.fits else _does_not_fit(config, change)
            found_faults += [f"{name}, accepted: {fault}"] if fault else []
            accepted += change.fits and fault is None
            misfits += not change.fits and fault is None
        finally:
            if change.file is not None and before is not None:
                change.file.write_bytes(before)
    typo = _typo(config)
    found_faults += [f"typo: {typo}"] if typo else []
    num_fitting = sum(change.fits for change in chosen.values())
    line = (
        f"{refused} of {len(chosen)} refused by key, {accepted} of {num_fitting} accepted and recorded, "
        f"{misfits} of {len(chosen) - num_fitting} refused though accepted since no weight fits, "
        f"a mistyped key {'taken' if typo else 'refused'}, {time.monotonic() - begun:.0f} s"
    )
    return "\n".join([line, *found_faults]), not found_faults


def _all() -> dict[str, Change]:
    data, model, images = runs.data(), runs.model(), runs.data().parent / "images"
    records = "data.train.0.records"
    return {
        "data byte": Change(records, file=data, edit=lambda path: _replace(path, b"a circle", b"a Circle")),
        "image byte": Change("data.train.images", file=images / "0.png", edit=_paint),
        "row order": Change(records, file=data, edit=_swap_rows),
        "base model": Change("model.weights", file=model / "model.safetensors", edit=_nudge),
        "processor": Change(
            "model.processor",
            file=model / "preprocessor_config.json",
            edit=lambda path: _replace(path, b"0.48145466", b"0.48145467"),
        ),
        "chat template": Change(
            "model.template",
            file=model / "chat_template.jinja",
            edit=lambda path: _replace(path, b"You are a helpful", b"You are a careful"),
        ),
        "LoRA rank": Change("tune.language.rank", ("tune.language.rank=2",), fits=False),
        "targets": Change("tune.language.targets", ("tune.language.targets=[q_proj]",), fits=False),
        "batch size": Change("train.batch_size", ("train.batch_size=3",)),
        "learning rate": Change("train.learning_rate", ("train.learning_rate=0.02",)),
        "schedule": Change("train.schedule", ("train.schedule=linear",)),
        "seed": Change("train.seed", ("train.seed=1",)),
    }


def _edit(path: Path, edit: Callable[[Path], None]) -> None:
    """Its time of change is put back: what only looks at that must not pass."""
    status = path.stat()
    before = path.read_bytes()
    edit(path)
    if path.read_bytes() == before:
        raise RuntimeError(f"{path}: nothing was changed")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _replace(path: Path, old: bytes, new: bytes) -> None:
    path.write_bytes(path.read_bytes().replace(old, new, 1))


def _swap_rows(path: Path) -> None:
    first, second, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([second, first, *rest]))


def _paint(path: Path) -> None:
    image = PIL.Image.open(path)
    image.putpixel((3, 3), tuple(255 - value for value in image.getpixel((3, 3))))  # type: ignore[union-attr]
    image.save(path)


def _nudge(path: Path) -> None:
    """The lowest bit of the last weight."""
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)


def _try(config: Path, words: Sequence[str], *accept: str) -> tuple[list[int | None], str, Path]:
    """Exit code and words of a copy of the stopped run, taken up; run.output_dir is no change of the result."""
    stopped = config.with_suffix("")
    output = stopped.with_name("taken-up")
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(stopped, output)
    options = [f"--accept-change={key}" for key in accept]
    group = runs.start(config, 1, [f"run.output_dir={output}", *words, *options])
    return group.wait(), group.said, output


def _refused(config: Path, change: Change) -> str | None:
    """What is wrong with the refusal."""
    codes, said, output = _try(config, change.words)
    lines = [
        line for line in said.splitlines() if line.startswith((f"mmtrain: {change.key}: ", f"mmtrain: {change.key}."))
    ]
    others = [line for line in said.splitlines() if "which changes the result" in line and line not in lines]
    if codes != [2] or len(lines) != 1 or others or runs.digest(output) != "no adapter":
        return f"exit code {codes[0]}\n{said}"
    return None


def _accepted(config: Path, change: Change) -> str | None:
    codes, said, output = _try(config, change.words, change.key)
    state: dict[str, Any] = json.loads((output / "checkpoints" / "step-000003" / "state.json").read_text())
    recorded = [line for line in state["accepted"] if line.startswith(f"step 2: {change.key}: ")]
    if codes != [0] or len(recorded) != 1 or len(state["accepted"]) != 1:
        return f"exit code {codes[0]}, recorded {state['accepted']}\n{said}"
    return None


def _does_not_fit(config: Path, change: Change) -> str | None:
    codes, said, output = _try(config, change.words, change.key)
    if codes != [2] or FITS not in said or runs.digest(output) != "no adapter":
        return f"exit code {codes[0]}\n{said}"
    return None


def _typo(config: Path) -> str | None:
    codes, said, _ = _try(config, ["train.seed=1"], "train.sede")
    return None if codes == [2] and "train.sede" in said and "did you mean train.seed?" in said else said
