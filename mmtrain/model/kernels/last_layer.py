"""Computes the last decoder layer's MLP only where a token is predicted: nothing uses its other rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain.model.attention import KEYWORD


class _LastLayer(nn.Module):
    """A base class before the class of a layer. Activation checkpointing computes the forward of the class again,
    without hooks and attributes of the instance."""

    mlp_of_rows: tuple[nn.Module]
    """In a tuple, so that the MLP does not become a child of a second module."""

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
    """Make `mlp` in `layer`, the last one, find the rows of `PackedRow.predicting` through `rows_of`."""
    if not isinstance(layer, _LastLayer):
        own = type(layer)
        layer.__class__ = type(own.__name__, (_LastLayer, own), {})
    layer.mlp_of_rows = (mlp,)


def rows_of(mlp: Any) -> Tensor | None:
    """The rows that `mlp` has to compute in this call; None for all."""
    rows: Tensor | None = getattr(mlp, "rows", None)
    return rows


def last_mlp(model: Any) -> nn.Module | None:
    """The MLP that is computed only where a token is predicted, if there is one."""
    return next((module.mlp_of_rows[0] for module in model.modules() if isinstance(module, _LastLayer)), None)
