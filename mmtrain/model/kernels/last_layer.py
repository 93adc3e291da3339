"""The last decoder layer's MLP computed only where a token is predicted: nothing uses its other rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain.model.attention import KEYWORD


class _LastLayer(nn.Module):
    """Put before a layer's own class. Activation checkpointing recomputes the forward of the class, without hooks and
    whatever else is set on the instance."""

    mlp_of_rows: tuple[nn.Module]
    """In a tuple it is no child of a second module."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        row = kwargs.get(KEYWORD)
        if row is None or torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        with _rows(self.mlp_of_rows[0], row.predicting):
            return super().forward(*args, **kwargs)


@contextmanager
def _rows(mlp: Any, rows: Tensor | None) -> Iterator[None]:
    mlp.rows = rows
    try:
        yield
    finally:
        mlp.rows = None


def compute_at_predicting(layer: Any, mlp: nn.Module) -> None:
    """Have `mlp`, which is in `layer`, the last one, find the rows of `PackedRow.predicting` through `rows_of`."""
    if not isinstance(layer, _LastLayer):
        own = type(layer)
        layer.__class__ = type(own.__name__, (_LastLayer, own), {})
    layer.mlp_of_rows = (mlp,)


def rows_of(mlp: Any) -> Tensor | None:
    """The rows of the tokens at which `mlp` is needed in this call; None for all of them."""
    rows: Tensor | None = getattr(mlp, "rows", None)
    return rows


def last_mlp(model: Any) -> nn.Module | None:
    """The MLP that is computed only where a token is predicted, if there is one."""
    return next((module.mlp_of_rows[0] for module in model.modules() if isinstance(module, _LastLayer)), None)
