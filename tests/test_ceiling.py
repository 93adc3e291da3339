"""The measured rate of the machine, and the share of it in every row of a run."""

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmtrain.config.schema import Config
from mmtrain.train import ceiling, loop
from mmtrain.train.metrics import MetricsFile
from mmtrain.train.run import train


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("unit", "fastest"), [(0.001, 2), (0.004, 3)])
def test_the_rate_is_that_of_the_fastest_product(
    unit: float, fastest: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which the products take 7, 3, 5, 2, 9 and 4 of a unit, and torch's own count of operations. After
    0.05 seconds none begins."""
    with FlopCounterMode(display=False) as counter:
        torch.ones(64, 64) @ torch.ones(64, 64)
    ticks = itertools.accumulate((0, 7, 1, 3, 1, 5, 1, 2, 1, 9, 1, 4))
    monkeypatch.setattr(time, "perf_counter", lambda: unit * next(ticks))
    monkeypatch.setitem(ceiling._SIDE, "cpu", 64)
    expected = counter.get_total_flops() / (unit * fastest)
    assert ceiling.matmul_rate(torch.device("cpu"), dtype) == pytest.approx(expected)


@pytest.mark.slow("a run")
def test_a_run_reports_its_share_of_the_ceiling(
    make_config: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    shares = []
    for rate in (1e9, 2e9):
        monkeypatch.setattr(loop, "matmul_rate", lambda device, dtype, rate=rate: rate)
        written: list[dict[str, float]] = []
        monkeypatch.setattr(MetricsFile, "write", lambda self, row, written=written: written.append(row))
        train(
            make_config("text", steps=2, eval_every=1000, checkpoint_every=1, output_dir=str(tmp_path / f"{rate:.0f}"))
        )
        shares.append([row["mfu"] * row["seconds"] for row in written])
    assert "% mfu" in capsys.readouterr().err
    assert shares[0] == pytest.approx([2 * share for share in shares[1]])
