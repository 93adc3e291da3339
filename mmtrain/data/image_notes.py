"""Notes on images of which the model sees much less than the file holds."""

from collections.abc import Iterator, Sequence

from mmtrain.data.findings import CROPPED, LARGE, Finding
from mmtrain.data.processor import ChatProcessor

_LARGER, _OTHER_SHAPE = 4.0, 0.15


def image_notes(sizes: Sequence[tuple[int, int]], processor: ChatProcessor) -> Iterator[Finding]:
    """`sizes` are (width, height) of a sample's images in order."""
    for number, (width, height) in enumerate(sizes, start=1):
        tokens = processor.image_tokens((width, height))
        if len(tokens.ids) != tokens.num_placeholders:
            continue  # cut into tiles: the size of one tells nothing about the picture
        used_width, used_height = tokens.used_size
        reason = f"image {number}: {width}x{height}, used as {used_width}x{used_height}"
        if width * height > _LARGER * used_width * used_height:
            yield Finding(LARGE, False, reason)
        shape = (width / height) / (used_width / used_height)
        if max(shape, 1 / shape) > 1 + _OTHER_SHAPE:
            yield Finding(CROPPED, False, reason)
