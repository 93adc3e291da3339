"""The items of pairs named by their content: equal texts, or images with equal bytes, are one item."""

from collections.abc import Sequence

from mmtrain.dataset.hashes import image_hashes
from mmtrain.encoding.images import Roots, find_image
from mmtrain.records.pairs import Item


def item_keys(items: Sequence[tuple[Item, Roots]]) -> list[str]:
    """The key of each item; the roots are where its images are.

    Images are hashed by the bytes of their files, once per version of a file. Raises SampleError where an image cannot
    be read.
    """
    sources = [[find_image(image, roots).source for image in item.images] for item, roots in items]
    hash_of = image_hashes(source for own in sources for source in own)
    return [item.content_key([hash_of[one] for one in own]) for (item, _), own in zip(items, sources, strict=True)]
