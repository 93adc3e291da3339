"""What the comparison prints: whether losses agree, and only then rates, memory and ratios."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

Runs = dict[str, list[dict[str, Any]]]
"""The rounds of each program."""
NAMES = {"mmtrain": "mmtrain", "plain": "Trainer", "trl": "TRL"}
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3}
"""Relative: Trainer logs four or five digits of its losses."""
FIRST_STEPS = 3
"""Their losses must agree. Later ones are shown: a rounding in the first steps grows."""
WARM_UP = 2
"""Steps left out of every rate."""


def step_seconds(found: dict[str, Any], clock: str) -> list[float]:
    """Of the steps after the warm-up, data loading included: from the end of one step to the end of the next."""
    times = [row[clock] for row in found["rows"]]
    return [after - before for before, after in itertools.pairwise(times[WARM_UP - 1 :])]


def report_losses(found: Runs, dtype: str) -> None:
    own = [row["loss"] for row in found["mmtrain"][0]["rows"]]
    for name, runs in found.items():
        losses = [row["loss"] for row in runs[0]["rows"]]
        off = [abs(a - b) / abs(b) for a, b in zip(losses, own, strict=True)]
        agrees = max(off[:FIRST_STEPS]) <= LOSS_TOLERANCE[dtype]
        verdict = "agree" if agrees else "DO NOT AGREE: its times below mean nothing"
        print(
            f"{NAMES[name]:8} losses {losses[0]:.5f} … {losses[-1]:.5f}, off mmtrain's by "
            f"{max(off[:FIRST_STEPS]):.1e} in the first {FIRST_STEPS} steps, {max(off):.1e} in all: {verdict}"
        )


def report_inputs(lengths: list[list[int]], supervised: list[int], epoch: int) -> None:
    """`lengths`: the tokens of each sample of each step."""
    places = sum(len(step) * max(step) for step in lengths)
    tokens = sum(map(sum, lengths))
    print(
        f"{len(lengths)} steps of {len(lengths[0])} samples, {epoch} an epoch: {tokens / len(lengths):,.0f} tokens "
        f"a step ({sum(supervised) / tokens:.0%} trained on), the longest sample {max(map(max, lengths)):,}; "
        f"padded to the longest of each step {1 - tokens / places:.0%} would be padding"
    )


def report_rates(found: Runs, tokens: list[int], supervised: list[int], settings: dict[str, Any]) -> None:
    """`tokens`, `supervised`: of each step. The share is of the measured rate of matrix products."""
    own = found["mmtrain"]
    clock, unit = ("wall", "wall") if settings["device"] == "cuda" else ("cpu", "CPU")
    threads = 1 if clock == "wall" else settings["threads"]
    ceiling = statistics.median(one["matmul_rate"] for one in own)
    operations = sum(row["operations"] for row in own[0]["rows"][WARM_UP:])
    print(
        f"Steps {WARM_UP + 1} to {len(tokens)}; seconds are {unit} seconds, ceiling {ceiling / 1e9:,.0f} G operations/s"
    )
    print("         wall s/  {0:>6}/  tokens/ trained/ share of    peak   first  {0} time, times".format(f"{unit} s"))
    print("            step     step        s        s  ceiling     GiB  step s  mmtrain's (spread)")
    for name, runs in found.items():
        seconds = [step_seconds(one, clock) for one in runs]
        wall = statistics.median([value for one in runs for value in step_seconds(one, "wall")])
        total = statistics.median(sum(values) for values in seconds)
        ratios = sorted(
            statistics.median(values) / statistics.median(step_seconds(other, clock))
            for values, other in zip(seconds, own, strict=True)
        )
        print(
            f"{NAMES[name]:8} {wall:7.2f} {statistics.median(itertools.chain(*seconds)):8.2f} "
            f"{sum(tokens[WARM_UP:]) / total:8.0f} {sum(supervised[WARM_UP:]) / total:8.0f} "
            f"{operations / (total / threads) / ceiling:8.0%} {max(one['rows'][-1]['peak_gib'] for one in runs):7.2f} "
            f"{statistics.median(one['rows'][0]['wall'] for one in runs):7.1f}  "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


def report_epochs(found: Runs, tokens: list[int], epoch: int, device: str) -> None:
    """Seconds a step of the first and of the second epoch, where the steps cover both. The first lacks the warm-up, so
    that their steps are of other sizes: the ratio is of the time a token."""
    clock, unit = ("wall", "wall") if device == "cuda" else ("cpu", "CPU")
    for name, runs in found.items():
        steps, costs = [], []
        for first, last in ((WARM_UP, epoch), (epoch, 2 * epoch)):
            times = [one["rows"][last - 1][clock] - one["rows"][first - 1][clock] for one in runs]
            steps.append(statistics.median(times) / (last - first))
            costs.append(1e3 * statistics.median(times) / sum(tokens[first:last]))
        print(
            f"{NAMES[name]:8} epoch 1 (from step {WARM_UP + 1}) {steps[0]:.3f} {unit} s a step, {costs[0]:.3f} ms a "
            f"token; epoch 2 {steps[1]:.3f} and {costs[1]:.3f}: {costs[1] / costs[0]:.0%} of the time a token"
        )


def report_memory(found: Runs, longest: int, vocabulary: int) -> None:
    """The largest allocation of any step but the first, compared with the logits of one sample of `longest` tokens."""
    logits = longest * vocabulary * 4
    for name, runs in found.items():
        largest = max(row["largest"] for one in runs for row in one["rows"][1:])
        verdict = "no such tensor" if largest < logits else "there may be such a tensor"
        print(
            f"{NAMES[name]:8} largest allocation of a step {largest / 2**20:,.1f} MiB, {largest / logits:.2f} times "
            f"sequence x vocabulary x 4 bytes ({longest:,} x {vocabulary:,}, of one sample): {verdict}"
        )
