"""The items of pairs named by their content: equal texts, or images with equal bytes, are one item."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from mmtrain.dataset.hashes import file_hashes
from mmtrain.encoding.images import Roots, find_image
from mmtrain.records.pairs import Item


def content_keys(items: Sequence[tuple[Item, Roots]]) -> list[str]:
    """The key of each item; the roots are where its images are.

    Images are hashed by the bytes of their files, once per version of a file. Raises SampleError where an image cannot
    be read.
    """
    sources = [[find_image(image, roots).source for image in item.images] for item, roots in items]
    files = list(dict.fromkeys(source for own in sources for source in own if isinstance(source, Path)))
    hash_of = dict(zip(files, file_hashes(files), strict=True))
    keys = []
    for (item, _), own in zip(items, sources, strict=True):
        hashes = [hash_of[one] if isinstance(one, Path) else hashlib.sha256(one).hexdigest() for one in own]
        keys.append(item.content_key(hashes))
    return keys
