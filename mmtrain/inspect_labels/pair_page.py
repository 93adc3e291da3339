"""Steps of contrastive training as one HTML page that needs no network: a matrix with the items on its sides."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from mmtrain.encoding.images import decode
from mmtrain.encoding.thumbnails import data_uri
from mmtrain.inspect_labels.pair_step import CELLS, PairStep, columns_shown, summary
from mmtrain.records.chat import SampleError

_SHOWN_SIDE = 96
"""Pixels: the longer side of an image on the page."""
_MOST_COLUMNS = 256


def write_page(path: Path, steps: Sequence[tuple[PairStep, Sequence[int]]]) -> None:
    """Write the rows of each step to `path`. All text of samples is escaped. Raises OSError."""
    template = resources.files(__package__).joinpath("pair_page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(template).render(
        steps=[(step, rows, columns_shown(step, rows, _MOST_COLUMNS)) for step, rows in steps],
        cells=CELLS,
        summary=summary,
        item=_item,
    )
    path.write_text(page, encoding="utf-8", newline="\n")


def _item(step: PairStep, number: int, name: str) -> Markup:
    """The images and the text of an item, under its name and the place of its first sample."""
    found = Markup('<span class="soft" title="{}">{}</span>').format(", ".join(step.places(int(number))), name)
    for image in step.content.images(int(number)):
        try:
            found += Markup('<img src="{}" alt="">').format(data_uri(decode(image), _SHOWN_SIDE))
        except SampleError as error:
            found += Markup("<p>{}</p>").format(str(error))
    text = step.content.item(int(number)).text
    return found + Markup('<p title="{}"><bdi>{}</bdi></p>').format(text, text) if text else found
