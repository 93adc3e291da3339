"""Which items of a step are queries and documents, and which documents are positives of which queries."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PairItems:
    """A pair, its items given by number: equal content has one number in the whole data set."""

    query: int
    positives: tuple[int, ...]
    negatives: tuple[int, ...] = ()
    group: str | None = None
    """The positives of a group are not negatives of any query of that group."""

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of all its items, the query first."""
        return (self.query, *self.positives, *self.negatives)

    def renumbered(self, new: Mapping[int, int]) -> "PairItems":
        """The same with the `new` number of each item."""
        positives, negatives = (tuple(new[number] for number in own) for own in (self.positives, self.negatives))
        return PairItems(new[self.query], positives, negatives, self.group)


@dataclass(frozen=True, slots=True)
class Relation:
    """The distinct items of a step, and what they are to each other. A document that is neither a positive of a query
    nor left out is its negative."""

    queries: Numbers
    """(num_queries,) item numbers, ascending"""
    documents: Numbers
    """(num_documents,) item numbers, ascending"""
    rows: Numbers
    """(num_positives,) positions in `queries`, ascending"""
    columns: Numbers
    """(num_positives,) positions in `documents`"""
    weights: npt.NDArray[np.float64]
    """(num_positives,) shares of the samples: a sample with k positives gives each 1 / k"""
    left_out_rows: Numbers
    """(num_left_out,) positions in `queries`, ascending, of documents that are not negatives: positives, the query
    itself, and positives of its group"""
    left_out_columns: Numbers
    """(num_left_out,) positions in `documents`"""

    @property
    def num_negatives(self) -> int:
        return len(self.queries) * len(self.documents) - len(self.left_out_rows)


def relate(pairs: Sequence[PairItems]) -> Relation:
    """The relation of a step's pairs. Whatever is equal in them is one item, so it cannot be its own negative."""
    of_group: dict[str, set[int]] = defaultdict(set)
    weights: dict[tuple[int, int], float] = defaultdict(float)
    for pair in pairs:
        for document in set(pair.positives):
            weights[pair.query, document] += 1 / len(set(pair.positives))
        if pair.group is not None:
            of_group[pair.group].update(pair.positives)
    same = {(pair.query, document) for pair in pairs if pair.group is not None for document in of_group[pair.group]}
    queries = np.unique([pair.query for pair in pairs])
    documents = np.unique([number for pair in pairs for number in (*pair.positives, *pair.negatives)])
    positive = _sorted(list(weights))
    own = np.intersect1d(queries, documents)
    left_out = _sorted({*weights, *same, *((number, number) for number in own.tolist())})
    return Relation(
        queries,
        documents,
        np.searchsorted(queries, positive[:, 0]),
        np.searchsorted(documents, positive[:, 1]),
        np.array([weights[query, document] for query, document in positive.tolist()]),
        np.searchsorted(queries, left_out[:, 0]),
        np.searchsorted(documents, left_out[:, 1]),
    )


def _sorted(entries: Sequence[tuple[int, int]] | set[tuple[int, int]]) -> Numbers:
    return np.array(sorted(entries), np.int64).reshape(-1, 2)
