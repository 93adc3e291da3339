"""Foreign text as HTML, and pictures with their grid, for the page."""

import base64
import html
import io
import math
import unicodedata
from collections.abc import Callable

import PIL.Image

from mmtrain.encoding.images import decode
from mmtrain.inspect_labels.view import ImageView, SpanView
from mmtrain.records.chat import SampleError

Pixels = Callable[[ImageView], PIL.Image.Image]

_SHOWN_SIDE = 384
_SAVED_SIDE = 1024
_PNG_PIXELS = 256 * 256
_MARKED = {" ": "s", "\n": "n", "\t": "b"}
_JOINERS = "\u200c\u200d"  # they shape Persian words and join emoji: hidden on purpose


def visible(character: str) -> bool:
    category = unicodedata.category(character)
    return character in _JOINERS or (category[0] != "C" and category not in ("Zl", "Zp"))


def drawn(text: str) -> str:
    """`text` as HTML: white space marked, and what has no shape of its own or turns the text around as its number."""
    return "".join(map(_character, text))


def _character(character: str) -> str:
    if character in _MARKED:
        return f'<i class="{_MARKED[character]}">{character}</i>'
    if not visible(character):
        return f'<i class="c" data-c="U+{ord(character):04X}"></i>'
    return html.escape(character)


def plain(text: str) -> str:
    """`text` as an attribute's value or a name on one line."""
    return html.escape("".join(c if visible(c) else c.encode("unicode_escape").decode() for c in text))


def clusters(text: str) -> list[str]:
    """`text` in pieces that may be drawn apart: an accent stays on its letter, joined letters stay joined."""
    pieces: list[str] = []
    for character in text:
        before = pieces[-1][-1] if pieces else ""
        joined = character in _JOINERS or before in _JOINERS or unicodedata.category(character)[0] == "M"
        if before and (joined or unicodedata.bidirectional(before) == unicodedata.bidirectional(character) == "AL"):
            pieces[-1] += character
        else:
            pieces.append(character)
    return pieces


def count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def figure(image: ImageView, span: SpanView, pixels: Pixels) -> str:
    """A picture with its grid, and one bar for all of its placeholders."""
    (width, height), used, grid = image.picture.size, image.tokens.used_size, image.tokens.grid
    keeps_shape = pixels is not resized or _keeps_shape(image)
    facts = [f"{width}×{height} → {used[0]}×{used[1]}", count(image.tokens.num_placeholders, "placeholder")]
    if grid is not None:
        facts[1] += f" ({grid[0]}×{grid[1]})"
    facts.append(f"positions {span.start}–{span.end - 1}, not trained on")
    if not keeps_shape:
        facts.append("the processor crops, pads or stretches it: shown whole, without the grid")
    lines = _grid(*grid) if grid is not None and keeps_shape else ""
    return (
        f'<figure data-has="{span.role}" data-start="{span.start}" data-end="{span.end}">'
        f"{_picture(image, pixels, lines)}"
        f'<figcaption><bdi class="name">{plain(image.picture.name)}</bdi>'
        f"{''.join(f'<span>{fact}</span>' for fact in facts)}</figcaption></figure>"
    )


def _picture(image: ImageView, pixels: Pixels, lines: str) -> str:
    try:
        drawn = pixels(image)
    except SampleError as error:
        return f'<p class="broken">{plain(str(error))}</p>'
    times = max(1, _SHOWN_SIDE // max(drawn.size))
    scale = times if times > 1 else min(1.0, 1.25 * _SHOWN_SIDE / max(drawn.size))
    kind = ' class="tiny"' if times > 1 else ""
    return (
        f'<div class="picture" style="width:{max(1, round(drawn.width * scale))}px">'
        f'<img{kind} src="{_data_uri(drawn)}" width="{drawn.width}" height="{drawn.height}" '
        f'alt="{plain(image.picture.name)}">{lines}</div>'
    )


def resized(image: ImageView) -> PIL.Image.Image:
    picture = decode(image.picture)
    if _keeps_shape(image):
        return picture.resize(image.tokens.used_size, PIL.Image.Resampling.BICUBIC)
    return picture


def _keeps_shape(image: ImageView) -> bool:
    """Whether the used size is the picture's own shape, rounded to whole cells of the grid or by 3 %."""
    (width, height), (used_width, used_height) = image.picture.size, image.tokens.used_size
    columns, rows = image.tokens.grid or (used_width, used_height)
    scale = math.sqrt(used_width * used_height / (width * height))
    across = abs(width * scale - used_width) <= max(used_width / columns, 0.03 * used_width)
    return across and abs(height * scale - used_height) <= max(used_height / rows, 0.03 * used_height)


def _data_uri(picture: PIL.Image.Image) -> str:
    picture = picture.copy()
    picture.thumbnail((_SAVED_SIDE, _SAVED_SIDE), PIL.Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    kind = "png" if picture.width * picture.height <= _PNG_PIXELS else "jpeg"
    picture.save(buffer, kind, quality=88, subsampling=0)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _grid(columns: int, rows: int) -> str:
    """Lines between the placeholders' shares of the picture: dark under light, to be seen on any picture."""
    path = "".join(f"M{x} 0V{rows}" for x in range(1, columns)) + "".join(f"M0 {y}H{columns}" for y in range(1, rows))
    return (
        f'<svg class="grid" viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="under" d="{path}"/><path d="{path}"/></svg>'
    )
