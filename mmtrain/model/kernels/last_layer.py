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

    mlp: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        row = kwargs.get(KEYWORD)
        if row is None or torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        with _rows(self.mlp, row.predicting):
            return super().forward(*args, **kwargs)


@contextmanager
def _rows(mlp: Any, rows: Tensor | None) -> Iterator[None]:
    mlp.rows = rows
    try:
        yield
    finally:
        mlp.rows = None


def compute_at_predicting(layer: Any) -> None:
    """Have the MLP of `layer`, the last one, see the rows of `PackedRow.predicting` in its attribute `rows`."""
    own = type(layer)
    layer.__class__ = type(own.__name__, (_LastLayer, own), {})


def last_mlp(model: Any) -> nn.Module | None:
    """The MLP that is computed only where a token is predicted, if there is one."""
    return next((module.mlp for module in model.modules() if isinstance(module, _LastLayer)), None)
