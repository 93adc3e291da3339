"""What a run does when a step of `data.streaming` begins."""

from pathlib import Path

import torch

from mmtrain.dataset.stream import Stream, StreamedWindow
from mmtrain.errors import UserError
from mmtrain.runtime.processes import Runtime
from mmtrain.train.folder import append_dropped, dropped_row


def begin_step(stream: Stream, step: int, runtime: Runtime, output_dir: Path) -> None:
    """Check that all processes have read the same for `step`, and list what it leaves out in dropped.jsonl.

    Raises UserError where a sample of its windows cannot be used, or the processes have read different samples.
    """
    for window in stream.begin(step):
        if runtime.num_processes > 1:
            _check_equal(window, runtime)
        if runtime.is_main:
            append_dropped(output_dir, [dropped_row(*one) | {"step": step} for one in window.left_out()])


def _check_equal(window: StreamedWindow, runtime: Runtime) -> None:
    """Steps follow from the data if every process finds the same in it: one with another disk might not."""
    checksums = runtime.gather(torch.tensor(window.checksum, device=runtime.device))
    if (checksums != checksums[0]).any():
        raise UserError(
            f"{window.samples.place(0)}: from here on the processes read different samples: give all of them the same "
            "files and images"
        )
