"""What a frozen vision tower makes of pictures, kept: in memory, and on disk beyond it.

Kept is what comes first, and nothing in memory makes way. Every epoch comes by every picture once, in another order:
where half of them fit, throwing out the least recently used would find 15 % again, this finds half.
"""

import threading

from mmtrain.dataset.image_inputs import Features
from mmtrain.model.image_cache.files import FeatureFolder


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

    @property
    def is_on_disk(self) -> bool:
        """Whether what is kept is also written to files."""
        return self._folder is not None and self._folder.is_writing

    def wants(self, num_bytes: int) -> bool:
        """Whether there is room for features of this size."""
        return num_bytes <= self._room or self.is_on_disk

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
