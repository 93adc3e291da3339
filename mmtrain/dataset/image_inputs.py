"""One image of a batch on its own: its pixels, or features of it that were computed before."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from mmtrain.dataset.image_loader import ImageLoader
from mmtrain.encoding.encode import ImageSpan
from mmtrain.encoding.images import read_bytes
from mmtrain.records.chat import SampleError


@dataclass(frozen=True, slots=True)
class Features:
    """The output of a frozen vision tower and projector for one image, on the CPU."""

    tensors: dict[str, Tensor]
    inputs: dict[str, Tensor]
    """The model's other inputs for the image, such as the grid of patches."""
    num_placeholders: int

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.tensors.values(), *self.inputs.values()))


class FeatureCache(Protocol):
    """Stored features by the SHA-256 of the image."""

    def find(self, key: str) -> Features | None: ...


@dataclass(frozen=True, slots=True)
class ImageInputs:
    """One image of a batch: its cached features, or the pixels that they are computed from."""

    key: str
    """The SHA-256 of its bytes."""
    num_placeholders: int
    inputs: dict[str, Tensor]
    """The model's inputs for this image alone; without its pixels where there are features."""
    features: Features | None

    @property
    def other_inputs(self) -> dict[str, Tensor]:
        """The inputs other than pixels, such as the grid of patches."""
        return {name: value for name, value in self.inputs.items() if not name.startswith("pixel")}

    def pinned(self) -> "ImageInputs":
        """The same in page-locked memory."""
        features = None if self.features is None else replace(self.features, tensors=all_pinned(self.features.tensors))
        return replace(self, inputs=all_pinned(self.inputs), features=features)


def all_pinned(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with every tensor among them in page-locked memory, from which a GPU copies while others work."""
    return {name: value.pin_memory() if isinstance(value, Tensor) else value for name, value in values.items()}


def load_image_inputs(span: ImageSpan, ids: list[int], load_images: ImageLoader, cache: FeatureCache) -> ImageInputs:
    """The image of `span`, whose ids in the sample are `ids`; decoded only where its features are not in `cache`.

    Its bytes are read once, so that key and pixels are of the same image even if the file is overwritten meanwhile.
    Raises SampleError where it does not decode, or the processor makes other ids for it than when it was encoded.
    """
    data = read_bytes(span.image)
    key = hashlib.sha256(data).hexdigest()
    found = cache.find(key)
    if found is not None:
        if found.num_placeholders != span.num_placeholders:
            raise SampleError(f"the image {span.image.name} changed while it was read")
        return ImageInputs(key, span.num_placeholders, found.inputs, found)
    inputs, laid_out = load_images([[replace(span.image, source=data)]])
    check_laid_out([span], ids, laid_out)
    return ImageInputs(key, span.num_placeholders, inputs, None)


def check_laid_out(spans: Sequence[ImageSpan], ids: list[int], laid_out: list[int]) -> None:
    """Raises SampleError where the processor makes other ids for images than those of their `spans` in the sample."""
    if laid_out != ids:
        names = ", ".join(span.image.name for span in spans)
        raise SampleError(f"{len(ids)} tokens were laid out for {names} and the image processor makes {len(laid_out)}")
