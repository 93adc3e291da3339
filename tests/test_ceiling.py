"""The measured rate of the machine, and the share of it in every row of a run."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmtrain.config.schema import Config
from mmtrain.train import ceiling
from mmtrain.train import run as loop
from mmtrain.train.run import train


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rate_is_operations_over_the_time_of_a_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that goes by one each time it is asked, a product takes one second."""
    ticks = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setitem(ceiling._SIDE, "cpu", 64)
    assert ceiling.matmul_rate(torch.device("cpu"), dtype) == 2 * 64**3


def test_a_run_tells_the_share_of_the_ceiling(
    make_config: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    shares = []
    for rate in (1e9, 2e9):
        monkeypatch.setattr(loop, "matmul_rate", lambda device, dtype, rate=rate: rate)
        written: list[dict[str, float]] = []
        monkeypatch.setattr(loop.MetricsFile, "write", lambda self, row, written=written: written.append(row))
        train(
            make_config("text", steps=2, eval_every=1000, checkpoint_every=1, output_dir=str(tmp_path / f"{rate:.0f}"))
        )
        shares.append([row["mfu"] * row["seconds"] for row in written])
    assert "% mfu" in capsys.readouterr().err
    assert shares[0] == pytest.approx([2 * share for share in shares[1]])
