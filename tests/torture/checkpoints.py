"""Checkpoints that rot, and saves that fail in the middle: only what is sound is used, and something sound stays."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file

import mmtrain.train.checkpoint as checkpoint_module
from mmtrain.errors import NoCheckpointError, StorageError
from mmtrain.train.checkpoint import CheckpointFolder, Snapshot
from torture import runs


def corrupt(flips: int = 1000, truncations: int = 200) -> tuple[str, bool]:
    """Bits flipped and ends cut off at random places of every file of the newest checkpoint."""
    begun, draw, output = time.monotonic(), random.Random(0), runs.empty("corrupt") / "run"
    config = runs.write_config(output, steps=4)
    runs.run(config)
    expected = runs.digest(output)
    folder = output / "checkpoints"
    newest, older = sorted(folder.iterdir(), reverse=True)
    contents = {path: path.read_bytes() for path in sorted(newest.iterdir())}
    cases: list[tuple[Path, bytes | None]] = []
    for number in range(flips):
        path = list(contents)[number % len(contents)]
        cases.append((path, _flipped(contents[path], draw)))
    for number in range(truncations):
        path = list(contents)[number % len(contents)]
        cases.append((path, contents[path][: draw.randrange(len(contents[path]))]))
    cases += [(path, bytes(len(content))) for path, content in contents.items()]
    cases += [(path, None) for path in contents]
    silent = named = fell_back = 0
    unclear = ""
    for path, content in cases:
        path.unlink() if content is None else path.write_bytes(content)
        found, lines = CheckpointFolder(folder, 2).newest()
        silent += found == newest or not lines
        fell_back += found == older
        # a manifest whose sums are damaged speaks against the file whose sum it holds
        possible = [file.name for file in contents] if path.name == "manifest.json" else [path.name]
        good = any(
            str(newest) in line and any(f" {name} " in line or f"/{name}'" in line for name in possible)
            for line in lines
        )
        named += good
        unclear = unclear or ("" if good else f"\n{path.name} damaged: {lines}")
        path.write_bytes(contents[path])
    resumed = _taken_up(config, output, expected, draw)
    codes, said = _none_left(config, output, draw)
    line = (
        f"{flips} flipped bits, {truncations} truncations, {len(contents)} files zeroed and removed: {silent} used "
        f"silently, {named} of {len(cases)} named, {fell_back} fell back to the older; the run then continues to "
        f"{'the same bits' if resumed else 'OTHER BITS'}; none left: exit code {codes[0]}, "
        f"{time.monotonic() - begun:.0f} s"
    )
    good = not silent and named == fell_back == len(cases) and resumed
    clear = codes == [3] and "no checkpoint is intact" in said and "Traceback" not in said
    return line + unclear + ("" if clear else f"\n{said}"), good and clear


def _flipped(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _break(checkpoint: Path, draw: random.Random) -> None:
    path = checkpoint / "optimizer.safetensors"
    path.write_bytes(_flipped(path.read_bytes(), draw))


def _taken_up(config: Path, output: Path, expected: str, draw: random.Random) -> bool:
    """Whether the run continues from the older checkpoint to the same bits, saying so."""
    shutil.rmtree(output / "adapter")
    _break(output / "checkpoints" / "step-000004", draw)
    said = runs.run(config).said
    return "step-000004: optimizer.safetensors" in said and runs.digest(output) == expected


def _none_left(config: Path, output: Path, draw: random.Random) -> tuple[list[int | None], str]:
    for path in (output / "checkpoints").iterdir():
        _break(path, draw)
    group = runs.start(config)
    return group.wait(), group.said


class Death(BaseException):
    """Stands for a process that is killed: nothing may tidy up after it."""


def histories(histories: int = 1000) -> tuple[str, bool]:
    """Random saves, saves that fail or die in each of their file operations, and damage to all but one checkpoint."""
    begun, draw, folder = time.monotonic(), random.Random(0), runs.empty("histories")
    saves = faults = wrong = 0
    failures = ""
    for number in range(histories):
        history = History(folder / "checkpoints", draw)
        try:
            for _ in range(12):
                history.go_on()
                history.check()
        except Exception as error:  # whatever it is, a store that is sound does not raise it
            wrong += 1
            failures += f"\nhistory {number}: {error!r}: {'; '.join(history.log)}" if wrong < 6 else ""
        saves, faults = saves + history.saves, faults + history.faults
        shutil.rmtree(folder, ignore_errors=True)
    line = f"{histories} histories, {saves} saves, {faults} of them broken off, {wrong} went wrong"
    return f"{line}, {time.monotonic() - begun:.0f} s{failures}", not wrong and faults > 0


class History:
    """One folder of checkpoints and what happens to it; each step's weights hold the step's number."""

    def __init__(self, folder: Path, draw: random.Random) -> None:
        self._folder, self._draw = folder, draw
        self._keep, self._every = draw.choice((2, 3)), draw.choice((1, 2, 5))
        self._step = draw.choice((0, 999_990))  # names get longer after step 999,999
        self._saved = False
        self.log: list[str] = []
        self.saves = self.faults = 0

    def go_on(self) -> None:
        """A save, perhaps broken off and followed by a restart; damage; or a restart with other settings."""
        what = self._draw.choice(("save", "save", "save", "fail", "die", "damage", "restart"))
        if what in ("save", "fail", "die"):
            self._save(what)
        elif what == "damage":
            self._damage()
        else:
            self._keep, self._every = self._draw.choice((2, 3)), self._draw.choice((1, 2, 5))
            self._restart()

    def check(self) -> None:
        """The newest sound checkpoint is there, and holds the step that it says."""
        if not self._saved:
            return
        try:
            found, _ = CheckpointFolder(self._folder, self._keep).newest()
        except NoCheckpointError as error:
            raise AssertionError(f"none is sound ({error.faults[-1]})") from None
        assert found is not None, "none is there"
        step = int(found.name.removeprefix("step-"))
        weights = load_file(found / "trainable.safetensors")["weight"]
        assert checkpoint_module.read_state(found)["step"] == step == weights[0], f"{found.name} holds another step"

    def _restart(self) -> None:
        with suppress(NoCheckpointError):
            found, _ = CheckpointFolder(self._folder, self._keep).newest()
            self._step = 0 if found is None else int(found.name.removeprefix("step-"))
        self.log.append(f"resume from step {self._step}, keep {self._keep}")

    def _save(self, how: str) -> None:
        step = self._step + self._every
        snapshot = Snapshot({"weight": torch.full((8,), float(step))}, {})
        at = self._draw.randrange(30)
        error = Death() if how == "die" else OSError(28, "No space left on device")
        self.saves += 1
        try:
            with failing(at if how != "save" else -1, error):
                CheckpointFolder(self._folder, self._keep).save(step, snapshot, {"step": step})
        except (Death, StorageError) as broken:
            self.faults += 1
            self.log.append(f"save {step} broken off by {type(broken).__name__} in operation {at}")
            self._restart()
        except OSError as broken:
            raise AssertionError(f"save {step}: {broken!r} is for the user, and no StorageError") from None
        else:
            self.log.append(f"save {step}")
            self._step, self._saved = step, True
            self.check()
            found, _ = CheckpointFolder(self._folder, self._keep).newest()
            assert found == self._folder / f"step-{step:06d}", f"what was just saved is not the newest, but {found}"

    def _damage(self) -> None:
        """A file of each of the newest checkpoints rots, but at least one checkpoint stays as it is."""
        sound = runs.sound_steps(self._folder.parent)[0]
        for step in sound[self._draw.randrange(1, len(sound)) :] if len(sound) > 1 else []:
            self._rot(self._folder / f"step-{step:06d}")
        self._restart()

    def _rot(self, path: Path) -> None:
        file = self._draw.choice(sorted(path.iterdir()))
        file.write_bytes(_flipped(file.read_bytes(), self._draw))
        self.log.append(f"{path.name}/{file.name} rots")


@contextmanager
def failing(at: int, error: BaseException) -> Iterator[None]:
    """Raise `error` in the file operation number `at`, and in all that follow it where it is a death."""
    count = -1

    def breaking(call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if at >= 0 and (count == at or (count > at and isinstance(error, Death))):
                raise error
            return call(*args, **kwargs)

        return instead

    places: list[tuple[Any, str]] = [(os, "fsync"), (os, "unlink"), (os, "rmdir")]
    places += [(Path, name) for name in ("rename", "mkdir", "write_text")]
    places += [(checkpoint_module, "save_file")]
    kept = [(owner, name, getattr(owner, name)) for owner, name in places]
    for owner, name, call in kept:
        setattr(owner, name, breaking(call if name != "fsync" else lambda descriptor: None))  # no power fails here
    try:
        yield
    finally:
        for owner, name, call in kept:
            setattr(owner, name, call)
