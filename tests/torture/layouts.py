"""The same run on other numbers of processes, with other cuts, stopped and resumed: the same curve, the same bits."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from torture import runs

WITHIN = 1e-5
"""Relative (L2) difference that rounding may make."""


def layouts(
    worlds: Sequence[int] = (1, 2, 4),
    packings: Sequence[bool] = (True, False),
    steps: int = 20,
    launcher: bool = True,
) -> tuple[str, bool]:
    """Processes x weights x packing against one process that pads; then bits, with the micro-batches fixed."""
    begun, folder = time.monotonic(), runs.empty("layouts")
    train: dict[str, Any] = {"steps": steps, "checkpoint_every": steps, "microbatch_tokens": 120, "learning_rate": 1e-3}
    reference = folder / "reference"
    runs.run(runs.write_config(reference, **train, packing=False))
    within = total = 0
    adapters, curves = 0.0, 0.0
    for world, weights, packing in product(worlds, ("replicate", "shard"), packings):
        output = folder / f"{world}-{weights}-{packing}"
        config = runs.write_config(output, **train, weights=weights, packing=packing)
        _start(config, world, launcher)
        difference, curve = runs.distance(output, reference), _curve(output, reference, steps)
        adapters, curves = max(adapters, difference), max(curves, curve)
        within += difference <= WITHIN and curve <= WITHIN
        total += 1
    equal = bits = 0
    for packing in packings:
        digests = []
        for world in worlds:
            output = folder / f"exact-{world}-{packing}"
            _start(runs.write_config(output, **train, microbatches=4, packing=packing), world, launcher)
            digests.append((runs.digest(output), tuple(runs.losses(output))))
        equal += sum(found == digests[0] for found in digests[1:])
        bits += len(digests) - 1
    line = (
        f"{within} of {total} within {WITHIN:.0e} of one process after {steps} steps (largest: losses {curves:.1e}, "
        f"adapter {adapters:.1e}); with microbatches fixed {equal} of {bits} equal bit for bit, "
        f"{time.monotonic() - begun:.0f} s"
    )
    return line, within == total and equal == bits


def _start(config: Path, world: int, launcher: bool) -> None:
    if launcher and world > 1:
        runs.run_command(config, "--processes", str(world))
    else:
        runs.run(config, world)


def _curve(found: Path, expected: Path, steps: int) -> float:
    """The largest relative difference of a step's loss."""
    one, other = runs.losses(found), runs.losses(expected)
    if not len(one) == len(other) == steps:
        return float("inf")
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


def resume(steps: int = 24) -> tuple[str, bool]:
    """A run that dies after each of its steps and is taken up, and one that dies three times; epochs of two steps."""
    begun, folder = time.monotonic(), runs.empty("resume")
    train: dict[str, Any] = {"steps": steps, "batch_size": 5, "microbatch_tokens": 120}
    reference = folder / "reference"
    runs.run(runs.write_config(reference, **train))
    equal = 0
    for step in range(1, steps + 1):
        output = folder / f"stopped-{step}"
        config = runs.write_config(output, **train)
        runs.stop_after(config, step)
        runs.run(config)
        equal += _same(output, reference)
        shutil.rmtree(output)
    output = folder / "three-times"
    config = runs.write_config(output, **train)
    stops = sorted({max(1, steps // 4), max(1, steps // 2), steps - 1})
    for step in stops:
        runs.stop_after(config, step)
    runs.run(config)
    thrice = _same(output, reference)
    line = (
        f"stopped after each of {steps} steps, {equal} equal bit for bit; stopped {len(stops)} times in one run, "
        f"{'equal' if thrice else 'not equal'}, {time.monotonic() - begun:.0f} s"
    )
    return line, equal == steps and thrice


def _same(found: Path, expected: Path) -> bool:
    return runs.digest(found) == runs.digest(expected) and runs.losses(found) == runs.losses(expected)


def worlds(worlds: Sequence[int] = (1, 2, 4), others: bool = True) -> tuple[str, bool]:
    """Saved by so many processes, taken up by another number; and spread weights taken up whole, and back."""
    begun, folder = time.monotonic(), runs.empty("worlds")
    train: dict[str, Any] = {"steps": 6, "microbatches": 8}
    reference = folder / "reference"
    runs.run(runs.write_config(reference, **train))
    pairs = [*product(worlds, worlds), *([(8, 2)] if others else [])]
    equal = 0
    for before in dict.fromkeys(before for before, _ in pairs):
        stopped = folder / f"by-{before}"
        runs.stop_after(runs.write_config(stopped, **train), 3, before)
        for after in (after for one, after in pairs if one == before):
            equal += _taken_up(stopped, after, reference, **train) == 0.0
    differences = []
    for saved, resumed in (("shard", "replicate"), ("replicate", "shard")):
        stopped = folder / f"as-{saved}"
        runs.stop_after(runs.write_config(stopped, **train, weights=saved), 3, 2)
        differences.append(_taken_up(stopped, 2, reference, **train, weights=resumed))
    line = (
        f"{equal} of {len(pairs)} equal bit for bit (saved by W processes, taken up by W', of {worlds}"
        f"{' and 8 by 2' if others else ''}); sharded to replicated {differences[0]:.1e}, "
        f"back {differences[1]:.1e} (relative), {time.monotonic() - begun:.0f} s"
    )
    return line, equal == len(pairs) and max(differences) <= WITHIN


def _taken_up(stopped: Path, world: int, reference: Path, **train: Any) -> float:
    """How far from `reference` a copy of the `stopped` run comes out; 0.0 is the same bits."""
    output = stopped.with_name(f"{stopped.name}-taken-up-by-{world}")
    shutil.copytree(stopped, output)
    group = runs.run(runs.write_config(output, **train), world)
    if "continuing from" not in group.said:
        raise RuntimeError(f"{output}: it began anew\n{group.said}")
    return 0.0 if _same(output, reference) else max(runs.distance(output, reference), 1e-30)
