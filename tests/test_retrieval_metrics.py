"""Retrieval metrics equal a brute force that sorts all candidates of one query after another."""

import itertools
import math

import numpy as np
import pytest
import torch

from mmtrain.errors import NonFiniteError
from mmtrain.retrieval.metrics import NAMES, chance, means, metrics_of
from mmtrain.retrieval.ranking import Ranking, rank_positives


def brute_force(
    queries: torch.Tensor, candidates: torch.Tensor, positives: set[tuple[int, int]], excluded: set[tuple[int, int]]
) -> dict[str, list[float]]:
    """Sort the candidates of each query, wrong ones first among those of equal scores, and read the list."""
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for q, query in enumerate(queries.tolist()):
        of_query = [c for c in range(len(candidates)) if (q, c) in positives]
        if not of_query:
            continue
        scored = []
        for c, candidate in enumerate(candidates.tolist()):
            if (q, c) in positives or (q, c) not in excluded:
                score = math.fsum(a * b for a, b in zip(query, candidate, strict=True))
                scored.append((-round(score, 9), (q, c) in positives))
        hits = [is_right for _, is_right in sorted(scored)]
        first = hits.index(True) + 1
        for k in (1, 5, 10):
            found[f"recall@{k}"].append(float(any(hits[:k])))
        found["mrr"].append(1 / first)
        gain = sum(1 / math.log2(place + 1) for place, hit in enumerate(hits[:10], start=1) if hit)
        best = sum(1 / math.log2(place + 1) for place in range(1, min(10, len(of_query)) + 1))
        found["ndcg@10"].append(gain / best)
    return found


def random_set(seed: int, num: int, values: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, np.ndarray]:
    """Embeddings of few whole values, so that many scores are equal, and random positives and excluded pairs."""
    rng = np.random.default_rng(seed)
    queries, candidates = (torch.tensor(rng.integers(-values, values + 1, size=(n, 4))).float() for n in (num, num + 9))
    drawn = rng.permutation([(q, c) for q in range(num) for c in range(num + 9)])[: 4 * num]
    return queries, candidates, drawn[: 2 * num], drawn[2 * num :]


@pytest.mark.parametrize("max_scores", [1, 50, 10**6])
@pytest.mark.parametrize(("seed", "values"), [(0, 1), (1, 2), (2, 1000)])
def test_metrics_equal_brute_force(seed: int, values: int, max_scores: int) -> None:
    queries, candidates, positives, excluded = random_set(seed, 25, values)
    found = metrics_of(rank_positives(queries, candidates, positives, excluded, max_scores))
    expected = brute_force(
        queries, candidates, {tuple(pair) for pair in positives.tolist()}, {tuple(pair) for pair in excluded.tolist()}
    )
    assert 0 < len(expected["mrr"]) < 25  # some queries have no positive
    for name in NAMES:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-15, atol=0, err_msg=name)


def test_unit_vectors_equal_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, candidates = (
        torch.nn.functional.normalize(torch.randn(60, 16, generator=generator), dim=-1) for _ in range(2)
    )
    positives = np.stack([np.arange(60), np.arange(60)], axis=1)
    found = metrics_of(rank_positives(queries, candidates, positives, max_scores=500))
    expected = brute_force(queries, candidates, {(i, i) for i in range(60)}, set())
    for name in NAMES:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-15, atol=0, err_msg=name)


def test_ties_count_against_the_model() -> None:
    """A model that gives everything the same embedding finds nothing."""
    same = torch.nn.functional.normalize(torch.full((40, 7), 0.3), dim=-1)
    positives = np.stack([np.arange(40), np.arange(40)], axis=1)
    ranking = rank_positives(same, same, positives, max_scores=64)
    assert ranking.rank.tolist() == [40] * 40
    nearly = same + 1e-8 * torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    assert rank_positives(nearly, same, positives).rank.tolist() == [40] * 40


def test_the_best_wrong_candidate_is_found() -> None:
    queries, candidates, positives, excluded = random_set(3, 20, 1000)
    ranking = rank_positives(queries, candidates, positives, excluded, 30)
    scores = queries.double().numpy() @ candidates.double().numpy().T
    scores[positives[:, 0], positives[:, 1]] = -np.inf
    scores[excluded[:, 0], excluded[:, 1]] = -np.inf
    assert ranking.wrong.tolist() == scores.argmax(1).tolist()
    assert ranking.wrong_score.tolist() == scores.max(1).tolist()
    all_scores = queries.double().numpy() @ candidates.double().numpy().T
    assert ranking.score.tolist() == all_scores[ranking.query, ranking.candidate].tolist()


def test_a_query_that_only_has_positives() -> None:
    ranking = rank_positives(torch.eye(2), torch.eye(2), np.array([[0, 0], [0, 1]]))
    assert ranking.rank.tolist() == [1, 2]
    assert ranking.wrong.tolist() == [-1, 1]
    assert metrics_of(ranking)["ndcg@10"].tolist() == [1.0]


def test_more_positives_than_the_depth_can_be_perfect() -> None:
    positives = np.array([[0, c] for c in range(12)])
    ranking = rank_positives(torch.ones(1, 1), torch.ones(12, 1), positives)
    assert metrics_of(ranking)["ndcg@10"].tolist() == [1.0]


def test_embeddings_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NonFiniteError, match="eval retrieval: an embedding is not a finite number"):
        rank_positives(torch.tensor([[math.nan]]), torch.ones(1, 1), np.array([[0, 0]]))


@pytest.mark.parametrize(("num_positives", "num_candidates"), [(1, 1), (1, 7), (3, 7), (7, 7), (2, 12), (11, 12)])
def test_chance_is_the_mean_over_all_orders(num_positives: int, num_candidates: int) -> None:
    sums = dict.fromkeys(NAMES, 0.0)
    places = list(itertools.combinations(range(num_candidates), num_positives))
    for right in places:
        scores = torch.arange(num_candidates, 0, -1).float()[:, None]
        for name, (value,) in brute_force(torch.ones(1, 1), scores, {(0, c) for c in right}, set()).items():
            sums[name] += value
    found = chance(np.array([num_positives]), np.array([num_candidates]))
    assert found == pytest.approx({name: total / len(places) for name, total in sums.items()}, rel=1e-12)


def test_chance_is_averaged_over_queries() -> None:
    found = chance(np.array([1, 1, 2]), np.array([4, 8, 8]))
    assert found["recall@1"] == pytest.approx((1 / 4 + 1 / 8 + 2 / 8) / 3)


def test_intervals_are_the_percentiles_of_resampled_queries() -> None:
    rank = np.array([1, 1, 2, 7, 30] * 10)
    ranking = Ranking(np.arange(50), np.arange(50), rank, np.zeros(50), np.zeros(50, np.int64), np.zeros(50))
    found = means(metrics_of(ranking))
    assert found["recall@1"] == pytest.approx(0.4)
    assert found["mrr"] == pytest.approx((1 + 1 + 1 / 2 + 1 / 7 + 1 / 30) / 5)
    rng = np.random.default_rng(5)
    drawn = (rank <= 1)[rng.integers(50, size=(4000, 50))].mean(1)
    assert found["interval"]["recall@1"] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.025)
