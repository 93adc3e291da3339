"""Which graphs of the first pass are kept for the second: as many as a budget of memory allows."""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor, nn


class GraphMemory:
    """Counts what graphs keep: the tensors that the backward pass needs, without the parameters."""

    def __init__(self, model: nn.Module, max_bytes: float) -> None:
        self._model, self._max_bytes = model, max_bytes
        self.num_kept = 0
        """Graphs that were kept in all steps."""
        self.begin()

    def begin(self) -> None:
        """Nothing is kept of the last step."""
        self._room, self._is_full = self._max_bytes, self._max_bytes <= 0

    @property
    def used(self) -> float:
        """Bytes that the graphs of the step take."""
        return self._max_bytes - self._room

    @cached_property
    def _weights(self) -> set[int]:
        return {value.untyped_storage().data_ptr() for value in self._model.parameters()}

    def run(self, compute: Callable[[], Tensor]) -> tuple[Tensor, Tensor | None]:
        """What `compute` gives, without and with its graph; None where the graph is not kept.

        After the first one that does not fit, no other is tried in the step.
        """
        if self._is_full:
            with torch.no_grad():
                return compute(), None
        sizes: dict[int, int] = {}

        def count(value: Tensor) -> Tensor:
            storage = value.untyped_storage()
            if storage.data_ptr() not in self._weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
            found = compute()
        self._room -= sum(sizes.values())
        if self._room < 0:
            self._is_full = True
            return found.detach(), None
        self.num_kept += 1
        return found.detach(), found
