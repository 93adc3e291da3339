"""The pixels of an image as the vision encoder sees them."""

import math
from collections.abc import Callable

import numpy as np
import PIL.Image

from mmtrain.encoding.images import decode
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.inspect_labels.view import ImageView

Pixels = Callable[[ImageView], PIL.Image.Image]


def seen_pixels(processor: ChatProcessor) -> Pixels:
    """A function from an image to its pixels as used, cropped and padded as the processor does.

    Where the processor gives patches instead of one image, the pixels are those of the resized image.
    """

    def seen(image: ImageView) -> PIL.Image.Image:
        inputs, _ = processor.image_inputs([[decode(image.found)]])
        values = inputs.get("pixel_values")
        if values is None or values.ndim != 4 or len(values) != 1:
            return resized(image)
        assert processor.images is not None  # there is an image
        mean, std = (np.array(of)[:, None, None] for of in processor.images.normalisation)
        colours = np.clip((values[0].numpy() * std + mean) * 255, 0, 255)
        return PIL.Image.fromarray(colours.round().astype(np.uint8).transpose(1, 2, 0))

    return seen


def resized(image: ImageView) -> PIL.Image.Image:
    """The image at its used size, or as it is in the file where the processor changes its shape."""
    decoded = decode(image.found)
    if _keeps_shape(image):
        return decoded.resize(image.tokens.used_size, PIL.Image.Resampling.BICUBIC)
    return decoded


def _keeps_shape(image: ImageView) -> bool:
    """Whether the used size has the image's own shape, rounded to whole cells of the grid or by 3 %."""
    (width, height), (used_width, used_height) = image.found.size, image.tokens.used_size
    columns, rows = image.tokens.grid or (used_width, used_height)
    scale = math.sqrt(used_width * used_height / (width * height))
    across = abs(width * scale - used_width) <= max(used_width / columns, 0.03 * used_width)
    return across and abs(height * scale - used_height) <= max(used_height / rows, 0.03 * used_height)
