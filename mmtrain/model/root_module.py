"""The module through which every forward pass goes."""

from collections.abc import Callable
from typing import Any

from torch import nn


class RootModule(nn.Module):
    """Runs a computation inside the forward of one module. Weights sharded over processes are complete only there."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[..., Any], *args: Any) -> Any:
        """`compute(model, *args)`."""
        return compute(self.model, *args)
