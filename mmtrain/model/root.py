"""The one module through which everything is computed."""

from collections.abc import Callable
from typing import Any

from torch import nn


class Root(nn.Module):
    """Runs a computation on the model inside one forward: where weights are spread over processes they are whole there
    and nowhere else."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[..., Any], *args: Any) -> Any:
        """`compute(model, *args)`."""
        return compute(self.model, *args)
