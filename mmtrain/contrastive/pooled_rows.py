"""Computes the last MLP of a tower only where its embedding is pooled: at the first or the last token of each item.

A trial finds which rows an embedding depends on. That it is so for every item is checked as well: the other rows are
not a number where no gradient is computed, and may have no gradient elsewhere.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain.dataset.batch import Batch
from mmtrain.errors import UserError
from mmtrain.model.dropout import SampleDropout
from mmtrain.model.kernels.trial import kernel_of, noise
from mmtrain.model.kernels.ungated import Ungated


class PooledRows:
    """The last MLP of a tower, and the token at which an item's embedding is pooled: 0, or -1 for the last."""

    def __init__(self, mlp: Any, token: int) -> None:
        self._mlp, self._token = mlp, token

    @contextmanager
    def of(self, batch: Batch) -> Iterator[None]:
        """Inside, only the rows of `batch` that are pooled are computed."""
        self._mlp.select_rows = functools.partial(_pooled, batch, self._token)
        try:
            yield
        finally:
            self._mlp.select_rows = None


def find_pooled_rows(model: nn.Module, batch: Batch, embed: Callable[[Batch], Tensor]) -> PooledRows | None:
    """Where a tower of `model` pools the embeddings of `batch`; None where they depend on more rows of its last MLP, or
    where that MLP has no kernel or drops some of its input."""
    called: list[tuple[nn.Module, Tensor]] = []
    with torch.enable_grad(), ExitStack() as hooks:
        for module in model.modules():
            if isinstance(kernel_of(module), Ungated):
                keep = lambda module, args, out: called.append((module, out))  # noqa: E731
                hooks.callback(module.register_forward_hook(keep).remove)
        found = embed(batch)
        if not called or not called[-1][1].requires_grad:
            return None
        mlp, out = called[-1]
        (gradient,) = torch.autograd.grad(found, out, noise(*found.shape).to(found), allow_unused=True)
    is_once = sum(module is mlp for module, _ in called) == 1
    has_dropout = any(isinstance(module, SampleDropout) for module in mlp.modules())
    if gradient is None or gradient.ndim != 3 or not is_once or has_dropout:
        return None
    used = gradient.flatten(0, 1).any(1)
    for token in (0, -1):
        others = torch.ones_like(used).index_fill(0, _pooled(batch, token, out), 0)
        if others.any() and not (used & others).any():
            return PooledRows(mlp, token)
    return None


def check_pooled(embeddings: Tensor) -> Tensor:
    """`embeddings` that were computed without a graph. Raises UserError where they depend on other rows."""
    if not embeddings.requires_grad and embeddings.isnan().any():
        raise UserError("an embedding is not a number: if run.kernels: off changes that, report it as a bug of mmtrain")
    return embeddings


def _pooled(batch: Batch, token: int, x: Tensor) -> Tensor:
    """(num_pooled,) the positions of pooled tokens among the rows of x, (items, tokens, width). A tower can look for
    the last token by its id, so all tokens of a text that have this id count."""
    is_pooled = torch.zeros(x.shape[:2], dtype=torch.bool)
    if batch.image_inputs:
        is_pooled[:, token] = True
    else:
        for segment in batch.segments:
            own = slice(segment.start, segment.start + segment.length)
            ids, pooled = batch.input_ids[segment.row, own], is_pooled[segment.row, own]
            pooled.copy_(ids == ids[-1]) if token else pooled[:1].fill_(True)
    return is_pooled.flatten().nonzero()[:, 0].to(x.device)
