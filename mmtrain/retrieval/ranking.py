"""The rank of every positive among the candidates, counted in blocks: no matrix of all scores is made."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from mmtrain.errors import NonFiniteError

Pairs = npt.NDArray[np.int64]
"""(num_pairs, 2) the positions of a query and of a candidate."""
TIE = 1e-6
"""Scores, which are cosines, that differ by no more count as equal: rounding in float32 makes such differences."""
_MAX_SCORES = 2**22
"""Scores computed at once."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """What the scores of all candidates say. Queries without a positive have no rank."""

    query: npt.NDArray[np.int64]
    """(num_pairs,) the query of each positive, in ascending order"""
    candidate: npt.NDArray[np.int64]
    """(num_pairs,) the positive"""
    rank: npt.NDArray[np.int64]
    """(num_pairs,) from 1; those of a query are in ascending order"""
    score: npt.NDArray[np.float64]
    """(num_pairs,) of each positive, in the order of `rank`"""
    wrong: npt.NDArray[np.int64]
    """(num_queries,) the candidate with the highest score that is not a positive, -1 where there is none"""
    wrong_score: npt.NDArray[np.float64]
    """(num_queries,) its score, -inf where there is none"""


def rank_positives(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    positives: Pairs,
    excluded: Pairs | None = None,
    max_scores: int = _MAX_SCORES,
) -> Ranking:
    """The ranks of `positives` by the product of `queries` (num_queries, dim) and `candidates` (num_candidates, dim).

    The rank of a positive is 1, plus the candidates of a score not below its own that are not positives, plus the
    query's positives of a higher score: a tie counts against the model. `excluded`: pairs that are neither right nor
    wrong. Scores are computed in float64, at most about `max_scores` at once. Raises NonFiniteError where an embedding
    is not finite.
    """
    queries, candidates = queries.double(), candidates.double()
    if not (torch.isfinite(queries).all() and torch.isfinite(candidates).all()):
        raise NonFiniteError("eval retrieval: an embedding is not a finite number; check the model's weights")
    device = queries.device
    score = (queries[positives[:, 0]] * candidates[positives[:, 1]]).sum(-1).cpu().numpy()
    order = np.lexsort((-score, positives[:, 0]))
    (query, candidate), score = positives[order].T, score[order]
    neutral = positives if excluded is None else np.concatenate([positives, excluded])
    num_wrong = torch.zeros(len(query), dtype=torch.int64, device=device)
    best = torch.full((len(queries),), -torch.inf, dtype=torch.float64, device=device)
    at = torch.full((len(queries),), -1, dtype=torch.int64, device=device)
    thresholds = torch.as_tensor(score, device=device) - TIE
    for rows, columns in _blocks(len(queries), len(candidates), max_scores):
        scores = queries[rows] @ candidates[columns].T  # (num_rows, num_columns)
        inside = neutral - (rows.start, columns.start)
        inside = inside[((inside >= 0) & (inside < scores.shape)).all(1)]
        scores[inside[:, 0], inside[:, 1]] = -torch.inf
        highest, where = scores.max(1)
        is_higher = highest > best[rows]
        at[rows] = torch.where(is_higher, where + columns.start, at[rows])
        best[rows] = torch.maximum(highest, best[rows])
        own = slice(*np.searchsorted(query, (rows.start, rows.stop)).tolist())
        for some in _slices(own, scores.shape[0]):
            of = torch.as_tensor(query[some] - rows.start, device=device)
            num_wrong[some] += (scores[of] >= thresholds[some, None]).sum(1)
    earlier = np.arange(len(query)) - np.searchsorted(query, query)
    rank = 1 + earlier + num_wrong.cpu().numpy()
    return Ranking(query, candidate, rank, score, at.cpu().numpy(), best.cpu().numpy())


def _blocks(num_rows: int, num_columns: int, max_scores: int) -> Iterator[tuple[slice, slice]]:
    """Rectangles of at most `max_scores` that cover all, the columns of a row one after another."""
    columns_at_once = min(num_columns, max(1, int(max_scores**0.5)))
    rows_at_once = max(1, max_scores // columns_at_once)
    for rows in _slices(slice(0, num_rows), rows_at_once):
        for columns in _slices(slice(0, num_columns), columns_at_once):
            yield rows, columns


def _slices(span: slice, size: int) -> Iterator[slice]:
    for start in range(span.start, span.stop, max(1, size)):
        yield slice(start, min(start + size, span.stop))
