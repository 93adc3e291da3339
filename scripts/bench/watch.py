"""What is measured after each step, the same for every program: clocks, memory, allocations."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch


class Watch:
    """One row a step: ``wall`` seconds since the command started, ``cpu`` seconds of the process, ``peak_gib`` so far.

    On a GPU the device has finished the step when its row is written, and memory is what torch has allocated there.
    With `trace_memory` the row has ``largest`` too, the bytes of the largest allocation since `begin` (0 without it);
    that is slow.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.rows: list[dict[str, float]] = []
        self._begun: float = settings["begun"]
        self._on_gpu = settings["device"] == "cuda"
        self._traced: bool = settings["trace_memory"]
        self._profiler: Any = None

    def begin(self) -> None:
        """A step starts: trace its memory."""
        if not self._traced:
            return
        if self._on_gpu:
            torch.cuda.memory._record_memory_history("all", context=None, stacks="python", max_entries=1_000_000)
        else:
            self._profiler = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            )
            self._profiler.start()

    def end(self) -> None:
        """The step is done: add its row."""
        if self._on_gpu:
            torch.cuda.synchronize()
        row = {"wall": time.time() - self._begun, "cpu": time.process_time()}
        if self._on_gpu:
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        else:
            row["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if self._traced:
            row["largest"] = self._largest_on_gpu() if self._on_gpu else self._largest_on_cpu()
        self.rows.append(row)

    def _largest_on_gpu(self) -> int:
        events = torch.cuda.memory._snapshot()["device_traces"]
        torch.cuda.memory._record_memory_history(None)
        return max((e["size"] for trace in events for e in trace if e["action"] == "alloc"), default=0)

    def _largest_on_cpu(self) -> int:
        if self._profiler is None:
            return 0
        self._profiler.stop()
        events = self._profiler.profiler.kineto_results.events()
        return max((event.nbytes() for event in events if event.name() == "[memory]"), default=0)
