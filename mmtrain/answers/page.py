"""The figures of `eval answers` as one HTML page that needs no network, with the images of the examples."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from mmtrain.answers.report import KINDS, summary_lines
from mmtrain.dataset.samples import StoredSamples
from mmtrain.encoding.images import decode, find_image
from mmtrain.encoding.thumbnails import data_uri
from mmtrain.records.chat import SampleError

_SHOWN_SIDE = 320
"""Pixels: the longer side of an image on the page."""


def write_page(path: Path, row: Mapping[str, Any], samples: StoredSamples) -> None:
    """Write what `row`, made by `figures`, has to `path`. All text of samples is escaped. Raises OSError."""
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    shown = {example["sample"] for key in ("worst", "surprising") for example in row[key]}
    page = environment.from_string(template).render(
        row=row, kinds=KINDS, summary=list(summary_lines(row)), images={one: _images(samples, one) for one in shown}
    )
    path.write_text(page, encoding="utf-8", newline="\n")


def _images(samples: StoredSamples, index: int) -> list[str]:
    """The sample's images as data URIs, scaled down; those that cannot be read are left out."""
    found, roots = [], samples.records.roots(index)
    for image in samples.records.conversation(index).images:
        try:
            found.append(data_uri(decode(find_image(image, roots)), _SHOWN_SIDE))
        except SampleError:  # it was there when the answer was generated
            continue
    return found
