"""The embeddings of items that no trained weight changes."""

from collections.abc import Sequence

from torch import Tensor

from mmtrain.contrastive.embedder import EncodedItem
from mmtrain.contrastive.relation import Numbers


class EmbeddingCache:
    """The embeddings of kinds that nothing trained changes, by item number; the same in every process.

    The first ones stay, none is replaced: every epoch needs each item once.
    """

    def __init__(self, kinds: frozenset[str], max_bytes: float) -> None:
        self.kinds, self._room = kinds, max_bytes
        self._kept: dict[int, Tensor] = {}

    def __contains__(self, number: int) -> bool:
        return number in self._kept

    def complete(self, numbers: Numbers, values: Tensor, items: Sequence[EncodedItem]) -> Tensor:
        """`values` (num_items, width) with the rows of the cached items; the others of its kinds are added."""
        if not self.kinds:
            return values
        for row, number in enumerate(numbers.tolist()):
            if number in self._kept:
                values[row] = self._kept[number]
            elif items[number].kind in self.kinds and values[row].nbytes <= self._room:
                self._kept[number] = values[row].clone()
                self._room -= values[row].nbytes
        return values
