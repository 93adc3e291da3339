"""Devices, precision and processes: the only room that asks the environment about them."""

import datetime
from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor


class Runtime:
    """One process among `num_processes`, its device, and the sums over all of them.

    The model is not wrapped: gradients are summed once a step in one flat reduction, so a process without pictures,
    or without samples, has nothing to wait for in between.
    """

    def __init__(self, dtype: str) -> None:
        timeout = InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=30))
        self._accelerator = Accelerator(
            mixed_precision="bf16" if dtype == "bfloat16" else "no", kwargs_handlers=[timeout]
        )
        self.device: torch.device = self._accelerator.device
        self.num_processes: int = self._accelerator.num_processes
        self.index: int = self._accelerator.process_index
        self.is_main: bool = self._accelerator.is_main_process

    def autocast(self) -> AbstractContextManager[None]:
        """bfloat16 for matrix products where the config says so; the float32 adapters stay float32."""
        context: AbstractContextManager[None] = self._accelerator.autocast()
        return context

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over all processes."""
        total: Tensor = self._accelerator.reduce(values, reduction="sum")
        return total

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum every gradient over all processes, a missing one counting as zero."""
        if self.num_processes == 1:
            return
        ordered = list(parameters)
        parts = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in ordered]
        total = self.sum(torch.cat(parts))
        for parameter, part in zip(ordered, torch.split(total, [part.numel() for part in parts]), strict=True):
            parameter.grad = part.view_as(parameter)

    def wait(self) -> None:
        """Until every process is here."""
        self._accelerator.wait_for_everyone()

    def close(self) -> None:
        self._accelerator.end_training()
