"""The contrastive losses and their gradients, without autograd and without a matrix of all similarities.

With the similarities s = scale · cos(query, document) (+ bias) of the distinct items of a step:

- `infonce`: the weighted mean over the positives of softplus(logsumexp(s of the negatives) - s of the positive), and
  where it is symmetric the mean of this and of the same with queries and documents exchanged. Without repeated items
  it is the InfoNCE of van den Oord et al. 2018 and, symmetric, the loss of CLIP (Radford et al. 2021). A query's other
  positives are not among its negatives, so the loss can reach 0.
- `sigmoid`: the sum over the positives of weight · softplus(-s), plus the sum over the negatives of softplus(s),
  divided by the sum of the weights (SigLIP: Zhai et al. 2023).

Similarities exist for a block of queries at once. What the other direction needs of a document, its logsumexp over all
queries, is accumulated in a first pass over the blocks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.contrastive.relation import Numbers, Relation

LossKind = Literal["infonce", "sigmoid"]
BLOCK_VALUES = 2**21
"""Similarities that exist at once."""
_DOUBLE_ROWS = 256
"""Embeddings that exist in float64 at once."""


@dataclass(frozen=True, slots=True)
class LossGradients:
    """A loss, and its gradients: float64 where they are sums over all items."""

    loss: Tensor
    """()"""
    queries: Tensor
    """(num_queries, width)"""
    documents: Tensor
    """(num_documents, width)"""
    scale: Tensor
    """()"""
    bias: Tensor
    """()"""


@dataclass(frozen=True, slots=True)
class LossSettings:
    """What is computed of the embeddings."""

    kind: LossKind
    symmetric: bool = True
    """Whether documents also choose among the queries; sigmoid always compares both ways at once."""
    dims: tuple[int, ...] = ()
    """Widths to which embeddings are cut, whose losses are averaged (Matryoshka: Kusupati et al. 2022); none: the whole
    width."""
    block: int | None = None
    """Queries whose similarities exist at once; None: as many as `BLOCK_VALUES` allows."""


def contrastive_loss(
    queries: Tensor, documents: Tensor, relation: Relation, settings: LossSettings, scale: Tensor, bias: Tensor
) -> LossGradients:
    """The loss of embeddings (num_queries, width) and (num_documents, width) of any length, which are normalized here;
    `scale` () multiplies their cosines and `bias` () is added. Everything is computed in the type of the embeddings."""
    dims = settings.dims or (queries.shape[1],)
    compute = _infonce if settings.kind == "infonce" else _sigmoid
    found = []
    for width in dims:
        (own, own_norms), (other, other_norms) = (_normalized(value[:, :width]) for value in (queries, documents))
        entries = _Entries(relation, queries.device, own.dtype)
        one = compute(own, other, entries, settings, scale.to(own), bias.to(own))
        of_queries = _before_norm(one.queries, own, own_norms, queries)
        of_documents = _before_norm(one.documents, other, other_norms, documents)
        found.append(LossGradients(one.loss, of_queries, of_documents, one.scale, one.bias))
    return _mean(found)


def _mean(found: Sequence[LossGradients]) -> LossGradients:
    if len(found) == 1:
        return found[0]
    names = ("loss", "queries", "documents", "scale", "bias")
    return LossGradients(*(sum(getattr(one, name) for one in found) / len(found) for name in names))


def _normalized(values: Tensor) -> tuple[Tensor, Tensor]:
    """`values` (n, width) with norm 1, and their norms (n, 1)."""
    norms = values.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return values / norms, norms


def _before_norm(gradient: Tensor, unit: Tensor, norms: Tensor, embeddings: Tensor) -> Tensor:
    """The gradient of `embeddings` from that of `unit`, their first columns divided by their norms. `gradient` is
    changed in place: memory is what limits the number of embeddings."""
    along = torch.bmm(unit.unsqueeze(1), gradient.unsqueeze(2))[:, 0]
    own = gradient.addcmul_(unit, along, value=-1).div_(norms)
    missing = embeddings.shape[1] - own.shape[1]
    return F.pad(own, (0, missing)) if missing else own


class _Entries:
    """The positives of a relation, and all that are no negatives, on the device."""

    def __init__(self, relation: Relation, device: torch.device, dtype: torch.dtype) -> None:
        self._relation = relation
        self.rows, self.columns, self._left_rows, self._left_columns = (
            torch.from_numpy(values).to(device)
            for values in (relation.rows, relation.columns, relation.left_out_rows, relation.left_out_columns)
        )
        shares = relation.weights / relation.weights.sum()
        self.shares = torch.from_numpy(shares).to(device, dtype)
        """(num_positives,) the positives' weights, which sum to 1"""
        self.total = float(relation.weights.sum())

    def positives(self, block: slice) -> tuple[slice, Tensor, Tensor]:
        """Which of the positives have their query in the block, their rows in the block, and their columns."""
        own = _within(self._relation.rows, block)
        return own, self.rows[own] - block.start, self.columns[own]

    def fill(self, values: Tensor, block: slice, value: float) -> Tensor:
        """`values` (queries of the block, num_documents) with `value` at all entries that are no negatives."""
        own = _within(self._relation.left_out_rows, block)
        values[self._left_rows[own] - block.start, self._left_columns[own]] = value
        return values


