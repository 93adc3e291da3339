"""The figures of `eval retrieval`: every number of the report, as plain data."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmtrain.contrastive.embedder import EncodedItem
from mmtrain.contrastive.relation import Numbers, Relation
from mmtrain.retrieval.item_content import ItemContent
from mmtrain.retrieval.metrics import chance, means, metrics_of
from mmtrain.retrieval.ranking import Pairs, Ranking, rank_positives
from mmtrain.scoring.scores import Floats

NUM_CONFUSED = 20
DIRECTIONS = {
    "image_to_text": "Texts for an image",
    "text_to_image": "Images for a text",
    "query_to_document": "Documents for a query",
    "document_to_query": "Queries for a document",
}
"""The titles of directions by their names."""


@dataclass(frozen=True, slots=True)
class Direction:
    """One way to search: what is searched for among which candidates. Items are given by number."""

    name: str
    queries: Numbers
    candidates: Numbers
    positives: Pairs
    excluded: Pairs
    """The positives, and the pairs that are neither right nor wrong."""

    @property
    def chance(self) -> dict[str, float]:
        """The metrics of candidates in random order."""
        num_positives, num_left_out = (
            np.bincount(pairs[:, 0], minlength=len(self.queries)) for pairs in (self.positives, self.excluded)
        )
        is_ranked = num_positives > 0
        num_candidates = len(self.candidates) - (num_left_out - num_positives)
        return chance(num_positives[is_ranked], num_candidates[is_ranked])

    def ranking(self, embeddings: torch.Tensor) -> Ranking:
        """`embeddings` (num_items, dim): a unit vector for each item."""
        return rank_positives(embeddings[self.queries], embeddings[self.candidates], self.positives, self.excluded)


def directions(items: Sequence[EncodedItem], relation: Relation) -> tuple[Direction, Direction]:
    """From queries to documents and back, named after what these are."""
    forward, back = _names(items, relation)
    positives = np.stack([relation.rows, relation.columns], axis=1)
    excluded = np.stack([relation.left_out_rows, relation.left_out_columns], axis=1)
    return (
        Direction(forward, relation.queries, relation.documents, positives, excluded),
        Direction(back, relation.documents, relation.queries, positives[:, ::-1], excluded[:, ::-1]),
    )


def _names(items: Sequence[EncodedItem], relation: Relation) -> tuple[str, str]:
    query, document = ({items[number].kind for number in own} for own in (relation.queries, relation.documents))
    if query == {"image"} and document == {"text"}:
        return "image_to_text", "text_to_image"
    if query == {"text"} and document == {"image"}:
        return "text_to_image", "image_to_text"
    return "query_to_document", "document_to_query"


def figures(
    content: ItemContent, ways: tuple[Direction, ...], embeddings: torch.Tensor, base: torch.Tensor | None = None
) -> dict[str, Any]:
    """By direction: the means of the metrics, their intervals, those of a random order, and the most confused pairs.

    `embeddings` (num_items, dim): a unit vector for each item; `base`: those of the base model. With them each
    direction also has the metrics of `base`, and of the paired differences `minus_base`.
    """
    return {way.name: _direction(content, way, embeddings, base) for way in ways}


def _direction(
    content: ItemContent, way: Direction, embeddings: torch.Tensor, base: torch.Tensor | None
) -> dict[str, Any]:
    ranking = way.ranking(embeddings)
    values = metrics_of(ranking)
    row = means(values) | {
        "chance": way.chance,
        "num_queries": len(values["mrr"]),
        "num_candidates": len(way.candidates),
        "most_confused": list(_confused(content, way, ranking)),
    }
    if base is not None:
        of_base = metrics_of(way.ranking(base))
        row |= {"base": means(of_base), "minus_base": means(_minus(values, of_base))}
    return row


def _minus(values: Mapping[str, Floats], others: Mapping[str, Floats]) -> dict[str, Floats]:
    return {name: values[name] - others[name] for name in values}


def _confused(content: ItemContent, way: Direction, ranking: Ranking) -> Iterator[dict[str, Any]]:
    """The queries whose best wrong candidate has the largest lead over their best positive, the largest first."""
    queries, starts = np.unique(ranking.query, return_index=True)
    lead = ranking.wrong_score[queries] - ranking.score[starts]
    for at in np.argsort(-lead, kind="stable")[:NUM_CONFUSED].tolist():
        if lead[at] <= 0:
            return
        query = int(queries[at])
        yield {
            "query": content.row(int(way.queries[query])),
            "right": content.row(int(way.candidates[ranking.candidate[starts[at]]])),
            "wrong": content.row(int(way.candidates[ranking.wrong[query]])),
            "right_score": float(ranking.score[starts[at]]),
            "wrong_score": float(ranking.wrong_score[query]),
            "rank": int(ranking.rank[starts[at]]),
        }
