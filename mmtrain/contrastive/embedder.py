"""What training and retrieval need of a model that embeds items."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mmtrain.contrastive.scale import Multiplier
from mmtrain.dataset.batch import Batch
from mmtrain.dataset.validate import LengthLimit
from mmtrain.encoding.encode import Encoded
from mmtrain.encoding.images import Roots
from mmtrain.errors import UserError
from mmtrain.model.components import Components
from mmtrain.model.family import Family
from mmtrain.records.chat import SampleError
from mmtrain.records.pairs import Item

Kind = str
"""Which of a model's computations embeds an item; only items of one kind share a micro-batch."""


Limit = Callable[[int], LengthLimit]
"""The longest item: so many tokens, or fewer if the model takes fewer."""


@dataclass(frozen=True, slots=True)
class EncodedItem:
    """An item as the model gets it."""

    kind: Kind
    encoded: Encoded
    """Its ids and images; none of its tokens is supervised."""
    row_tokens: int
    """Tokens of its row in a micro-batch, with the padding that its model needs."""
    text_cost: float
    """Multiplications by the weights of the text tower or the language model."""
    image_cost: float
    """The same in the vision tower and the projector."""
    key: str = ""
    """The hash of its content."""

    @property
    def seed(self) -> int:
        """What dropout depends on in the place of a sample's index: equal content drops the same."""
        return int(self.key[:15], 16)


@dataclass(frozen=True, slots=True)
class Passes:
    """How often an item goes through the weights: 1 forward, 2 more backward, 0 where what they give is cached."""

    text: float
    image: float

    def cost(self, item: EncodedItem) -> float:
        """Multiplications."""
        return self.text * item.text_cost + self.image * item.image_cost


@dataclass(frozen=True, slots=True)
class SentenceModules:
    """How sentence-transformers computes the embeddings of a model of transformers."""

    task: Literal["feature-extraction", "text-generation", "any-to-any"]
    """Stands for the class that loads the model: AutoModel, AutoModelForCausalLM or AutoModelForMultimodalLM."""
    methods: Mapping[str, Mapping[str, Any]]
    """By kind of input, the `method` of the model, and in `method_output_name` what is taken of its output."""
    processing: Mapping[str, Mapping[str, Any]]
    """Arguments for the processor."""
    pooling: Literal["lasttoken", "mean"] | None
    """How one vector is made of those of the tokens; None where the output has one vector."""


class Embedder(Protocol):
    """A model that turns items into vectors of `width` values, which are not normalized."""

    model: Any
    """The model of transformers, or a PeftModel around it."""
    width: int
    scale: Multiplier
    bias: Multiplier
    packing: bool
    """The items of a micro-batch share one row."""
    alone: bool
    """A micro-batch has one item."""

    @property
    def kinds(self) -> tuple[Kind, ...]: ...

    @property
    def symmetric(self) -> bool:
        """Whether documents also choose among queries, where the config does not say."""

    @property
    def family(self) -> Family: ...

    @property
    def components(self) -> Components: ...

    @property
    def processor(self) -> Any:
        """Of the model."""

    @property
    def template(self) -> str | None:
        """The source of the chat template, if there is one."""

    @property
    def description(self) -> str:
        """How items are embedded, in one line."""

    def encode(self, items: Sequence[tuple[Item, Roots]]) -> list[EncodedItem | SampleError]:
        """Each item, whose images are at the roots, or why it has no embedding; `key` is left empty."""
        ...

    @property
    def limit(self) -> Limit: ...

    @property
    def caches_images(self) -> bool:
        """Whether the outputs of its frozen vision tower and projector come from the image cache."""

    def batch(self, items: Sequence[EncodedItem]) -> Batch:
        """Items of one kind as tensors on the CPU. Raises SampleError where an image does not decode."""
        ...

    def leave_out_rows(self) -> None:
        """Compute no rows of the last layer that no embedding depends on. After kernels are installed."""

    def embed(self, batch: Batch, kind: Kind) -> Tensor:
        """(num_items, width) float32"""
        ...

    @property
    def sentence_modules(self) -> SentenceModules:
        """How sentence-transformers computes the same embeddings."""

    def is_frozen(self, kind: Kind) -> bool:
        """Whether no trainable weight changes the embeddings of this kind."""
        ...


def no_labels(num_tokens: int) -> npt.NDArray[np.bool_]:
    """(num_tokens,) Nothing is predicted of an item."""
    return np.zeros(num_tokens, np.bool_)


def check_dims(dims: Sequence[int], width: int) -> None:
    """Raises UserError where an embedding cannot be cut to one of `dims`."""
    if dims and max(dims) > width:
        raise UserError(f"objective.dims: {max(dims)} is more than the {width} values of the model's embeddings")
