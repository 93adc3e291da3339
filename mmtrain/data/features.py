"""What a frozen vision tower makes of pictures, kept: in memory, and on disk beyond it.

Kept is what comes first, and nothing in memory makes way. Every epoch comes by every picture once, in another order:
where half of them fit, throwing out the least recently used would find 15 % again, this finds half.
"""

import hashlib
import threading
from dataclasses import dataclass, replace

from torch import Tensor

from mmtrain.data.chat import SampleError
from mmtrain.data.encode import ImageSpan
from mmtrain.data.feature_files import FeatureFolder, Features
from mmtrain.data.images import decode, read_bytes
from mmtrain.data.processor import ChatProcessor


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


class FeatureStore:
    """Features by the SHA-256 of the picture, for one model. Threads may share it."""

    def __init__(self, memory_bytes: float, folder: FeatureFolder | None = None) -> None:
        self._room = memory_bytes
        self._folder = folder
        self._kept: dict[str, Features] = {}
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """What is held in memory."""
        return sum(features.num_bytes for features in self._kept.values())

    def find(self, key: str) -> Features | None:
        found = self._kept.get(key)
        if found is None and self._folder is not None:
            found = self._folder.read(key)
            if found is not None:
                self._remember(key, found)
        return found

    def keep(self, key: str, features: Features) -> None:
        """Keep them where there is room. What cannot be written is not kept on disk, and no fault."""
        self._remember(key, features)
        if self._folder is not None:
            self._folder.write(key, features)

    def _remember(self, key: str, features: Features) -> None:
        with self._lock:
            if key not in self._kept and features.num_bytes <= self._room:
                self._kept[key] = features
                self._room -= features.num_bytes


def picture_inputs(span: ImageSpan, ids: list[int], processor: ChatProcessor, store: FeatureStore) -> PictureInputs:
    """The picture of `span`, whose ids in the sample are `ids`: decoded only where its features are not kept.

    Its bytes are read once, so that key and pixels are of the same picture even while the file is written over.
    Raises SampleError where it does not decode or the processor lays it out otherwise than it was measured.
    """
    data = read_bytes(span.picture)
    key = hashlib.sha256(data).hexdigest()
    found = store.find(key)
    if found is not None:
        if found.num_placeholders != span.num_placeholders:
            raise SampleError(f"the image {span.picture.name} changed while it was read")
        return PictureInputs(key, span.num_placeholders, found.inputs, found)
    inputs, laid_out = processor.image_inputs([decode(replace(span.picture, source=data))])
    if laid_out != ids:
        raise SampleError(
            f"{len(ids)} tokens were laid out for {span.picture.name} and the image processor makes {len(laid_out)}"
        )
    return PictureInputs(key, span.num_placeholders, inputs, None)
