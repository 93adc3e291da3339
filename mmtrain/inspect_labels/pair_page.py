"""Steps of contrastive training as one HTML page that needs no network: a matrix with the items on its sides."""

from collections.abc import Sequence

from markupsafe import Markup

from mmtrain.command_output import page_environment
from mmtrain.encoding.images import decode
from mmtrain.encoding.thumbnails import data_uri
from mmtrain.inspect_labels.pair_step import CELLS, PairStep, columns_shown, summary_lines
from mmtrain.records.chat import SampleError

_SHOWN_SIDE = 96
"""Pixels: the longer side of an image on the page."""
_MOST_COLUMNS = 256


def page_of_steps(steps: Sequence[tuple[PairStep, Sequence[int]]]) -> str:
    """The page with these rows of each step. All text of samples is escaped."""
    template = page_environment("mmtrain.inspect_labels").get_template("pair_page.html")
    return template.render(
        steps=[(step, rows, columns_shown(step, rows, _MOST_COLUMNS)) for step, rows in steps],
        cells=CELLS,
        summary=summary_lines,
        item=_item,
    )


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
