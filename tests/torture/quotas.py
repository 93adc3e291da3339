"""Disks that are too small: a run that cannot save leaves what it has saved, and continues once there is room."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import time
from collections import Counter, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torture import runs

ENOUGH = 64 * 2**20


def quotas(sizes: int = 50) -> tuple[str, bool]:
    """A run on disks of so many sizes; on every other one the disk fills up only after the first look at its room."""
    begun, folder = time.monotonic(), runs.empty("quotas")
    train = {"steps": 4, "batch_size": 3}
    tune = {"language": {**runs.LORA, "dropout": 0.1}}
    reference = folder / "reference"
    runs.run(runs.write_config(reference, tune, **train))
    expected = runs.digest(reference)
    used = sum(path.stat().st_size for path in reference.rglob("*") if path.is_file())
    checkpoint = sum(path.stat().st_size for path in (reference / "checkpoints" / "step-000004").iterdir())
    mounted = _may_mount(folder / "disk")
    ends: Counter[int | None] = Counter()
    faults: list[str] = []
    for number in range(sizes):
        # from nothing to a little more than a run takes, with one checkpoint in the making
        size = 4096 + (used + 2 * checkpoint) * number // max(1, sizes - 1)
        output = folder / "disk" / "run"
        config = runs.write_config(output, tune, **train)
        config = config.rename(folder / "run.yaml")
        full = _on_disk if mounted else _with_limit
        code, fault = full(folder / "disk", size, config, output, number % 2 == 1, expected)
        ends[code] += 1
        faults += [f"{size:,} bytes, disk {'fills up later' if number % 2 else 'is full'}: {fault}"] if fault else []
    kind, largest = "disks" if mounted else "limits", (used + 2 * checkpoint) / 1e6
    others = sizes - ends[4] - ends[0]
    line = (
        f"{sizes} {kind} up to {largest:.1f} MB: {ends[4]} runs ended with exit code 4, {ends[0]} fitted, {others} "
        f"ended otherwise; {sizes - len(faults)} sound, clear, and with more room on to the same bits, "
        f"{time.monotonic() - begun:.0f} s"
    )
    return "\n".join([line, *faults[:5]]), not faults and ends[4] > 0


def _may_mount(disk: Path) -> bool:
    disk.mkdir(parents=True)
    mounts = (
        os.geteuid() == 0
        and subprocess.run(["mount", "-t", "tmpfs", "none", disk], capture_output=True).returncode == 0
    )
    if mounts:
        subprocess.run(["umount", disk], check=True)
    return mounts


def _on_disk(
    disk: Path, size: int, config: Path, output: Path, blind: bool, expected: str
) -> tuple[int | None, str | None]:
    """Exit code, and what is wrong, of a run on a disk of `size` bytes."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk], check=True)
    try:
        group = runs.start(config, prepare=_see_room if blind else lambda: None)
        code = group.wait()[0]
        fault = _fault(code, group.said, output)
        if code != 0:
            subprocess.run(["mount", "-o", f"remount,size={ENOUGH}", disk], check=True)
            fault = fault or _on(config, output, expected)
        return code, fault
    finally:
        subprocess.run(["umount", disk], check=True)


def _with_limit(
    disk: Path, size: int, config: Path, output: Path, blind: bool, expected: str
) -> tuple[int | None, str | None]:
    """The same where disks cannot be mounted: no file may become larger than a part of `size`."""
    limit = max(size // 8, 65_536)  # what the run says goes to a file too

    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    group = runs.start(config, prepare=prepare)
    code = group.wait()[0]
    fault = _fault(code, group.said, output)
    if code != 0:
        fault = fault or _on(config, output, expected)
    shutil.rmtree(output, ignore_errors=True)
    return code, fault


def _see_room() -> None:
    """The disk looks empty: another program will have filled it when the run writes."""
    usage = namedtuple("usage", "total used free")
    seen: Callable[[Any], Any] = lambda path: usage(2**40, 0, 2**40)  # noqa: E731
    shutil.disk_usage = seen  # type: ignore[assignment]


def _fault(code: int | None, said: str, output: Path) -> str | None:
    """What is wrong with the end of a run that may have had too little room."""
    sound, broken = runs.sound_steps(output)
    taken = len(runs.losses(output)) if (output / "metrics.jsonl").is_file() else 0
    if broken:
        return f"{', '.join(broken)} can be seen and is not sound"
    if taken > 1 and max(sound, default=0) < taken - 1:
        return f"step {taken} was begun and the newest checkpoint is of step {max(sound, default=0)}"
    if code == 0:
        return None
    lines = [line for line in said.splitlines() if line.startswith("mmtrain: ")]
    if code != 4 or len(lines) != 1 or "Traceback" in said:
        return f"exit code {code}\n{said}"
    figures = r"needs? [\d,.]+ MB.*[\d,.]+ MB (is|are) free" if "/checkpoints" in lines[0] else r"No space|too large"
    if str(output) not in lines[0] or not re.search(figures, lines[0]):
        return f"it is not said what is needed, what is free, and where: {lines[0]}"
    return None


def _on(config: Path, output: Path, expected: str) -> str | None:
    """What is wrong with the same command once there is room."""
    group = runs.start(config)
    codes = group.wait()
    if codes != [0] or runs.digest(output) != expected:
        return f"with more room: exit code {codes[0]}, adapter {runs.digest(output)[:12]}\n{group.said}"
    return None
