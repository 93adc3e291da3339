"""The figures of `eval answers` as one HTML page that needs no network, with the images of the examples."""

from collections.abc import Mapping
from typing import Any

from mmtrain.answers.report import KINDS, NO_TEXT, reference_lines, summary_lines
from mmtrain.dataset.samples import StoredSamples
from mmtrain.encoding.images import decode, find_image
from mmtrain.encoding.thumbnails import data_uri
from mmtrain.records.chat import SampleError
from mmtrain.scoring.results import render

_SHOWN_SIDE = 320
"""Pixels: the longer side of an image on the page."""


def page_of_answers(row: Mapping[str, Any], samples: StoredSamples) -> str:
    """The page of what `row`, made by `figures`, has. All text of samples is escaped."""
    shown = {example["sample"] for key in ("worst", "surprising") for example in row[key]}
    images = {one: _images(samples, one) for one in shown}
    lines = {"summary": list(summary_lines(row)), "reference_lines": list(reference_lines(row))}
    return render(__package__, row=row, kinds=KINDS, images=images, no_text=NO_TEXT, **lines)


def _images(samples: StoredSamples, index: int) -> list[str]:
    """The sample's images as data URIs, scaled down; those that cannot be read are left out."""
    found, roots = [], samples.records.roots(index)
    for image in samples.records.conversation(index).images:
        try:
            found.append(data_uri(decode(find_image(image, roots)), _SHOWN_SIDE))
        except SampleError:  # it was there when the answer was generated
            continue
    return found
