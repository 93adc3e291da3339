"""The items of pairs: found and named by their content. Equal texts, or images with equal bytes, are one item."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmtrain.dataset.hashes import file_hashes
from mmtrain.encoding.images import FoundImage, find_image
from mmtrain.records.pairs import Item


@dataclass(frozen=True, slots=True)
class FoundItem:
    """An item with its images measured."""

    item: Item
    root: Path
    """The folder that the paths of its images are relative to."""
    images: tuple[FoundImage, ...]


def find_item(item: Item, root: Path) -> FoundItem:
    """Raises SampleError where an image is missing or cannot be read."""
    return FoundItem(item, root, tuple(find_image(image, root) for image in item.images))


def content_keys(items: Sequence[FoundItem]) -> list[str]:
    """The key of each item, in order. Images are hashed by their bytes, a file once per version. Raises OSError."""
    sources = [image.source for item in items for image in item.images]
    files = [source for source in dict.fromkeys(sources) if isinstance(source, Path)]
    of_file = dict(zip(files, file_hashes(files), strict=True))
    return [item.item.content_key([_hash(image.source, of_file) for image in item.images]) for item in items]


def _hash(source: Path | bytes, of_file: dict[Path, str]) -> str:
    return of_file[source] if isinstance(source, Path) else hashlib.sha256(source).hexdigest()
