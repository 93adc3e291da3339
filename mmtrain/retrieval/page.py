"""The figures of `eval retrieval` as one HTML page without network access, with the most confused items in images."""

from collections.abc import Mapping
from typing import Any

from mmtrain.encoding.images import decode
from mmtrain.encoding.thumbnails import data_uri
from mmtrain.records.chat import SampleError
from mmtrain.retrieval.figures import DIRECTIONS
from mmtrain.retrieval.item_content import ItemContent
from mmtrain.retrieval.report import counts, directions_of, rows_of
from mmtrain.scoring.results import render

_SHOWN_SIDE = 256
"""Pixels: the longer side of an image on the page."""
_ENDS = ("query", "right", "wrong")


def page_of_retrieval(row: Mapping[str, Any], content: ItemContent) -> str:
    """The page of what `row`, made by `figures`, has. All text of samples is escaped."""
    ways = directions_of(row)
    shown = {one[end]["number"] for found in ways.values() for one in found["most_confused"] for end in _ENDS}
    return render(
        __package__,
        ways=ways,
        titles=DIRECTIONS,
        counts=counts,
        rows_of=rows_of,
        row=row,
        images={number: _images(content, number) for number in shown},
    )


def _images(content: ItemContent, number: int) -> list[str]:
    """The item's images as data URIs; none where one can no longer be read."""
    try:
        return [data_uri(decode(image), _SHOWN_SIDE) for image in content.images(number)]
    except SampleError:  # it was there when the item was embedded
        return []
