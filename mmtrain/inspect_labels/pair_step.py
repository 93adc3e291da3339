"""A step of contrastive training as a person reads it: what each query is compared with, and as what."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mmtrain.contrastive.pair_samples import PairSamples
from mmtrain.contrastive.relation import Relation, relate
from mmtrain.retrieval.item_content import ItemContent

Cell = Literal["positive", "negative", "neither"]
CELLS: tuple[Cell, ...] = ("negative", "positive", "neither")


@dataclass(frozen=True)
class PairStep:
    """The samples of one step, their distinct items, and the cell of every query and document."""

    number: int
    samples: PairSamples
    indices: tuple[int, ...]

    @cached_property
    def relation(self) -> Relation:
        return relate([self.samples.pairs[index] for index in self.indices])

    @cached_property
    def content(self) -> ItemContent:
        return ItemContent.of(self.samples, self.indices)

    @cached_property
    def cells(self) -> npt.NDArray[np.int8]:
        """(num_queries, num_documents) positions in `CELLS`"""
        found = np.zeros((len(self.relation.queries), len(self.relation.documents)), np.int8)
        found[self.relation.left_out_rows, self.relation.left_out_columns] = CELLS.index("neither")
        found[self.relation.rows, self.relation.columns] = CELLS.index("positive")
        return found

    def count(self, cell: Cell) -> int:
        return int((self.cells == CELLS.index(cell)).sum())

    def documents_of(self, row: int, cell: Cell) -> list[int]:
        """Positions in `relation.documents` of those that are `cell` for the query in this row."""
        return np.flatnonzero(self.cells[row] == CELLS.index(cell)).tolist()

    @property
    def num_without_negative(self) -> int:
        """Queries that are compared with nothing."""
        return int((self.cells != CELLS.index("negative")).all(1).sum())

    def rows_of(self, index: int) -> list[int]:
        """The row of a sample's query."""
        return np.flatnonzero(self.relation.queries == self.samples.pairs[index].query).tolist()

    def places(self, number: int) -> list[str]:
        """The places of all samples of the step that have an item."""
        return [str(self.samples.place(index)) for index in self._having[number]]

    @cached_property
    def _having(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for index in self.indices:
            pair = self.samples.pairs[index]
            for number in dict.fromkeys(pair.numbers):
                found.setdefault(number, []).append(index)
        return found

    def row(self, at: int) -> dict[str, Any]:
        """A query as one JSON object."""
        documents = self.relation.documents
        return {
            "step": self.number,
            "query": self._item(int(self.relation.queries[at])),
            "positives": [self._item(int(documents[one])) for one in self.documents_of(at, "positive")],
            "neither": [self._item(int(documents[one])) for one in self.documents_of(at, "neither")],
            "num_negatives": len(self.documents_of(at, "negative")),
        }

    def _item(self, number: int) -> dict[str, Any]:
        return self.content.row(number) | {"places": self.places(number)}


def columns_shown(step: PairStep, rows: Sequence[int], most: int) -> list[int]:
    """Positions of at most `most` documents: those that are not negatives of these queries, then the first others."""
    linked = {one for row in rows for cell in ("positive", "neither") for one in step.documents_of(row, cell)}
    others = (one for one in range(len(step.relation.documents)) if one not in linked)
    return sorted([*sorted(linked), *others][:most])


def summary_lines(step: PairStep) -> Iterator[str]:
    """What the step is, in a few lines."""
    queries, documents = step.cells.shape
    yield f"Step {step.number:,}: {len(step.indices):,} pairs, {queries:,} distinct queries, {documents:,} documents"
    counts = (step.count(cell) for cell in ("positive", "negative", "neither"))
    yield "{:,} positives, {:,} negatives, {:,} neither".format(*counts)
    if step.num_without_negative:
        yield f"{step.num_without_negative:,} queries have no negative: they do not change the model"
