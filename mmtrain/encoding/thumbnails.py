"""Images scaled down, as text for an HTML page."""

import base64
import io

import PIL.Image

_PNG_PIXELS = 256 * 256
"""Up to so many an image is stored without loss."""


def data_uri(image: PIL.Image.Image, side: int) -> str:
    """`image` as the data URI of a PNG, or where it is large of a JPEG; its longer side at most `side` pixels."""
    small = image.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    kind = "png" if small.width * small.height <= _PNG_PIXELS else "jpeg"
    small.save(buffer, kind, quality=88, subsampling=0)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
