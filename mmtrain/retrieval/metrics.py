"""Retrieval metrics of each query, and their means with 95 % intervals by the bootstrap over queries.

- `recall@k`: whether at least one positive is among the first k (Karpathy and Fei-Fei, Deep Visual-Semantic Alignments,
  2015, section 4.2): the share of queries for which one is.
- `mrr`: 1 / the rank of the first positive (Voorhees, TREC-8 Question Answering Track, 1999).
- `ndcg@10`: the sum over the positives among the first 10 of 1 / log2(1 + rank), divided by the largest sum that the
  number of positives allows (Järvelin and Kekäläinen, Cumulated Gain-Based Evaluation of IR Techniques, 2002).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmtrain.retrieval.ranking import Ranking
from mmtrain.scoring.scores import Floats, Ints
from mmtrain.scoring.statistics import mean_by_sample

RECALLS = (1, 5, 10)
_DEPTH = 10
NAMES = (*(f"recall@{k}" for k in RECALLS), "mrr", f"ndcg@{_DEPTH}")


def metrics_of(ranking: Ranking) -> dict[str, Floats]:
    """The metrics of each query that has a positive, in order; each array is (num_ranked,)."""
    starts = np.flatnonzero(np.diff(ranking.query, prepend=-1))
    first = ranking.rank[starts]
    number = np.arange(len(ranking.query)) - np.repeat(starts, np.diff(starts, append=len(ranking.query)))
    gains = np.where(ranking.rank <= _DEPTH, 1 / np.log2(1 + ranking.rank), 0.0)
    ideal = np.where(number < _DEPTH, 1 / np.log2(2 + number), 0.0)
    return {
        **{f"recall@{k}": (first <= k).astype(np.float64) for k in RECALLS},
        "mrr": 1 / first,
        "ndcg@10": np.add.reduceat(gains, starts) / np.add.reduceat(ideal, starts),
    }


def chance(num_positives: Ints, num_candidates: Ints) -> dict[str, float]:
    """The metrics that a random order of the candidates gives on average; both arrays are (num_ranked,).

    With P positives among N candidates, none is among the first k with the probability C(N-P, k) / C(N, k), and each
    place has one with P / N.
    """
    kinds, counts = np.unique(np.stack([num_positives, num_candidates], axis=1), axis=0, return_counts=True)
    expected = np.array([_expected(int(p), int(n)) for p, n in kinds])
    return dict(zip(NAMES, np.average(expected, axis=0, weights=counts).tolist(), strict=True))


def _expected(num_positives: int, num_candidates: int) -> list[float]:
    """In the order of `NAMES`."""
    place = np.arange(1, num_candidates - num_positives + 2)  # the first positive can be at any of these
    left = num_candidates - place + 1
    none_before = np.cumprod([1.0, *((left - num_positives) / left)])  # (places + 1,) no positive up to there
    recalls = [1 - none_before[min(k, len(place))] for k in RECALLS]
    discounts = 1 / np.log2(1 + np.arange(1, _DEPTH + 1))
    gain = num_positives / num_candidates * discounts[:num_candidates].sum()
    return [*recalls, float((-np.diff(none_before) / place).sum()), gain / discounts[:num_positives].sum()]


def means(values: Mapping[str, Floats]) -> dict[str, Any]:
    """The mean of each metric, and under `interval` its 95 % interval [low, high] by the bootstrap over queries.

    Where the values are differences of two models on the same queries the interval is paired.
    """
    found = {name: mean_by_sample(np.arange(len(of_query)), of_query) for name, of_query in values.items()}
    return {name: mean for name, (mean, _) in found.items()} | {
        "interval": {name: list(interval) for name, (_, interval) in found.items()}
    }
