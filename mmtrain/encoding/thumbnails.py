"""Images scaled down, as text for an HTML page."""

import base64
import io

import PIL.Image


def data_uri(image: PIL.Image.Image, side: int) -> str:
    """`image` as a PNG data URI, its longer side at most `side` pixels."""
    small = image.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
