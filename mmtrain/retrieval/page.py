"""The figures of `eval retrieval` as one HTML page without network access, with the most confused items in images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtrain.encoding.images import decode
from mmtrain.encoding.thumbnails import data_uri
from mmtrain.records.chat import SampleError
from mmtrain.retrieval.item_content import ItemContent
from mmtrain.retrieval.report import DIRECTIONS, counts, directions_of, rows_of
from mmtrain.scoring.results import render

_SHOWN_SIDE = 256
"""Pixels: the longer side of an image on the page."""
_ENDS = ("query", "right", "wrong")


def write_page(path: Path, row: Mapping[str, Any], content: ItemContent) -> None:
    """Write what `row`, made by `figures`, has to `path`. All text of samples is escaped. Raises OSError."""
    ways = directions_of(row)
    shown = {one[end]["number"] for found in ways.values() for one in found["most_confused"] for end in _ENDS}
    page = render(
        __package__,
        ways=ways,
        titles=DIRECTIONS,
        counts=counts,
        rows_of=rows_of,
        row=row,
        images={number: _images(content, number) for number in shown},
    )
    path.write_text(page, encoding="utf-8", newline="\n")


def _images(content: ItemContent, number: int) -> list[str]:
    """The item's images as data URIs; none where one can no longer be read."""
    try:
        return [data_uri(decode(image), _SHOWN_SIDE) for image in content.images(number)]
    except SampleError:  # it was there when the item was embedded
        return []
