"""The picture that the vision encoder sees: what the model's image processor made of it, made visible again."""

import numpy as np
import PIL.Image

from mmtrain.encoding.images import decode
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.inspect_labels.page_parts import Pixels, resized
from mmtrain.inspect_labels.view import ImageView


def seen_pixels(processor: ChatProcessor) -> Pixels:
    """A function from a picture to its pixels as used, cropped and padded as the processor does.

    Where the processor gives patches rather than one picture, they are those of the picture resized.
    """

    def seen(image: ImageView) -> PIL.Image.Image:
        inputs, _ = processor.image_inputs([[decode(image.picture)]])
        values = inputs.get("pixel_values")
        if values is None or values.ndim != 4 or len(values) != 1:
            return resized(image)
        assert processor.images is not None  # there is an image
        mean, std = (np.array(of)[:, None, None] for of in processor.images.normalisation)
        colours = np.clip((values[0].numpy() * std + mean) * 255, 0, 255)
        return PIL.Image.fromarray(colours.round().astype(np.uint8).transpose(1, 2, 0))

    return seen
