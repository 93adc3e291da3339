"""What training and retrieval need of a model that embeds items."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mmtrain.contrastive.scale import Multiplier
from mmtrain.dataset.batch import Batch
from mmtrain.encoding.encode import Encoded
from mmtrain.errors import UserError
from mmtrain.model.components import Components
from mmtrain.records.chat import SampleError
from mmtrain.records.pairs import Item

Kind = str
"""Which of a model's computations embeds an item; only items of one kind share a micro-batch."""


@dataclass(frozen=True, slots=True)
class EncodedItem:
    """An item as the model gets it."""

    key: str
    """The hash of its content."""
    kind: Kind
    encoded: Encoded
    """Its ids and images; none of its tokens is supervised."""
    cost: float
    """Multiplications that its embedding takes."""

    @property
    def seed(self) -> int:
        """What dropout depends on in the place of a sample's index: equal content drops the same."""
        return int(self.key[:15], 16)

    @property
    def num_tokens(self) -> int:
        return self.encoded.num_tokens


class Embedder(Protocol):
    """A model that turns items into vectors of `width` values, which are not normalized."""

    model: Any
    """The model of transformers, or a PeftModel around it."""
    components: Components
    width: int
    scale: Multiplier
    bias: Multiplier

    def encode(self, items: Sequence[tuple[Item, Path, str]]) -> list[EncodedItem | SampleError]:
        """Each item, whose images are relative to the path and whose content has the key, or why it has no
        embedding."""
        ...

    def batch(self, items: Sequence[EncodedItem]) -> Batch:
        """Items of one kind as tensors on the CPU. Raises SampleError where an image does not decode."""
        ...

    def embed(self, batch: Batch, kind: Kind) -> Tensor:
        """(num_items, width) float32"""
        ...

    def is_frozen(self, kind: Kind) -> bool:
        """Whether no trainable weight changes the embeddings of this kind."""
        ...


def no_labels(ids: Sequence[int]) -> npt.NDArray[np.bool_]:
    """(num_tokens,) Nothing is predicted of an item."""
    return np.zeros(len(ids), np.bool_)


def check_dims(dims: Sequence[int], width: int) -> None:
    """Raises UserError where an embedding cannot be cut to one of `dims`."""
    if dims and max(dims) > width:
        raise UserError(f"objective.dims: {max(dims)} is more than the {width} values of the model's embeddings")
