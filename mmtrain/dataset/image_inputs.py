"""One image of a batch on its own: its pixels, or features of it that were computed before."""

import hashlib
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from mmtrain.encoding.encode import ImageSpan
from mmtrain.encoding.images import decode, read_bytes
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.records.chat import SampleError


@dataclass(frozen=True, slots=True)
class Features:
    """What a frozen vision tower and projector make of one picture, on the CPU."""

    tensors: dict[str, Tensor]
    inputs: dict[str, Tensor]
    """What the model takes beside them, such as the grid of patches."""
    num_placeholders: int

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.tensors.values(), *self.inputs.values()))


class ImageCache(Protocol):
    """Where features are looked for."""

    def find(self, key: str) -> Features | None: ...


@dataclass(frozen=True, slots=True)
class PictureInputs:
    """One picture of a batch, on its own: its features where they are kept, otherwise what they are made of."""

    key: str
    """The SHA-256 of its bytes."""
    num_placeholders: int
    inputs: dict[str, Tensor]
    """What the model takes for this picture alone; without its pixels where there are features."""
    features: Features | None

    @property
    def beside(self) -> dict[str, Tensor]:
        """What the model takes beside pixels or features, such as the grid of patches."""
        return {name: value for name, value in self.inputs.items() if not name.startswith("pixel")}


def picture_inputs(span: ImageSpan, ids: list[int], processor: ChatProcessor, cache: ImageCache) -> PictureInputs:
    """The picture of `span`, whose ids in the sample are `ids`: decoded only where its features are not kept.

    Its bytes are read once, so that key and pixels are of the same picture even while the file is written over.
    Raises SampleError where it does not decode or the processor lays it out otherwise than it was measured.
    """
    data = read_bytes(span.image)
    key = hashlib.sha256(data).hexdigest()
    found = cache.find(key)
    if found is not None:
        if found.num_placeholders != span.num_placeholders:
            raise SampleError(f"the image {span.image.name} changed while it was read")
        return PictureInputs(key, span.num_placeholders, found.inputs, found)
    inputs, laid_out = processor.image_inputs([decode(replace(span.image, source=data))])
    if laid_out != ids:
        raise SampleError(
            f"{len(ids)} tokens were laid out for {span.image.name} and the image processor makes {len(laid_out)}"
        )
    return PictureInputs(key, span.num_placeholders, inputs, None)