def _within(rows: Numbers, block: slice) -> slice:
    """Which of the ascending `rows` are in the block."""
    return slice(*np.searchsorted(rows, [block.start, block.stop]).tolist())


def _blocks(num_queries: int, num_documents: int, block: int | None) -> Iterator[slice]:
    size = block or max(1, BLOCK_VALUES // num_documents)
    for start in range(0, num_queries, size):
        yield slice(start, min(start + size, num_queries))


def _infonce(
    queries: Tensor, documents: Tensor, entries: _Entries, settings: LossSettings, scale: Tensor, bias: Tensor
) -> LossGradients:
    """The bias cancels out."""
    blocks = list(_blocks(len(queries), len(documents), settings.block))
    found = _Sums(queries, documents, scale)
    of_rows, of_columns, positives = _log_sums(found, entries, blocks)
    row_excess, column_excess = of_rows[entries.rows] - positives, of_columns[entries.columns] - positives
    half = entries.shares / 2 if settings.symmetric else entries.shares
    row_part = half * torch.sigmoid(row_excess)
    column_part = half * torch.sigmoid(column_excess) if settings.symmetric else torch.zeros_like(half)
    loss = (half.double() * F.softplus(row_excess.double())).sum()
    if settings.symmetric:
        loss = loss + (half.double() * F.softplus(column_excess.double())).sum()
    row_factor = torch.zeros_like(of_rows).index_add(0, entries.rows, row_part)
    column_factor = torch.zeros_like(of_columns).index_add(0, entries.columns, column_part)
    of_rows, of_columns = (value.masked_fill(value == -torch.inf, 0) for value in (of_rows, of_columns))
    for block in blocks:
        own, rows, columns = entries.positives(block)
        values = entries.fill(found.similarities(block), block, -torch.inf)
        gradient = (values - of_rows[block, None]).exp_().mul_(row_factor[block, None])
        if settings.symmetric:
            gradient += values.sub_(of_columns).exp_().mul_(column_factor)
        gradient[rows, columns] = -(row_part + column_part)[own]
        found.add(block, gradient)
    return found.gradients(loss, torch.zeros((), dtype=torch.float64, device=queries.device))


def _log_sums(found: "_Sums", entries: _Entries, blocks: Sequence[slice]) -> tuple[Tensor, Tensor, Tensor]:
    """The logsumexp of the negatives of each query and of each document, -inf where there is none, and the similarity
    of each positive."""
    queries, documents = found.queries, found.documents
    of_rows = queries.new_empty(len(queries))
    of_columns = documents.new_full((len(documents),), -torch.inf)
    positives = queries.new_empty(len(entries.rows))
    for block in blocks:
        values = found.similarities(block)
        own, rows, columns = entries.positives(block)
        positives[own] = values[rows, columns]
        entries.fill(values, block, -torch.inf)
        of_rows[block] = values.logsumexp(1)
        of_columns = torch.logaddexp(of_columns, values.logsumexp(0))
    return of_rows, of_columns, positives


def _sigmoid(
    queries: Tensor, documents: Tensor, entries: _Entries, settings: LossSettings, scale: Tensor, bias: Tensor
) -> LossGradients:
    found = _Sums(queries, documents, scale)
    loss = of_bias = torch.zeros((), dtype=torch.float64, device=queries.device)
    for block in _blocks(len(queries), len(documents), settings.block):
        values = found.similarities(block) + bias
        own, rows, columns = entries.positives(block)
        positives = values[rows, columns]
        loss = loss + (entries.shares[own].double() * F.softplus(-positives.double())).sum()
        entries.fill(values, block, -torch.inf)
        loss = loss + F.softplus(values).sum(dtype=torch.float64) / entries.total
        gradient = values.sigmoid_().div_(entries.total)
        gradient[rows, columns] = -entries.shares[own] * torch.sigmoid(-positives)
        of_bias = of_bias + gradient.sum(dtype=torch.float64)
        found.add(block, gradient)
    return found.gradients(loss, of_bias)


class _Sums:
    """The gradients of the embeddings, summed over blocks of queries."""

    def __init__(self, queries: Tensor, documents: Tensor, scale: Tensor) -> None:
        """The embeddings, (num_queries, width) and (num_documents, width), with norm 1."""
        self.queries, self.documents, self._scale = queries, documents, scale
        self._of_queries, self._of_documents = torch.empty_like(queries), torch.zeros_like(documents)

    def similarities(self, block: slice) -> Tensor:
        """(queries of the block, num_documents)"""
        return (self.queries[block] * self._scale) @ self.documents.T

    def add(self, block: slice, gradient: Tensor) -> None:
        """`gradient` of the similarities, (queries of the block, num_documents)."""
        torch.mm(gradient, self.documents, out=self._of_queries[block])
        self._of_documents.addmm_(gradient.T, self.queries[block])

    def gradients(self, loss: Tensor, bias: Tensor) -> LossGradients:
        of_scale = torch.zeros((), dtype=torch.float64, device=loss.device)
        for start in range(0, len(self.queries), _DOUBLE_ROWS):
            rows = slice(start, start + _DOUBLE_ROWS)
            of_scale += (self._of_queries[rows].double() * self.queries[rows].double()).sum()
        of_queries, of_documents = self._of_queries.mul_(self._scale), self._of_documents.mul_(self._scale)
        return LossGradients(loss, of_queries, of_documents, of_scale, bias)
