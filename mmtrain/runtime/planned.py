"""The runtime of a run that is only planned: it meets no other process and changes nothing of this one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmtrain.runtime.activity import Activity
from mmtrain.runtime.processes import Runtime


class PlannedRuntime(Runtime):
    """The first of `num_processes` processes. Its tensors are on the CPU, and so are those of the others, which it
    invents: it needs the memory of an exchange."""

    def __init__(self, dtype: str, num_processes: int, tick: Callable[[], None]) -> None:
        self._store = self._supervisor = None
        self._dtype, self._timeout = dtype, 0.0
        self.device = torch.device("cpu")
        self.num_processes, self.index, self.is_main = num_processes, 0, True
        self._neighbours = range(1)
        self.activity = Activity()
        self._tick = tick

    def make_deterministic(self) -> None:
        """Nothing: no value is computed."""

    @property
    def num_cores(self) -> int:
        """One: no other process is started."""
        return 1

    def sum(self, values: Tensor) -> Tensor:
        return values.clone()

    def gather(self, values: Tensor) -> Tensor:
        return torch.stack([torch.empty_like(values) for _ in range(self.num_processes)])

    def wait(self) -> None:
        """Nothing to wait for."""

    def from_first(self, key: str, make: Callable[[], Any]) -> Any:
        self._tick()
        return make()
